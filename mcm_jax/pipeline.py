"""A frozen base and a trained MCM together: what samples, and the folder that holds the MCM.

The folder has ``config.json`` and ``mcm.safetensors`` (averaged params, float32; its header names the base and
its fingerprint). A workdir is such a folder while it trains and after; the shipped MCMs are folders with nothing else.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mcm_jax import assets, sampling, sharding
from mcm_jax import config as config_lib
from mcm_jax.base import Base, BaseCard, BaseSettings
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.mcm import MCMSettings, Modulator
from mcm_jax.modalities import ModalitiesSettings
from mcm_jax.sampling import SamplingSettings
from mcm_jax.sharding import MeshSettings

WEIGHTS = "mcm.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a folder's ``config.json`` says of its MCM; how it was trained does not matter to it."""

    base: BaseSettings
    modalities: ModalitiesSettings
    mcm: MCMSettings
    sampling: SamplingSettings
    mesh: MeshSettings = config_lib.setting(MeshSettings(), before=MeshSettings())


def save_mcm(folder: pathlib.Path, params: Any, *, base: Base | BaseCard, step: int) -> None:
    """Writes ``mcm.safetensors`` into a folder; a file that was there is replaced when the new one is complete.

    Args:
      folder: where, beside ``config.json``.
      params: of the MCM.
      base: what it was trained for.
      step: how long, for the record.
    """
    flat = {k: np.asarray(v, np.float32) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    metadata = {"base": base.name, "fingerprint": base.fingerprint, "step": str(step)}
    write_atomically(folder / WEIGHTS, safetensors.numpy.save(flat, metadata))


def check_same_shapes(found: dict[str, Any], expected: dict[str, Any], source: str) -> None:
    """Raises UserError, listing both sides, unless two MCMs have the same params; the values are shapes."""
    lines = [f"  missing there: {k} {tuple(v)}" for k, v in expected.items() if k not in found]
    lines += [f"  only there: {k} {tuple(v)}" for k, v in found.items() if k not in expected]
    lines += [
        f"  {k}: there {tuple(found[k])}, expected {tuple(v)}"
        for k, v in expected.items()
        if k in found and tuple(found[k]) != tuple(v)
    ]
    if lines:
        more = [f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else []
        differs = "\n".join(lines[:12] + more)
        raise UserError(f"{source} holds another MCM than the config describes:\n{differs}")


def _read_mcm(path: pathlib.Path, like: Any, base: Base | BaseCard) -> tuple[Any, int]:
    """Reads params of ``like``'s structure; raises UserError where the file is not of this MCM and this base."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; train.py writes it with its first checkpoint")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            found = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path}: corrupt or cut short ({e}); export or train it again") from e
    if metadata.get("fingerprint") != base.fingerprint:
        raise UserError(
            f"{path} was trained on the base {metadata.get('base')!r} with fingerprint "
            f"{str(metadata.get('fingerprint'))[:16]}, but the base {base.name!r} has {base.fingerprint[:16]}. "
            f"Set base.path to the base that it was trained on"
        )
    expected = traverse_util.flatten_dict(like, sep="/")
    check_same_shapes({k: v.shape for k, v in found.items()}, {k: v.shape for k, v in expected.items()}, str(path))
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in found.items()}, sep="/"), int(metadata["step"])


def start_from(folder: str, settings: MCMSettings, modulator: Modulator, card: BaseCard) -> Any:
    """Params that a new training begins with: those of a trained MCM of the same network, on the same base.

    Modalities are matched by name. What the network makes of others than the trained one knew starts at zero: it begins
    as that MCM does without them.

    Args:
      folder: a workdir, or the name of a shipped MCM.
      settings: of the new MCM.
      modulator: the new MCM.
      card: of the base.

    Raises:
      UserError: another base, another network (lists what differs), a modality of the same name and another kind.
    """
    path = assets.resolve(folder)
    found = config_lib.load(ModelSettings, path, others=True)
    where = f"config.train.init_from={folder!r}"
    there, wanted = config_lib.flatten(found.mcm), config_lib.flatten(settings)
    if lines := [
        f"  mcm.{k}: there {there[k]!r}, now {v!r}" for k, v in wanted.items() if there[k] != v and k in _MATHS
    ]:
        differs = "\n".join(lines)
        raise UserError(f"{where} is an MCM of another network:\n{differs}\nTake the same values, or another MCM")
    known = {m.name: m for m in found.modalities.shown}
    # Another value for unknown (`ignore`) is no other channel.
    same = [m for m in modulator.modalities if m.name in known]
    if odd := [m for m in same if (m.kind, m.channels) != (known[m.name].kind, known[m.name].channels)]:
        old = known[odd[0].name]
        raise UserError(
            f"{where} knows the modality {old.name} as {old.kind} of {old.channels} channel(s), this config as "
            f"{odd[0].kind} of {odd[0].channels}. Give it another name here, so that it starts anew"
        )
    trained = found.mcm.modulator(found.modalities.shown, card.schedule)
    like, wanted = (
        jax.eval_shape(lambda m=m: m.init(jax.random.key(0), card.latent_shape, m.grid(card)))
        for m in (trained, modulator)
    )
    params, _ = _read_mcm(path / WEIGHTS, like, card)
    first = ("encoder", "down_0", "conv") if "encoder" in params else ("unet", "conv_in")
    flat = traverse_util.flatten_dict(params)
    before = np.asarray(flat[*first, "kernel"])
    kernel = np.zeros(traverse_util.flatten_dict(wanted)[*first, "kernel"].shape, np.float32)
    places = [_channels(m, card.latent_shape[-1]) for m in (trained, modulator)]
    for name in places[0].keys() & places[1].keys():
        kernel[:, :, places[1][name]] = before[:, :, places[0][name]]
    return traverse_util.unflatten_dict(flat | {(*first, "kernel"): jnp.asarray(kernel)})


# What two MCMs must have in common for the params of one to mean the same in the other.
_MATHS = {f.name for f in dataclasses.fields(MCMSettings)} - {"dtype", "remat"}


def _channels(modulator: Modulator, depth: int) -> dict[str, slice]:
    """Which channels of the convolution that sees the conditions are whose; '' is all that is no modality."""
    begin = depth * len(modulator.module.inputs) if modulator.module.conditions == "grid" else 0
    found = {"": slice(0, begin)}
    for m in modulator.modalities:
        found[m.name] = slice(begin, begin + m.channels + 1)
        begin += m.channels + 1
    return found


class Pipeline:
    """Samples from a base under an MCM's control.

    Args:
      base: the frozen model.
      modulator: the MCM's network and settings.
      params: of the MCM.
      settings: how samples are drawn, unless :meth:`__call__` is told otherwise.
      step: how long the MCM was trained.
      mesh: the devices that share the work, which the base's params are put on unless they are there; those of this
        process if left out. One of several processes' devices has all of these processes make the same calls.
    """

    def __init__(
        self,
        base: Base,
        modulator: Modulator,
        params: Any,
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
    def from_folder(cls, folder: str | os.PathLike) -> "Pipeline":
        """Loads a workdir, or a shipped MCM by its name, with its base.

        Raises:
          UserError: something is missing, corrupt, or does not belong together.
        """
        path = assets.resolve(os.fspath(folder))
        found = config_lib.load(ModelSettings, path, others=True)
        mesh = sharding.local_mesh(found.mesh)
        base = found.base.load(mesh)
        modulator = found.mcm.modulator(found.modalities.shown, base.schedule)
        like = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape, modulator.grid(base)))
        params, step = _read_mcm(path / WEIGHTS, like, base)
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
        def run(base_params, params, conditions, present, keys, table, text_guidance, context, negative):
            def denoise(x, at):
                def control(eps):
                    level = at.alpha, at.sigma
                    changed = modulator(params, x, eps, at.t, conditions, present, level)[0]
                    return sampling.guide(eps, changed, at.strength)

                def modulate(eps):
                    return jax.lax.cond(at.strength != 0, control, lambda eps: eps, eps)

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
        present, keys = shape((batch_size, len(names)), bool), sampling.sample_keys(0, batch_size)
        rows = sharding.batch_sharding(self.mesh)
        batch, texts = jax.tree.map(
            lambda x: shape(x.shape, x.dtype, sharding=rows),
            ((conditions, present, keys), (context, context if guided else None)),
        )
        how = self.settings.table(base.schedule), shape((), jnp.float32)
        arguments = base.params, sharding.replicate(params, self.mesh), *batch, *how, *texts
        plan = run.lower(*arguments).compile().memory_analysis()
        return plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes

    def _filled(self, batch_size: int) -> int:
        """The next batch size that the devices divide."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def _contexts(self, prompts: Sequence[str] | None, negative: str, count: int, guided: bool) -> tuple[Any, Any, Any]:
        """Contexts ``[P, L, D]`` of the distinct prompts, which of them each sample has, and the negative prompt's."""
        if not self.base.is_text_conditional:
            if prompts is not None:
                raise UserError(f"prompts: the base {self.base.name!r} is unconditional, it has no text encoder")
            return None, None, None
        prompts = [""] * count if prompts is None else list(prompts)
        if len(prompts) != count:
            raise UserError(f"prompts: expected {count}, one a sample, got {len(prompts)}")
        if odd := [p for p in [*prompts, negative] if not isinstance(p, str)]:
            raise UserError(f"prompts: expected texts, got {odd[0]!r} ({type(odd[0]).__name__})")
        distinct = list(dict.fromkeys([*prompts, negative] if guided else prompts))
        cut: dict[str, str] = {}
        parts = [np.asarray(self.base.embed_text(self.base.params, [prompt], cut)) for prompt in distinct]
        cuts = Cuts()
        cuts.add(filter(None, distinct), cut)  # nobody wrote the empty prompt
        cuts.warn(stacklevel=3)
        which = np.array([distinct.index(p) for p in prompts])
        return np.concatenate(parts), which, distinct.index(negative) if guided else None

    def __call__(
        self,
        conditions: Mapping[str, np.ndarray],
        keys: jax.Array,
        *,
        prompts: Sequence[str] | None = None,
        present: Mapping[str, np.ndarray] | None = None,
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
          changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from :attr:`settings`, e.g.
            ``guidance=2.0``. Batches are filled up to what the devices divide, the last one too: one compiled function
            serves any N.

        Returns:
          float32 ``[N, H, W, 3]`` in about [-1, 1].
        """
        settings = self.settings.but(**changes)
        how = settings.table(self.base.schedule), np.float32(settings.text_guidance)
        if not len(keys):
            raise UserError("no keys given: at least one sample is drawn")
        count, (height, width) = len(keys), self.grid
        unknown = set(conditions) - {m.name for m in self.modulator.modalities}
        if unknown:
            names = ", ".join(m.name for m in self.modulator.modalities)
            raise UserError(f"this MCM knows the modalities {names}, got {', '.join(sorted(unknown))}")
        full, shown = {}, np.zeros((count, len(self.modulator.modalities)), bool)
        for i, modality in enumerate(self.modulator.modalities):
            given = conditions.get(modality.name)
            if given is not None:
                wanted = modality.null(count, height, width).shape
                if given.shape not in (wanted, (*wanted, 1)):
                    raise UserError(f"{modality.name}: expected shape {list(wanted)}, got {list(given.shape)}")
                shown[:, i] = (present or {}).get(modality.name, True)
            full[modality.name] = modality.null(count, height, width) if given is None else np.asarray(given)
        guided = self._is_guided(settings)
        run = self._compiled(guided, settings.modulate)
        contexts, which, negative = self._contexts(prompts, settings.negative_prompt, count, guided)
        params = sharding.replicate(self.params, self.mesh)
        batch_size = self._filled(settings.batch_size)
        own = sharding.local_rows(self.mesh, batch_size)
        images = []
        for start in range(0, count, batch_size):
            rows = (start + own) % count  # the last batch starts over to fill up
            batch = {name: value[rows] for name, value in full.items()}, shown[rows], keys[rows]
            context = None if contexts is None else contexts[which[rows]]
            against = contexts[np.full(len(rows), negative)] if guided else None
            batch, texts = sharding.split_batch((batch, (context, against)), self.mesh)
            out = run(self.base.params, params, *batch, *how, *texts)
            images.append(np.asarray(out, np.float32))
        return np.concatenate(images)[:count]
