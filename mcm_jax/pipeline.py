"""A frozen base and a trained MCM together: what samples."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax import assets, sampling, sharding
from mcm_jax import config as config_lib
from mcm_jax.base import Base
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.errors import UserError, expect
from mcm_jax.mcm import Modulator
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import WEIGHTS, ModelSettings, read_mcm

PER_SAMPLE = ("guidance", "start", "end", "text_guidance", "negative_prompt")
"""Fields of :class:`mcm_jax.sampling.SamplingSettings` that each sample of a batch may have its own of."""


class Control(NamedTuple):
    """What the samples of a batch are steered by, all of it data to one compiled program.

    Attributes:
      conditions: of each modality, ``[B, H, W]`` or ``[B, H, W, planes]``.
      subsets: bool ``[B, K, M]``, see :func:`subsets_of`.
      weights: float32 ``[B, K]``.
      scale: float32 ``[B, h, w]``, modality guidance at each place.
      window: float32 ``[B, 2]``, the shares of the steps between which the MCM acts.
      text_guidance: float32 ``[B]``.
    """

    conditions: dict[str, Any]
    subsets: Any
    weights: Any
    scale: Any
    window: Any
    text_guidance: Any


def subsets_of(strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of modalities as a weighted sum of predictions, each under a subset of them that is fully shown.

    With the modalities from the strongest on, ``eps'(s) = (1 - s_1) eps'({}) + (s_1 - s_2) eps'({1}) + ... +
    s_M eps'({1..M})``: linear between strengths 0 and 1, where it is the MCM's own prediction for a subset (the Lovász
    extension of these), and going on beyond. An MCM has seen nothing between shown and absent, so it is not asked.

    Args:
      strengths: ``[N, M]``, at least 0; 0 is absent.

    Returns:
      ``(subsets, weights)``, bool ``[N, M + 1, M]`` and float32 ``[N, M + 1]``; weights sum to 1, the subsets whose
      weight is 0 come last. Where all strengths are 0 or 1 that is all but the first.
    """
    order = np.argsort(-strengths, axis=1, kind="stable")
    falling = np.take_along_axis(np.asarray(strengths, np.float64), order, axis=1)
    weights = -np.diff(np.pad(np.pad(falling, ((0, 0), (1, 0)), constant_values=1), ((0, 0), (0, 1))), axis=1)
    count = np.arange(strengths.shape[1] + 1)
    subsets = np.argsort(order, axis=1)[:, None] < count[:, None]  # the count strongest
    first = np.argsort(weights == 0, axis=1, kind="stable")
    return np.take_along_axis(subsets, first[..., None], 1), np.take_along_axis(weights, first, 1).astype(np.float32)


class Pipeline:
    """Samples from a base under an MCM's control.

    Args:
      base: the frozen model.
      modulator: the MCM's network and settings.
      params: of the MCM; None where there is none, and the base samples alone.
      settings: how samples are drawn, unless :meth:`__call__` is told otherwise.
      step: how long the MCM was trained.
      mesh: the devices that share the work, which the base's params are put on unless they are there; those of this
        process if left out. One of several processes' devices has all of these processes make the same calls.
    """

    def __init__(
        self,
        base: Base,
        modulator: Modulator,
        params: Any | None,
        settings: SamplingSettings | None = None,
        step: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.mesh = sharding.local_mesh() if mesh is None else mesh
        self.base = dataclasses.replace(base, params=sharding.place(base.params, self.mesh))
        self.modulator, self.params, self.step = modulator, params, step
        self.settings = settings or SamplingSettings()
        self._compiled = functools.cache(self._compile)

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike, base: str | os.PathLike | None = None, accept_base: bool = False
    ) -> "Pipeline":
        """Loads a workdir, or a shipped MCM by its name, with its base.

        Args:
          folder: of the MCM.
          base: where the base is, as a config's ``base.path`` says it; None is as there.
          accept_base: also takes a base that the MCM was not trained on, a fine-tune of its own: the same noise
            schedule and latents, other weights. With a warning.

        Raises:
          UserError: something is missing, corrupt, or does not belong together.
        """
        path = assets.resolve(os.fspath(folder))
        found = config_lib.load(ModelSettings, path, others=True)
        mesh = sharding.local_mesh(found.mesh)
        own = found.base
        base = (own if base is None else dataclasses.replace(own, path=os.fspath(base))).load(mesh)
        modulator = found.mcm.modulator(found.modalities.shown, base.schedule)
        like = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape, modulator.grid(base)))
        params, step = read_mcm(path / WEIGHTS, like, base, own if accept_base else None)
        return cls(base, modulator, params, found.sampling, step, mesh)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of conditions: :meth:`mcm_jax.mcm.Modulator.grid`."""
        return self.modulator.grid(self.base)

    def _is_guided(self, settings: SamplingSettings) -> bool:
        """Whether the base is asked about the negative prompt, too."""
        return self.base.is_text_conditional and settings.text_guidance != 1

    def _compile(self, guided: bool, where: str) -> Any:
        """The jitted sampler: what it does in each step is data, the table."""
        base, modulator, mesh = self.base, self.modulator, self.mesh

        @jax.jit
        def run(base_params, params, control, keys, table, calls, context, negative):
            text_guidance = control.text_guidance[:, None, None, None]

            def denoise(x, at):
                acts = (control.window[:, 0] <= at.share) & (at.share < control.window[:, 1])
                strength = jnp.where(acts[:, None, None], control.scale, 0.0)[..., None]

                def change(eps):
                    def add(k, total):
                        shown, weight = control.subsets[:, k], control.weights[:, k, None, None, None]
                        changed = modulator(params, x, eps, at.t, control.conditions, shown, (at.alpha, at.sigma))[0]
                        return total + weight * changed

                    return sampling.guide(eps, jax.lax.fori_loop(0, calls, add, jnp.zeros_like(eps)), strength)

                def modulate(eps):
                    return eps if params is None else jax.lax.cond(jnp.any(strength != 0), change, lambda eps: eps, eps)

                def predict(x, t, alpha, sigma, context):
                    return base.predict(base_params, x, t, context, (alpha, sigma)).astype(jnp.float32)

                seen = x, at.t, at.alpha, at.sigma
                if not guided:
                    return modulate(predict(*seen, context))
                # One call of the base for both prompts.
                twice = jax.tree.map(lambda *both: jnp.concatenate(both), (*seen, negative), (*seen, context))
                eps = jnp.split(predict(*sharding.keep_split(twice, mesh)), 2)
                return sampling.modulate_guided(modulate, *eps, text_guidance=text_guidance, where=where)

            x = sampling.sample(denoise, sampling.initial_noise(keys, base.latent_shape), keys, table)
            return sharding.keep_whole(base.decode(base_params, x), mesh)  # for each process to read

        return run

    def sampling_bytes(self, batch_size: int) -> int:
        """Memory that sampling a batch takes on each device, parameters and all, by the compiler's own count.

        The base's params may be shapes alone (:func:`mcm_jax.base.outline`). Takes as long as compiling does.

        Args:
          batch_size: images, over all devices.
        """
        base, shape = self.base, jax.ShapeDtypeStruct
        batch_size = self._filled(batch_size)
        guided = self._is_guided(self.settings)
        run, context = self._compiled(guided, self.settings.modulate), None
        if base.is_text_conditional:
            ids = shape((batch_size, base.tokenizer.length), jnp.int32)
            context = jax.eval_shape(base.encode_tokens, base.params, ids)
        params = jax.eval_shape(lambda: self.modulator.init(jax.random.key(0), base.latent_shape, self.grid))
        names = self.modulator.modalities
        conditions = {m.name: m.null(batch_size, *self.grid) for m in names}
        control = self._control(conditions, np.ones((batch_size, len(names))), [self.settings] * batch_size, None)
        rows = sharding.batch_sharding(self.mesh)
        batch, texts = jax.tree.map(
            lambda x: shape(x.shape, x.dtype, sharding=rows),
            ((control, sampling.sample_keys(0, batch_size)), (context, context if guided else None)),
        )
        how = self.settings.table(base.schedule), np.int32(1)
        arguments = base.params, sharding.replicate(params, self.mesh), *batch, *how, *texts
        plan = run.lower(*arguments).compile().memory_analysis()
        return plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes

    def _filled(self, batch_size: int) -> int:
        """The next batch size that the devices divide."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def _contexts(self, prompts: Sequence[str] | None, negatives: Sequence[str], count: int) -> tuple[Any, Any, Any]:
        """Contexts ``[P, L, D]`` of the distinct prompts, and which of them are each sample's and its negative one."""
        if not self.base.is_text_conditional:
            if prompts is not None:
                raise UserError(f"prompts: the base {self.base.name!r} is unconditional, it has no text encoder")
            return None, None, None
        prompts = [""] * count if prompts is None else list(prompts)
        if len(prompts) != count:
            raise UserError(f"prompts: expected {count}, one a sample, got {len(prompts)}")
        if odd := [p for p in prompts if not isinstance(p, str)]:
            raise UserError(f"prompts: expected texts, got {odd[0]!r} ({type(odd[0]).__name__})")
        distinct = list(dict.fromkeys([*prompts, *negatives]))
        cut: dict[str, str] = {}
        parts = [np.asarray(self.base.embed_text(self.base.params, [prompt], cut)) for prompt in distinct]
        cuts = Cuts()
        cuts.add(filter(None, distinct), cut)  # nobody wrote the empty prompt
        cuts.warn(stacklevel=3)
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return np.concatenate(parts), *(np.array([place[p] for p in texts]) for texts in (prompts, negatives))

    def _each(self, count: int, changes: Mapping[str, Any]) -> list[SamplingSettings]:
        """The settings of each sample; those of :data:`PER_SAMPLE` may come as ``count`` values."""
        own = {k: list(v) for k, v in changes.items() if k in PER_SAMPLE and not isinstance(v, str) and np.ndim(v)}
        if odd := [k for k, v in own.items() if len(v) != count]:
            raise UserError(f"{odd[0]}: expected {count} values, one a sample, or one for all, got {len(own[odd[0]])}")
        settings = self.settings.but(**{k: v for k, v in changes.items() if k not in own})
        if not own:
            return [settings] * count
        return [settings.but(**dict(zip(own, row, strict=True))) for row in zip(*own.values(), strict=True)]

    def _control(
        self,
        conditions: dict[str, np.ndarray],
        strengths: np.ndarray,
        each: Sequence[SamplingSettings],
        mask: np.ndarray | None,
    ) -> Control:
        scale = np.array([s.guidance for s in each], np.float32)[:, None, None]
        wanted = (len(each), *self.base.latent_shape[:2])
        if mask is not None:
            expect(np.shape(mask) == wanted, "mask", f"of shape {list(wanted)}", list(np.shape(mask)))
            mask = np.asarray(mask, np.float32)
            expect(np.all((mask >= 0) & (mask <= 1)), "mask", "in [0, 1]", f"{mask.min():g}..{mask.max():g}")
        return Control(
            conditions,
            *subsets_of(strengths),
            np.broadcast_to(scale, wanted) if mask is None else scale * mask,
            np.array([(s.start, s.end) for s in each], np.float32),
            np.array([s.text_guidance for s in each], np.float32),
        )

    def __call__(
        self,
        conditions: Mapping[str, np.ndarray],
        keys: jax.Array,
        *,
        prompts: Sequence[str] | None = None,
        present: Mapping[str, np.ndarray] | None = None,
        strength: Mapping[str, np.ndarray | float] | None = None,
        mask: np.ndarray | None = None,
        **changes: Any,
    ) -> np.ndarray:
        """Samples one image a key.

        Args:
          conditions: for each modality that is given, ``[N, H, W]`` on :attr:`grid`, or ``[N, H, W, planes]``
            (labels int, others in [0, 1]); any subset. None at all samples from the base under an MCM that sees no
            condition.
          keys: ``[N]``, see :func:`mcm_jax.sampling.sample_keys`.
          prompts: N texts, for a text-conditional base; None is the empty prompt for each.
          present: of modalities that are given, bool ``[N]``: which samples are shown them; all where left out.
          strength: of modalities, ``[N]`` or one for all, at least 0: how much each counts, see :func:`subsets_of`; 0
            is absent, 1 (where left out) shown. Each that is neither costs a further call of the MCM in its batch's
            steps.
          mask: ``[N, h, w]`` in [0, 1] on the latents' grid: where the conditions hold; elsewhere the base is alone.
          changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from :attr:`settings`, e.g.
            ``guidance=2.0``; those in :data:`PER_SAMPLE` one for all or N. Batches are filled up to what the devices
            divide, the last one too: one compiled function serves any N. Where any sample has text guidance, all are
            drawn by the program that has it, which calls the base for both prompts.

        Returns:
          float32 ``[N, H, W, 3]`` in about [-1, 1].
        """
        if not len(keys):
            raise UserError("no keys given: at least one sample is drawn")
        count, (height, width) = len(keys), self.grid
        each, strength = self._each(count, changes), strength or {}
        settings = each[0]
        table = settings.table(self.base.schedule)
        unknown = {*conditions, *strength} - {m.name for m in self.modulator.modalities}
        if unknown:
            names = ", ".join(m.name for m in self.modulator.modalities)
            raise UserError(f"this MCM knows the modalities {names}, got {', '.join(sorted(unknown))}")
        full, strengths = {}, np.zeros((count, len(self.modulator.modalities)))
        for i, modality in enumerate(self.modulator.modalities):
            given = conditions.get(modality.name)
            if given is not None:
                wanted = modality.null(count, height, width).shape
                if given.shape not in (wanted, (*wanted, 1)):
                    raise UserError(f"{modality.name}: expected shape {list(wanted)}, got {list(given.shape)}")
                strengths[:, i] = strength.get(modality.name, 1.0)
                positive = np.all((strengths[:, i] >= 0) & np.isfinite(strengths[:, i]))
                expect(positive, f"strength of {modality.name}", "at least 0", strength.get(modality.name))
                strengths[:, i] *= (present or {}).get(modality.name, True)
            values = modality.null(count, height, width) if given is None else np.asarray(given)
            # Classes come in several dtypes, each of which would compile anew.
            full[modality.name] = values if modality.continuous else values.astype(np.int32)
        guided = any(self._is_guided(s) for s in each)
        run = self._compiled(guided, settings.modulate)
        negatives = [s.negative_prompt for s in each] if guided else []
        contexts, which, negative = self._contexts(prompts, negatives, count)
        control = self._control(full, strengths, each, mask)
        needed = np.count_nonzero(control.weights, axis=1)
        params = sharding.replicate(self.params, self.mesh)
        batch_size = self._filled(settings.batch_size)
        own = sharding.local_rows(self.mesh, batch_size)
        images = []
        for start in range(0, count, batch_size):
            rows = (start + own) % count  # the last batch starts over to fill up
            calls = needed[np.arange(start, start + batch_size) % count].max()  # of all processes' rows
            batch = jax.tree.map(lambda value, rows=rows: value[rows], (control, keys))
            context = None if contexts is None else contexts[which[rows]]
            against = contexts[negative[rows]] if guided else None
            batch, texts = sharding.split_batch((batch, (context, against)), self.mesh)
            out = run(self.base.params, params, *batch, table, np.int32(calls), *texts)
            images.append(np.asarray(out, np.float32))
        return np.concatenate(images)[:count]
