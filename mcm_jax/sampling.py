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
from mcm_jax.draws import expect_seed
from mcm_jax.errors import UserError, expect
from mcm_jax.samplers import SAMPLERS, SPACINGS, Table
from mcm_jax.schedules import Schedule

_MOST = 2**16  # pixels of a side, more than any picture format is read with
MODULATE = ("after_cfg", "before_cfg", "prompt_only")


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 has: JSON and command lines may hold halves of characters, which it has not."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


class Point(NamedTuple):
    """Where a call of the network stands: ``x = alpha x_0 + sigma eps``.

    Attributes:
      t: float32 ``[B]``, the timestep; whole numbers unless the grid has others.
      alpha: float32 ``[B]``.
      sigma: float32 ``[B]``.
      row: int32 scalar, of the table.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    row: jax.Array


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
      eta: DDIM's share of fresh noise; 0 for others.
      guidance: modality guidance scale: ``eps + guidance * (eps' - eps)``; 0 is the base alone (the MCM does not run).
      guidance_schedule: factors of the guidance over the steps, evenly spaced and linear in between: 1,0 falls to
        nothing; empty for none.
      start: share of the steps after which the MCM begins to act; before it the base is alone.
      end: share of the steps after which it acts no more.
      text_guidance: classifier-free guidance scale of the prompt, for text-conditional bases, as the next three; 1 is
        none (then the base sees the prompt only).
      text_rescale: how far a guided prediction is brought back to the spread of the prompt's own, 0 (not) to 1.
      negative_prompt: what the prompt's guidance leads away from.
      modulate: what of the prompt's guidance the MCM modulates: both branches (``before_cfg``), the result
        (``after_cfg``), or the prompt's alone (``prompt_only``, ControlNet's guess mode: text_guidance then multiplies
        the control, too).
      image_strength: of a given picture: the share of the steps that are taken from it with noise; 1 begins with nearly
        noise alone.
      height: of the pictures, in pixels; 0 is the base's.
      width: of the pictures, in pixels; 0 is the base's.
      batch_size: images at a time.
    """

    sampler: str = "euler"
    steps: int = 25
    spacing: str = ""
    timesteps: tuple[float, ...] = ()
    eta: float = 0.0
    guidance: float = 1.0
    guidance_schedule: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0
    text_guidance: float = 7.5
    text_rescale: float = 0.0
    negative_prompt: str = ""
    modulate: str = "before_cfg"
    image_strength: float = 0.8
    height: int = 0
    width: int = 0
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
        fine = all(0 <= factor < float("inf") for factor in self.guidance_schedule)
        expect(fine, "guidance_schedule", "numbers of at least 0", self.guidance_schedule)
        expect(0 <= self.start <= 1, "start", "a share of the steps, in [0, 1]", self.start)
        expect(self.start <= self.end <= 1, "end", f"a share of the steps, in [start={self.start:g}, 1]", self.end)
        expect(0 <= self.text_guidance < float("inf"), "text_guidance", "at least 0", self.text_guidance)
        expect(0 <= self.text_rescale <= 1, "text_rescale", "in [0, 1]", self.text_rescale)
        expect(is_text(self.negative_prompt), "negative_prompt", "a text in UTF-8, '' for none", self.negative_prompt)
        expect(self.modulate in MODULATE, "modulate", f"one of {', '.join(MODULATE)}", self.modulate)
        expect(0 < self.image_strength <= 1, "image_strength", "in (0, 1]", self.image_strength)
        expect(0 <= self.height <= _MOST, "height", f"pixels, at most {_MOST}, or 0 (the base's)", self.height)
        expect(0 <= self.width <= _MOST, "width", f"pixels, at most {_MOST}, or 0 (the base's)", self.width)
        expect(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)

    def but(self, **changes: Any) -> "SamplingSettings":
        """The same with some fields changed; None leaves one as it is. Raises UserError for a field that is none."""
        if unknown := changes.keys() - {f.name for f in dataclasses.fields(self)}:
            known = ", ".join(f.name for f in dataclasses.fields(self))
            raise UserError(f"{', '.join(sorted(unknown))}: no setting of sampling; known are {known}")
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})

    def table(self, schedule: Schedule, from_picture: bool = False) -> Table:
        """The sampler's table for a base, filled up for the compiled loop.

        Args:
          schedule: the base's.
          from_picture: whether it begins with a given picture, at :attr:`image_strength`, and not with noise.

        Raises:
          UserError: the schedule does not have such steps, or its own sampler is none that we have.
        """
        sampler, spacing = self.sampler or schedule.solver, self.spacing
        if not self.sampler:
            spacing = spacing or schedule.solver_spacing
        known = f"one of {', '.join(SAMPLERS)}; the base's own scheduler is none of them"
        expect(sampler in SAMPLERS, "sampler", known, sampler)
        own = "0, since no other sampler than ddim has it (ddpm, euler_ancestral and dpm++2m_sde always add noise)"
        expect(self.eta == 0 or sampler == "ddim", "eta", own, self.eta)
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
                strength=self.image_strength if from_picture else None,
            )
        except ValueError as e:
            raise UserError(f"sampler={sampler}, steps={self.steps}: {e}") from e
        return samplers.padded(made)

    def check_for(self, schedule: Schedule) -> None:
        """Raises UserError where a base's schedule does not have such steps."""
        self.table(schedule)


def sample_keys(seed: int, count: int) -> jax.Array:
    """One key per sample, ``[count]``: sample i is the same whatever ``count`` is. Seeds are below 2**32."""
    expect_seed(seed)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Starting noise x_T, float32 ``[B, *shape]``, one key a sample."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)


def _noise(keys: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)


def guide(eps: jax.Array, other: jax.Array, scale: jax.Array | float) -> jax.Array:
    """``eps + scale (other - eps)``: 0 is eps, 1 the other, more exaggerates what the second knows beyond the first.

    Between the predictions for the negative (or empty) prompt and for the prompt it is classifier-free guidance (Ho &
    Salimans 2022). Modality guidance, of several MCMs and with masks, is :mod:`mcm_jax.engine`'s.
    """
    return eps + scale * (other - eps)


def rescale(guided: jax.Array, prompt: jax.Array, share: jax.Array, fixed: jax.Array) -> jax.Array:
    """Brings a guided prediction back to the prompt's spread, as far as ``share`` says (Lin et al. 2024, sec. 3.4).

    Args:
      guided: eps by text guidance, ``[B, H, W, C]``.
      prompt: eps for the prompt, of the same shape.
      share: ``[B]`` in [0, 1]; 0 leaves it as it is.
      fixed: of the same shape, what of eps follows from x, so that the network does not predict it: ``sigma x`` where
        it predicts v, ``x / sigma`` where it predicts x0, 0 where it predicts eps. The spread is that of the rest.
    """
    guided, prompt = guided - fixed, prompt - fixed
    factor = prompt.std((1, 2, 3)) / guided.std((1, 2, 3))
    return fixed + guided * jnp.where(share > 0, 1 + share * (factor - 1), 1.0)[:, None, None, None]


def slerp(a: jax.Array, b: jax.Array, share: jax.Array) -> jax.Array:
    """Between two noises, along the sphere, so that what is in between has their length (Shoemake 1985).

    Args:
      a: ``[B, H, W, C]``; where share is 0.
      b: of the same shape; where share is 1.
      share: ``[B]`` in [0, 1].
    """
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    cosine = (flat(a) * flat(b)).sum(1) / (jnp.linalg.norm(flat(a), axis=1) * jnp.linalg.norm(flat(b), axis=1))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    same = angle < 1e-4  # of the same noise twice there is no arc
    whole = jnp.where(same, 1.0, jnp.sin(angle))
    one, other = (jnp.where(same, part, jnp.sin(part * angle) / whole) for part in (1 - share, share))
    here = (slice(None), None, None, None)
    return jnp.where(share[here] == 0, a, one[here] * a + other[here] * b)


class State(NamedTuple):
    """Between two calls of the network; float32 ``[B, H, W, C]`` each.

    Attributes:
      x: the noisy input of the next call.
      memory: three of them, what the solver remembers.
      x0: the last estimate of x0; zeros before the first.
    """

    x: jax.Array
    memory: tuple[jax.Array, jax.Array, jax.Array]
    x0: jax.Array


def begin(noise: jax.Array, table: Table, picture: jax.Array | float = 0.0) -> State:
    """Where a sampler begins.

    Args:
      noise: standard normal ``[B, H, W, C]``, see :func:`initial_noise`.
      table: see :func:`mcm_jax.samplers.make_table`; may be traced.
      picture: x0 of the same shape that is begun with, where the table keeps of it.
    """
    x = jnp.float32(table.start) * noise.astype(jnp.float32) + jnp.float32(table.keep) * picture
    return State(x, (jnp.zeros_like(x),) * 3, jnp.zeros_like(x))


def advance(
    denoise: Denoise,
    state: State,
    keys: jax.Array,
    table: Table,
    first: jax.Array | int,
    last: jax.Array | int,
    hold: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lambda x, alpha, sigma: x,
) -> State:
    """Runs rows ``first`` to ``last`` (without) of a table.

    Args:
      denoise: predicts eps, ``[B, H, W, C]``, from x and the :class:`Point` that it is at.
      state: from :func:`begin`, or from here.
      keys: one key a sample ``[B]``, see :func:`sample_keys`. Where the sampler adds noise after the network's call n,
        from 1, it is that of ``fold_in(key, n)``.
      table: see :func:`mcm_jax.samplers.make_table`; may be traced, as first and last.
      first: row.
      last: row.
      hold: x before each call as the network shall see it, from x and the alpha and sigma (scalars) that it is at.
    """
    shape, table = state.x.shape, Table(*(jnp.asarray(part) for part in table))
    table = jax.tree.map(lambda part: part.astype(jnp.float32) if part.dtype.kind == "f" else part, table)

    def step(i: jax.Array, state: State) -> State:
        x = hold(state.x, table.alpha[i], table.sigma[i])
        at = Point(*(jnp.full(shape[0], part[i]) for part in (table.t, table.alpha, table.sigma)), jnp.asarray(i))
        eps = denoise(x, at).astype(jnp.float32)
        x0 = jnp.clip((x - table.sigma[i] * eps) / table.alpha[i], -table.clip[i], table.clip[i])
        update = table.update[i]
        draw = lambda: _noise(keys, i + 1, shape[1:])  # noqa: E731
        noise = jax.lax.cond(jnp.any(update[:, -1] != 0), draw, lambda: jnp.zeros(shape))
        parts = (x, *state.memory, x0, eps, noise)
        x, *memory = (sum(c * part for c, part in zip(row, parts, strict=True)) for row in update)
        return State(x, tuple(memory), x0)

    return jax.lax.fori_loop(first, last, step, state)


def sample(denoise: Denoise, noise: jax.Array, keys: jax.Array, table: Table) -> jax.Array:
    """Runs a sampler from noise to ``x_0``, float32 ``[B, H, W, C]``: :func:`begin`, :func:`advance` to the end."""
    return advance(denoise, begin(noise, table), keys, table, 0, jnp.asarray(table.count)).x
