"""Samplers: one ``lax.scan`` each over ``denoise(x, t) -> eps``. They know no network.

With ``abar`` the schedule's cumulative product, ``x0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)`` and ``s`` the next
timestep of the grid:

* DDIM (Song et al. 2021, eq. 12): ``x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps + std z`` with
  ``std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)``.
* ancestral DDPM (Ho et al. 2020, eq. 7): the posterior mean of ``x_s`` given ``x0`` and ``x_t``, plus its standard
  deviation times z; over a coarser grid than the training's, alpha and beta are those between the two grid points.

Noise is drawn for every sample from its own key, so a sample does not depend on which others are in its batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.errors import UserError, expect
from mcm_jax.schedules import Schedule

SAMPLERS = ("ddim", "ddpm")
MODULATE = ("after_cfg", "before_cfg")

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn. The config's section ``sampling``, the flags of sample.py.

    Attributes:
      sampler: ``ddim``, or ``ddpm`` (ancestral).
      steps: sampling steps.
      eta: DDIM's share of fresh noise.
      guidance: modality guidance scale: ``eps + guidance * (eps' - eps)``; 0 is the base alone (the MCM does not run).
      text_guidance: classifier-free guidance scale of the prompt, for text-conditional bases, as the next two; 1 is
        none (then the base sees the prompt only).
      negative_prompt: what the prompt's guidance leads away from.
      modulate: whether the MCM modulates each branch of the prompt's guidance (``before_cfg``), or its result
        (``after_cfg``), see :func:`modulate_guided`.
      batch_size: images at a time.
    """

    sampler: str = "ddim"
    steps: int = 25
    eta: float = 0.0
    guidance: float = 1.0
    text_guidance: float = 7.5
    negative_prompt: str = ""
    modulate: str = "before_cfg"
    batch_size: int = 32

    def __post_init__(self):
        expect(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}", self.sampler)
        expect(self.steps >= 1, "steps", "at least 1", self.steps)
        expect(0 <= self.eta <= 1, "eta", "in [0, 1]", self.eta)
        expect(0 <= self.guidance < float("inf"), "guidance", "at least 0", self.guidance)  # nan is neither
        expect(0 <= self.text_guidance < float("inf"), "text_guidance", "at least 0", self.text_guidance)
        expect(isinstance(self.negative_prompt, str), "negative_prompt", "a text, '' for none", self.negative_prompt)
        expect(self.modulate in MODULATE, "modulate", f"one of {', '.join(MODULATE)}", self.modulate)
        expect(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)

    def but(self, **changes: Any) -> "SamplingSettings":
        """The same with some fields changed; None leaves one as it is. Raises UserError for a field that is none."""
        if unknown := changes.keys() - {f.name for f in dataclasses.fields(self)}:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise UserError(f"{', '.join(sorted(unknown))}: no setting of sampling; known are {known}")
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def check_for(self, schedule: Schedule) -> None:
        """Raises UserError where a base's schedule does not have so many steps."""
        total = schedule.num_train_timesteps
        expect(self.steps <= total, "steps", f"in 1..{total} (the base's timesteps)", self.steps)
        try:
            schedule.timesteps(self.steps)
        except ValueError as e:
            raise UserError(f"steps={self.steps}: {e}") from e


def sample_keys(seed: int, count: int) -> jax.Array:
    """One key per sample, ``[count]``: sample i is the same whatever ``count`` is."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Starting noise x_T, float32 ``[B, *shape]``, one key a sample."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


def _noise(keys: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)


def guide(eps: jax.Array, modulated: jax.Array, scale: float) -> jax.Array:
    """``eps + scale (eps' - eps)``: 0 is eps, 1 is eps', more exaggerates what the second knows beyond the first.

    Between the base's prediction and the modulated one this is modality guidance (ours); between the predictions for
    the negative (or empty) prompt and for the prompt it is classifier-free guidance (Ho & Salimans 2022).
    """
    return eps + scale * (modulated - eps)


def modulate_guided(
    modulate: Callable[[jax.Array], jax.Array],
    negative: jax.Array,
    positive: jax.Array,
    *,
    guidance: jax.Array | float,
    text_guidance: jax.Array | float,
    where: str,
) -> jax.Array:
    """Classifier-free guidance of the prompt and modality guidance of the MCM together.

    Args:
      modulate: the MCM, eps ``[B, H, W, C]`` to eps' at the current x_t and t.
      negative: eps for the negative prompt ``[B, H, W, C]``.
      positive: eps for the prompt, of the same shape.
      guidance: modality guidance scale.
      text_guidance: classifier-free guidance scale.
      where: ``after_cfg``: the MCM sees and modulates the guided prediction; ``before_cfg``: each branch by itself.
    """
    if where == "after_cfg":
        eps = guide(negative, positive, text_guidance)
        return guide(eps, modulate(eps), guidance)
    if where == "before_cfg":
        negative = guide(negative, modulate(negative), guidance)
        positive = guide(positive, modulate(positive), guidance)
        return guide(negative, positive, text_guidance)
    raise ValueError(f"modulate must be one of {MODULATE}, got {where!r}")


def sample(
    denoise: Denoise,
    x: jax.Array,
    keys: jax.Array,
    schedule: Schedule,
    *,
    sampler: str = "ddim",
    steps: int = 25,
    eta: float = 0.0,
    timesteps: np.ndarray | None = None,
) -> jax.Array:
    """Runs a sampler from ``x_T`` to ``x_0``.

    Args:
      denoise: predicts eps, ``[B, H, W, C]``, from x_t and int32 t ``[B]``.
      x: starting noise ``[B, H, W, C]``, see :func:`initial_noise`.
      keys: one key a sample ``[B]``, see :func:`sample_keys`.
      schedule: the base's.
      sampler: ``ddim`` or ``ddpm``.
      steps: steps on the schedule's own spacing.
      eta: DDIM's share of fresh noise, 0 (deterministic) to 1.
      timesteps: an own grid, descending, in place of ``steps``.

    Returns:
      x_0, float32 ``[B, H, W, C]``; clipped where the schedule says so (``clip_sample``).
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}")
    grid = np.asarray(schedule.timesteps(steps) if timesteps is None else timesteps, np.int32)
    abar = schedule.abar.astype(np.float64)
    here = abar[grid]
    final = schedule.final_alpha_cumprod if sampler == "ddim" else 1.0
    there = np.append(abar[grid[1:]], final)
    table = {
        "t": grid,
        "number": np.arange(1, len(grid) + 1, dtype=np.int32),
        "abar_t": here.astype(np.float32),
        "abar_s": there.astype(np.float32),
        "last": np.arange(len(grid)) == len(grid) - 1,
    }

    def ddim(x, x0, eps, row, z):
        abar_t, abar_s = row["abar_t"], row["abar_s"]
        variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
        std = eta * jnp.sqrt(jnp.maximum(variance, 0))
        return jnp.sqrt(abar_s) * x0 + jnp.sqrt(jnp.maximum(1 - abar_s - std**2, 0)) * eps + std * z

    def ddpm(x, x0, eps, row, z):
        abar_t, abar_s = row["abar_t"], row["abar_s"]
        alpha = abar_t / abar_s
        beta = 1 - alpha
        mean = (jnp.sqrt(abar_s) * beta * x0 + jnp.sqrt(alpha) * (1 - abar_s) * x) / (1 - abar_t)
        share = 1.0 if schedule.variance_type.startswith("fixed_large") else (1 - abar_s) / (1 - abar_t)
        variance = jnp.maximum(share * beta, 1e-20)
        return jnp.where(row["last"], mean, mean + jnp.sqrt(variance) * z)

    noisy = sampler == "ddpm" or eta > 0
    update = ddim if sampler == "ddim" else ddpm

    def step(x, row):
        eps = denoise(x, jnp.full(x.shape[0], row["t"], jnp.int32)).astype(jnp.float32)
        x0 = (x - jnp.sqrt(1 - row["abar_t"]) * eps) / jnp.sqrt(row["abar_t"])
        if schedule.clip_sample:
            x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
        z = _noise(keys, row["number"], x.shape[1:]) if noisy else 0.0
        return update(x, x0, eps, row, z), None

    x, _ = jax.lax.scan(step, x.astype(jnp.float32), jax.tree.map(jnp.asarray, table))
    return x
