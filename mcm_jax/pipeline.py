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
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mcm_jax import assets, sampling, sharding
from mcm_jax import config as config_lib
from mcm_jax.base import Base, load_base
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.mcm import Modulator

WEIGHTS = "mcm.safetensors"


def save_mcm(folder: pathlib.Path, params: Any, *, base: Base, step: int) -> None:
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


def _read_mcm(path: pathlib.Path, like: Any, base: Base) -> tuple[Any, int]:
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
    config_lib.check_same_shapes(
        {k: v.shape for k, v in found.items()}, {k: v.shape for k, v in expected.items()}, str(path)
    )
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in found.items()}, sep="/"), int(metadata["step"])


class Pipeline:
    """Samples from a base under an MCM's control.

    Args:
      base: the frozen model.
      modulator: the MCM's network and settings.
      params: of the MCM.
      config: the run's; ``config.sampling`` are the defaults of :meth:`__call__`.
      step: how long the MCM was trained.
      mesh: the devices that share the work, which the base's params are put on unless they are there; those of this
        process if left out. One of several processes' devices has all of these processes make the same calls.
    """

    def __init__(
        self,
        base: Base,
        modulator: Modulator,
        params: Any,
        config: ml_collections.ConfigDict,
        step: int = 0,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.mesh = sharding.local_mesh() if mesh is None else mesh
        self.base = dataclasses.replace(base, params=sharding.place(base.params, self.mesh))
        self.modulator, self.params, self.config, self.step = modulator, params, config, step
        self._compiled = functools.cache(self._compile)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Pipeline":
        """Loads a workdir, or a shipped MCM by its name, with its base.

        Raises:
          UserError: something is missing, corrupt, or does not belong together.
        """
        path = assets.resolve(os.fspath(folder))
        config = config_lib.load(path)
        mesh = sharding.local_mesh()
        put = functools.partial(sharding.place, mesh=mesh)
        base = load_base(assets.resolve_base(config.base.path), config.base.dtype, put)
        modulator = config_lib.modulator(config, base)
        like = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape))
        params, step = _read_mcm(path / WEIGHTS, like, base)
        return cls(base, modulator, params, config, step, mesh)

    def _compile(self, sampler: str, steps: int, eta: float, alone: bool, guided: bool, where: str) -> Any:
        base, modulator, mesh = self.base, self.modulator, self.mesh

        @jax.jit
        def run(base_params, params, conditions, present, keys, guidance, text_guidance, context, negative):
            def denoise(x, t):
                def modulate(eps):
                    return eps if alone else modulator(params, x, eps, t, conditions, present)[0]

                if not guided:
                    eps = base.predict(base_params, x, t, context).astype(jnp.float32)
                    return sampling.guide(eps, modulate(eps), guidance)
                # One call of the base for both prompts.
                twice = jax.tree.map(lambda *both: jnp.concatenate(both), (x, t, negative), (x, t, context))
                eps = base.predict(base_params, *sharding.keep_split(twice, mesh)).astype(jnp.float32)
                return sampling.modulate_guided(
                    modulate, *jnp.split(eps, 2), guidance=guidance, text_guidance=text_guidance, where=where
                )

            x = sampling.initial_noise(keys, base.latent_shape)
            x = sampling.sample(denoise, x, keys, base.schedule, sampler=sampler, steps=steps, eta=eta)
            return sharding.keep_whole(base.decode(base_params, x), mesh)  # for each process to read

        return run

    def sampling_bytes(self, batch_size: int) -> int:
        """Memory that sampling a batch takes on each device, parameters and all, by the compiler's own count.

        The base's params may be shapes alone (:func:`mcm_jax.base.outline`). Takes as long as compiling does.

        Args:
          batch_size: images, over all devices.
        """
        s, base, shape = self.config.sampling, self.base, jax.ShapeDtypeStruct
        batch_size = self._filled(batch_size)
        guided = base.is_text_conditional and s.text_guidance != 1
        context = None
        if base.is_text_conditional:
            ids = shape((batch_size, base.tokenizer.length), jnp.int32)
            context = jax.eval_shape(base.encode_tokens, base.params, ids)
        params = jax.eval_shape(lambda: self.modulator.init(jax.random.key(0), base.latent_shape))
        names = self.modulator.modalities
        conditions = {m.name: m.null(batch_size, *base.latent_shape[:2]) for m in names}
        present, keys = shape((batch_size, len(names)), bool), sampling.sample_keys(0, batch_size)
        rows = sharding.batch_sharding(self.mesh)
        batch, texts = jax.tree.map(
            lambda x: shape(x.shape, x.dtype, sharding=rows),
            ((conditions, present, keys), (context, context if guided else None)),
        )
        run = self._compiled(s.sampler, int(s.steps), float(s.eta), s.guidance == 0, guided, s.modulate)
        scales = shape((), jnp.float32), shape((), jnp.float32)
        arguments = base.params, sharding.replicate(params, self.mesh), *batch, *scales, *texts
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
        parts = [np.asarray(self.base.embed_text(self.base.params, [prompt])) for prompt in distinct]
        which = np.array([distinct.index(p) for p in prompts])
        return np.concatenate(parts), which, distinct.index(negative) if guided else None

    def __call__(
        self,
        conditions: Mapping[str, np.ndarray],
        keys: jax.Array,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        text_guidance: float | None = None,
        modulate: str | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Samples one image a key.

        Args:
          conditions: for each modality that is given, ``[N, H, W]`` on the base's grid (labels int, maps in
            [0, 1]); any subset. None at all samples from the base under an MCM that sees no condition.
          keys: ``[N]``, see :func:`mcm_jax.sampling.sample_keys`.
          prompts: N texts, for a text-conditional base; None is the empty prompt for each.
          negative_prompt: what classifier-free guidance leads away from.
          guidance: modality guidance scale; 0 is the base alone (then the MCM does not run).
          text_guidance: classifier-free guidance scale; 1 is none (then the base sees the prompt only).
          modulate: where the MCM stands if the prompt is guided: ``after_cfg`` or ``before_cfg``, see
            :func:`mcm_jax.sampling.modulate_guided`.
          sampler: ``ddim`` or ``ddpm``.
          steps: sampling steps.
          eta: DDIM's share of fresh noise.
          batch_size: images at a time, over all devices: as many more as these divide; the last batch is filled up, so
            one compiled function serves any N.

        Returns:
          float32 ``[N, H, W, 3]`` in about [-1, 1].
        """
        defaults = self.config.sampling
        guidance = defaults.guidance if guidance is None else guidance
        text_guidance = defaults.text_guidance if text_guidance is None else text_guidance
        negative_prompt = defaults.negative_prompt if negative_prompt is None else negative_prompt
        sampler = sampler or defaults.sampler
        steps = defaults.steps if steps is None else steps
        eta = defaults.eta if eta is None else eta
        batch_size = defaults.batch_size if batch_size is None else batch_size
        sampling.check_settings(
            self.base.schedule,
            guidance=guidance,
            text_guidance=text_guidance,
            steps=steps,
            eta=eta,
            batch_size=batch_size,
        )
        if not len(keys):
            raise UserError("no keys given: at least one sample is drawn")
        count, (height, width, _) = len(keys), self.base.latent_shape
        unknown = set(conditions) - {m.name for m in self.modulator.modalities}
        if unknown:
            names = ", ".join(m.name for m in self.modulator.modalities)
            raise UserError(f"this MCM knows the modalities {names}, got {', '.join(sorted(unknown))}")
        full, present = {}, np.zeros((count, len(self.modulator.modalities)), bool)
        for i, modality in enumerate(self.modulator.modalities):
            given = conditions.get(modality.name)
            if given is not None:
                if given.shape[:3] != (count, height, width):
                    raise UserError(
                        f"{modality.name}: expected shape [{count}, {height}, {width}], got {list(given.shape)}"
                    )
                present[:, i] = True
            full[modality.name] = modality.null(count, height, width) if given is None else np.asarray(given)
        guided = self.base.is_text_conditional and text_guidance != 1
        contexts, which, negative = self._contexts(prompts, negative_prompt, count, guided)
        run = self._compiled(sampler, int(steps), float(eta), guidance == 0, guided, modulate or defaults.modulate)
        scales = np.float32(guidance), np.float32(text_guidance)
        params = sharding.replicate(self.params, self.mesh)
        batch_size = self._filled(batch_size)
        own = sharding.local_rows(self.mesh, batch_size)
        images = []
        for start in range(0, count, batch_size):
            rows = (start + own) % count  # the last batch starts over to fill up
            batch = {name: value[rows] for name, value in full.items()}, present[rows], keys[rows]
            context = None if contexts is None else contexts[which[rows]]
            against = contexts[np.full(len(rows), negative)] if guided else None
            batch, texts = sharding.split_batch((batch, (context, against)), self.mesh)
            out = run(self.base.params, params, *batch, *scales, *texts)
            images.append(np.asarray(out, np.float32))
        return np.concatenate(images)[:count]
