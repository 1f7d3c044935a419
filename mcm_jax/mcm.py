"""The Multimodal Conditioning Module: a small network beside a frozen base.

    gamma, nu = MCM(x_t, eps, t, y)          eps' = eps * (1 + gamma) + nu

The network is a plain ADM / DDPM U-Net (:class:`mcm_jax.base.unet2d.UNet2D`, the same code as an unconditional base)
over ``concat(x_t, eps, y)``; its last convolution starts at zero, so an untrained MCM leaves the base as it is
(ours, after ControlNet and ADM). Two further choices are ours, each a switch, see docs/mcm.md:

* ``inputs`` may hold ``x0``, the base's estimate ``clip((x_t - sigma eps) / alpha)``: the layout that the base
  is heading for, which a small network would spend its capacity on deriving.
* ``shift_space = "x0"`` scales the shift as a bounded change of x0:
  ``eps' = eps (1 + gamma) - nu min(1, alpha / sigma)``.

Conditions come on the grid of ``x_t``, as the paper has it, or, for a latent base, at the pictures' resolution, and
strided convolutions inside the MCM bring them to the grid (:class:`ConditionEncoder`, as in its descendant VCM).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base import Base, BaseCard
from mcm_jax.base.blocks import Downsample
from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.config import setting
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality, stack, total_channels
from mcm_jax.schedules import Schedule

INPUTS = ("x_t", "eps", "x0")
SHIFT_SPACES = ("eps", "x0")
CONDITIONS = ("grid", "encoder")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of the network.

    Attributes:
      channels: width of the first level.
      multipliers: width of each level over ``channels``; each further level halves the resolution.
      blocks: residual blocks a level on the way down (one more on the way up).
      attention: for each level, whether its blocks are followed by self-attention. The middle block always is.
      head_dim: channels of an attention head; None is one head over all channels.
      groups: groups of each group normalisation.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    head_dim: int | None = None
    groups: int = 32

    def __post_init__(self):
        if len(self.attention) != len(self.multipliers):
            raise UserError(
                f"attention needs one entry for each of the {len(self.multipliers)} levels of multipliers, "
                f"got {len(self.attention)}"
            )
        for key in ("channels", "blocks", "groups"):
            expect(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        least = min(self.multipliers, default=0)
        expect(least >= 1, "multipliers", "a list of numbers, each at least 1", self.multipliers)
        for i, m in enumerate(self.multipliers):
            if self.channels * m % self.groups:
                raise UserError(
                    f"groups: a level of {self.channels * m} channels cannot be split into {self.groups} groups; "
                    f"choose channels or groups so that it can"
                )
            attends = self.attention[i] or i == len(self.multipliers) - 1  # the last level's width is the middle's
            if attends and self.head_dim and self.channels * m % self.head_dim:
                raise UserError(
                    f"head_dim: a level of {self.channels * m} channels has no whole heads of {self.head_dim}"
                )


class ConditionEncoder(nn.Module):
    """Conditions at the pictures' resolution to the grid of latents: 3x3 convolutions of stride 2, SiLU after each.

    Of the MCM's own width it adds ``halvings * (9 width^2 + width)`` parameters to an MCM, whatever the modalities: its
    first kernel is as large as the one that the U-Net's first convolution does without.

    Attributes:
      width: channels of each convolution.
      halvings: how many: log2 of the pictures' size over the grid's.
      dtype: of the computation.
    """

    width: int
    halvings: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, conditions: jax.Array) -> jax.Array:
        """``[B, H, W, D]`` to ``[B, H / 2^halvings, W / 2^halvings, width]``."""
        for i in range(self.halvings):
            conditions = nn.silu(Downsample(self.width, dtype=self.dtype, name=f"down_{i}")(conditions))
        return conditions


class MCM(nn.Module):
    """Scale and shift maps from the noisy input, the base's prediction and the conditions.

    Attributes:
      size: shape of the network.
      inputs: which of ``x_t``, ``eps`` and ``x0`` it sees, in this order (the paper: x_t and eps).
      dtype: dtype of the computation; gamma and nu are float32.
      remat: recompute activations in the backward pass rather than keep them: less memory, more time, same params.
      conditions: how they come: on the ``grid``, or finer, for a :class:`ConditionEncoder` of the first level's width.
    """

    size: Size
    inputs: tuple[str, ...] = ("x_t", "eps")
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    conditions: str = "grid"

    @nn.compact
    def __call__(
        self, x_t: jax.Array, eps: jax.Array, t: jax.Array, conditions: jax.Array, x0: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns ``(gamma, nu)``, each float32 of eps's shape.

        Args:
          x_t: noisy input ``[B, H, W, C]``.
          eps: the base's prediction ``[B, H, W, C]``.
          t: timesteps int32 ``[B]``.
          conditions: channels of the modalities ``[B, H, W, D]``, see :func:`mcm_jax.modalities.stack`; with an encoder
            ``[B, 2^n H, 2^n W, D]``.
          x0: the base's estimate of x0, :func:`estimate_x0`; needed where ``inputs`` names it.
        """
        if "x0" in self.inputs and x0 is None:
            raise ValueError("this MCM sees the base's estimate of x0: pass x0=estimate_x0(...)")
        if self.conditions == "encoder":
            halvings = int(math.log2(conditions.shape[1] // x_t.shape[1]))
            conditions = ConditionEncoder(self.size.channels, halvings, self.dtype, name="encoder")(conditions)
        given = {"x_t": x_t, "eps": eps, "x0": x0}
        seen = jnp.concatenate([given[name] for name in self.inputs] + [conditions], axis=-1)
        channels = eps.shape[-1]
        levels = len(self.size.multipliers)
        halving = 2 ** (levels - 1)
        if seen.shape[1] % halving or seen.shape[2] % halving:
            raise UserError(
                f"an MCM of {levels} levels needs a grid divisible by {halving}, got {seen.shape[1]}x{seen.shape[2]}; "
                f"take fewer mcm.multipliers or another resolution"
            )
        config = UNet2DConfig(
            in_channels=seen.shape[-1],
            out_channels=2 * channels,
            block_out_channels=tuple(self.size.channels * m for m in self.size.multipliers),
            layers_per_block=self.size.blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in self.size.attention),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.size.attention)),
            attention_head_dim=self.size.head_dim,
            norm_num_groups=self.size.groups,
        )
        unet = UNet2D(config, dtype=self.dtype, zero_init_output=True, remat=self.remat, name="unet")
        maps = unet(seen, t).astype(jnp.float32)
        return maps[..., :channels], maps[..., channels:]


def _per_example(a: jax.Array) -> jax.Array:
    return a[:, None, None, None]


def estimate_x0(x_t: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array, clip: float) -> jax.Array:
    """The base's estimate of x0: ``clip((x_t - sigma eps) / alpha)`` within +-clip; alpha and sigma are ``[B]``.

    Finite where alpha = 0: what does not cancel there goes to the bounds.
    """
    x0 = (x_t - _per_example(sigma) * eps) / jnp.maximum(_per_example(alpha), jnp.finfo(jnp.float32).tiny)
    return jnp.clip(x0, -clip, clip)


def modulate(
    eps: jax.Array,
    gamma: jax.Array,
    nu: jax.Array,
    *,
    residual_scale: bool = True,
    shift_space: str = "eps",
    alpha: jax.Array | None = None,
    sigma: jax.Array | None = None,
) -> jax.Array:
    """Modulates a prediction element by element: ``eps' = eps * (1 + gamma) + nu``.

    Args:
      eps: the base's prediction ``[B, H, W, C]``.
      gamma: scale map of the same shape.
      nu: shift map of the same shape.
      residual_scale: False multiplies by gamma itself, as the paper's figure draws it. An untrained MCM then predicts
        zero, not eps.
      shift_space: ``eps`` (the paper) or ``x0`` (ours): the shift is ``-min(1, alpha / sigma) nu``, a change
        of x0 by nu where there is more noise than signal, and bounded elsewhere.
      alpha: ``[B]``, for ``shift_space="x0"``.
      sigma: ``[B]``, for ``shift_space="x0"``.

    Returns:
      eps', of eps's shape.
    """
    scale = 1 + gamma if residual_scale else gamma
    if shift_space == "eps":
        return eps * scale + nu
    if shift_space == "x0":
        return eps * scale - nu * _per_example(jnp.minimum(1.0, alpha / sigma))
    raise ValueError(f"shift_space must be one of {SHIFT_SPACES}, got {shift_space!r}")


def parameter_count(params: Any) -> int:
    """How many numbers a pytree of params holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class Modulator:
    """An MCM with all that stands between it and a base: conditions to channels, estimate of x0, modulation.

    Attributes:
      module: the network.
      modalities: which conditions, in the order of ``present``'s columns.
      schedule: the base's.
      shift_space: see :func:`modulate`.
      residual_scale: see :func:`modulate`.
      x0_clip: bound of the estimate of x0.
    """

    module: MCM
    modalities: tuple[Modality, ...]
    schedule: Schedule
    shift_space: str = "eps"
    residual_scale: bool = True
    x0_clip: float = 1.0

    def grid(self, base: Base | BaseCard) -> tuple[int, int]:
        """Height and width at which it takes conditions: of a base's latents, or with an encoder of its pictures."""
        return base.latent_shape[:2] if self.module.conditions == "grid" else base.image_shape[:2]

    @property
    def multiple(self) -> int:
        """Height and width of latents are multiples of this."""
        return 2 ** (len(self.module.size.multipliers) - 1)

    def init(self, key: jax.Array, shape: tuple[int, int, int], grid: tuple[int, int] | None = None) -> Any:
        """Initial params for a base of latent shape ``(H, W, C)``; `grid` by :meth:`grid`, H and W if left out."""
        height, width, channels = shape
        x = jnp.zeros((1, height, width, channels))
        y = jnp.zeros((1, *(grid or (height, width)), total_channels(self.modalities)))
        return self.module.init(key, x, x, jnp.zeros(1, jnp.int32), y, x)["params"]

    def shapes(self, base: Base | BaseCard) -> Any:
        """What :meth:`init` gives for a base, as shapes."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), base.latent_shape, self.grid(base)))

    def __call__(
        self,
        params: Any,
        x_t: jax.Array,
        eps: jax.Array,
        t: jax.Array,
        conditions: Mapping[str, jax.Array],
        present: jax.Array,
        level: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns ``(eps', gamma, nu)``, each ``[B, H, W, C]``.

        Args:
          params: of the MCM.
          x_t: noisy input ``[B, H, W, C]``.
          eps: the base's prediction, of the same shape.
          t: timesteps int32 ``[B]``.
          conditions: one batch a modality, on :meth:`grid`.
          present: bool ``[B, len(modalities)]``.
          level: alpha and sigma of x_t, ``[B]``; None are the schedule's at t.
        """
        alpha, sigma = level or (self.schedule.alpha(t), self.schedule.sigma(t))
        x0 = estimate_x0(x_t, eps, alpha, sigma, self.x0_clip) if "x0" in self.module.inputs else None
        channels = stack(self.modalities, conditions, present)
        gamma, nu = self.module.apply({"params": params}, x_t, eps, t, channels, x0)
        modulated = modulate(
            eps,
            gamma,
            nu,
            residual_scale=self.residual_scale,
            shift_space=self.shift_space,
            alpha=alpha,
            sigma=sigma,
        )
        return modulated, gamma, nu


@dataclasses.dataclass(frozen=True)
class MCMSettings:
    """The MCM and how it modulates. The config's section ``mcm``; the defaults are the paper's network in our form.

    Attributes:
      channels: width of the first level; ``SIZES`` in configs/default.py has sets of this and the next ones.
      multipliers: width of each level over ``channels``; each further level halves the resolution.
      blocks: residual blocks a level on the way down (one more on the way up).
      attention: for each level 0 or 1, whether its blocks are followed by self-attention; the middle block always is.
      head_dim: of attention; 0 is one head over all channels.
      groups: of each normalisation.
      inputs: what the MCM sees beside the conditions: ``x_t``, ``eps`` (the paper), ``x0``, the base's estimate (ours).
      conditions: how it sees the conditions: resized to the base's ``grid`` (the paper), or at the pictures' resolution
        through a small convolutional ``encoder`` that is part of it (VCM); the same for a base that works on pixels.
      shift_space: the shift as a bounded change of ``x0`` (ours), or of ``eps`` (the paper).
      residual_scale: ``eps * (1 + gamma)``, or False: ``eps * gamma``.
      x0_clip: bound of the estimate of x0; 0 is the base's, 1 for pixels and 4 for latents.
      dtype: of the computation; parameters, loss and state are float32.
      remat: whether the backward pass computes activations again in place of keeping them: less memory, more time.
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 0, 1, 0)
    head_dim: int = 0
    groups: int = 32
    inputs: tuple[str, ...] = ("x_t", "eps", "x0")
    shift_space: str = "x0"
    residual_scale: bool = True
    x0_clip: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    conditions: str = setting("encoder", before="grid")

    def __post_init__(self):
        expect(self.conditions in CONDITIONS, "conditions", f"one of {', '.join(CONDITIONS)}", self.conditions)
        expect(self.head_dim >= 0, "head_dim", "at least 0", self.head_dim)
        self.size()  # refuses what makes no network
        known = len(set(self.inputs)) == len(self.inputs) > 0 and set(self.inputs) <= set(INPUTS)
        expect(known, "inputs", f"out of {', '.join(INPUTS)}", self.inputs)
        expect(self.shift_space in SHIFT_SPACES, "shift_space", f"one of {', '.join(SHIFT_SPACES)}", self.shift_space)
        expect(self.x0_clip >= 0, "x0_clip", "at least 0", self.x0_clip)
        expect(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)

    def check_new(self) -> None:
        """Raises UserError for what older runs may have, and new ones may not: attention of any number."""
        wanted = "1 or 0 at each level, with or without"
        expect(set(self.attention) <= {0, 1}, "config.mcm.attention", wanted, self.attention)

    def size(self) -> Size:
        """Shape of the network."""
        attention = tuple(bool(a) for a in self.attention)
        return Size(self.channels, self.multipliers, self.blocks, attention, self.head_dim or None, self.groups)

    def x0_bound(self, base: Base | BaseCard) -> float:
        """Bound of the estimate of x0 on a base; 4 is for latents of about unit variance, as Stable Diffusion has."""
        return self.x0_clip or (1.0 if base.is_of_pixels else 4.0)

    def modulator(self, modalities: tuple[Modality, ...], base: Base | BaseCard) -> "Modulator":
        """The MCM for a base."""
        return Modulator(
            module=MCM(self.size(), self.inputs, jnp.dtype(self.dtype), self.remat, self.conditions),
            modalities=modalities,
            schedule=base.schedule,
            shift_space=self.shift_space,
            residual_scale=self.residual_scale,
            x0_clip=self.x0_bound(base),
        )
