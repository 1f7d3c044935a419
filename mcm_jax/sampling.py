"""Sampling: how samples are drawn, and the one loop over ``denoise(x, at) -> eps`` that runs every sampler's table.

The samplers themselves are in :mod:`mcm_jax.samplers`. The loop knows no network and no solver: what it does in a step
is in the table, which is an argument, so another solver, number of steps or spacing compiles nothing.

Noise is drawn for every sample from its own key, so a sample does not depend on which others are in its batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcm_jax import samplers
from mcm_jax.errors import UserError, expect
from mcm_jax.samplers import SAMPLERS, SPACINGS, Table
from mcm_jax.schedules import Schedule

MODULATE = ("after_cfg", "before_cfg")


class Point(NamedTuple):
    """Where a call of the network stands: ``x = alpha x_0 + sigma eps``.

    Attributes:
      t: float32 ``[B]``, the timestep; whole numbers unless the grid has others.
      alpha: float32 ``[B]``.
      sigma: float32 ``[B]``.
      share: float32 scalar, of the sampler's steps, how much is behind; in [0, 1).
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    share: jax.Array


Denoise = Callable[[jax.Array, Point], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn. The config's section ``sampling``, the flags of sample.py.

    Attributes:
      sampler: ``ddim``, ``ddpm``, ``euler``, ``euler_ancestral``, ``heun`` (two calls of the network a step),
        ``dpm++2m``, ``dpm++2m_sde``, ``plms`` or ``unipc``; '' is what the base's own scheduler file names.
      steps: sampling steps.
      spacing: of the steps: ``leading``, ``trailing``, ``linspace``, ``karras`` or ``exponential``; '' is the base's.
      timesteps: an own grid in place of steps and spacing, falling; empty for none.
      eta: DDIM's share of fresh noise.
      guidance: modality guidance scale: ``eps + guidance * (eps' - eps)``; 0 is the base alone (the MCM does not run).
      start: share of the steps after which the MCM begins to act; before it the base is alone.
      end: share of the steps after which it acts no more.
      text_guidance: classifier-free guidance scale of the prompt, for text-conditional bases, as the next two; 1 is
        none (then the base sees the prompt only).
      negative_prompt: what the prompt's guidance leads away from.
      modulate: whether the MCM modulates each branch of the prompt's guidance (``before_cfg``), or its result
        (``after_cfg``), see :func:`modulate_guided`.
      batch_size: images at a time.
    """

    sampler: str = "ddim"
    steps: int = 25
    spacing: str = ""
    timesteps: tuple[float, ...] = ()
    eta: float = 0.0
    guidance: float = 1.0
    start: float = 0.0
    end: float = 1.0
    text_guidance: float = 7.5
    negative_prompt: str = ""
    modulate: str = "before_cfg"
    batch_size: int = 32

    def __post_init__(self):
        expect(
            self.sampler in ("", *SAMPLERS),
            "sampler",
            f"one of {', '.join(SAMPLERS)}, or '' (the base's)",
            self.sampler,
        )
        expect(
            self.spacing in ("", *SPACINGS),
            "spacing",
            f"one of {', '.join(SPACINGS)}, or '' (the base's)",
            self.spacing,
        )
        expect(self.steps >= 1, "steps", "at least 1", self.steps)
        expect(0 <= self.eta <= 1, "eta", "in [0, 1]", self.eta)
        expect(0 <= self.guidance < float("inf"), "guidance", "at least 0", self.guidance)  # nan is neither
        expect(0 <= self.start <= 1, "start", "a share of the steps, in [0, 1]", self.start)
        expect(self.start <= self.end <= 1, "end", f"a share of the steps, in [start={self.start:g}, 1]", self.end)
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

    def table(self, schedule: Schedule) -> Table:
        """The sampler's table for a base, filled up for the compiled loop.

        Raises:
          UserError: the schedule does not have such steps, or its own sampler is none that we have.
        """
        sampler, spacing = self.sampler or schedule.solver, self.spacing
        if not self.sampler:
            spacing = spacing or schedule.solver_spacing
        known = f"one of {', '.join(SAMPLERS)}; the base's own scheduler is none of them"
        expect(sampler in SAMPLERS, "sampler", known, sampler)
        total = schedule.num_train_timesteps
        expect(self.steps <= total, "steps", f"in 1..{total} (the base's timesteps)", self.steps)
        try:
            made = samplers.make_table(
                schedule,
                sampler,
                self.steps,
                spacing=spacing,
                eta=self.eta,
                timesteps=self.timesteps,
            )
        except ValueError as e:
            raise UserError(f"sampler={sampler}, steps={self.steps}: {e}") from e
        return samplers.padded(made)

    def check_for(self, schedule: Schedule) -> None:
        """Raises UserError where a base's schedule does not have such steps."""
        self.table(schedule)


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
    text_guidance: jax.Array | float,
    where: str,
) -> jax.Array:
    """Classifier-free guidance of the prompt and the MCM together.

    Args:
      modulate: the MCM at its strength, eps ``[B, H, W, C]`` to ``guide(eps, eps', guidance)``, for the x at hand.
      negative: eps for the negative prompt ``[B, H, W, C]``.
      positive: eps for the prompt, of the same shape.
      text_guidance: classifier-free guidance scale.
      where: ``after_cfg``: the MCM sees and modulates the guided prediction; ``before_cfg``: each branch by itself.
    """
    if where == "after_cfg":
        return modulate(guide(negative, positive, text_guidance))
    if where == "before_cfg":
        return guide(modulate(negative), modulate(positive), text_guidance)
    raise ValueError(f"modulate must be one of {MODULATE}, got {where!r}")


def sample(denoise: Denoise, x: jax.Array, keys: jax.Array, table: Table) -> jax.Array:
    """Runs a sampler from ``x_T`` to ``x_0``.

    Args:
      denoise: predicts eps, ``[B, H, W, C]``, from x and the :class:`Point` that it is at.
      x: starting noise ``[B, H, W, C]``, see :func:`initial_noise`.
      keys: one key a sample ``[B]``, see :func:`sample_keys`. Where the sampler adds noise after the network's call n,
        from 1, it is that of ``fold_in(key, n)``.
      table: see :func:`mcm_jax.samplers.make_table`; may be traced.

    Returns:
      x_0, float32 ``[B, H, W, C]``; as far as clipped as the table says.
    """
    shape, table = x.shape, Table(*(jnp.asarray(part) for part in table))
    table = jax.tree.map(lambda part: part.astype(jnp.float32) if part.dtype.kind == "f" else part, table)

    def step(i, state):
        x = state[0]
        at = Point(*(jnp.full(shape[0], part[i]) for part in (table.t, table.alpha, table.sigma)), table.share[i])
        eps = denoise(x, at).astype(jnp.float32)
        x0 = jnp.clip((x - table.sigma[i] * eps) / table.alpha[i], -table.clip[i], table.clip[i])
        update = table.update[i]
        draw = lambda: _noise(keys, i + 1, shape[1:])  # noqa: E731
        noise = jax.lax.cond(jnp.any(update[:, -1] != 0), draw, lambda: jnp.zeros(shape))
        parts = (*state, x0, eps, noise)
        return tuple(sum(c * part for c, part in zip(row, parts, strict=True)) for row in update)

    state = (table.start * x.astype(jnp.float32), *(jnp.zeros(shape) for _ in range(3)))
    return jax.lax.fori_loop(0, table.count, step, state)[0]
