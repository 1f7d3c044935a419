"""The parts of diffusers' 2-D networks, in Flax Linen and NHWC: configs, norms, resampling, residual, attention, time.

Modules and parameters carry diffusers' names with ``_`` for ``.`` before an index (``resnets.0`` is ``resnets_0``), so
that :mod:`mcm_jax.base.loading` derives one from the other. Written from the behaviour of diffusers 0.42
(`models/resnet.py`, `attention_processor.py`, `embeddings.py`, `unets/unet_2d_blocks.py`), whose quirks are named where
they matter.

Each module has a field `dtype`, in which it computes; normalisations, softmax and time features are in float32 whatever
it is. Parameters may have any floating type.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.base import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # PyTorch's default is the exact one
    "relu": jax.nn.relu,
}


# A type of values in a JSON file, in words: one, several.
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    None: ("null", "null"),
    types.NoneType: ("null", "null"),
}


class Config:
    """What the frozen dataclasses that hold a diffusers config have in common: reading, and refusing by name.

    The annotations of their fields say what a value may be: ``int``, ``float``, ``bool``, ``str``, ``None``, tuples and
    unions of these. What else must hold is for `__post_init__`, after that of this class.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._expect(_is_a(getattr(self, field.name), field.type), field.name, _in_words(field.type))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed ``config.json``. Private keys (``_...``) are left out; any other unknown key is refused.

        Raises:
            ValueError: an unknown key, or a value that is not supported; names the key, what was found and what is
                supported.
        """
        public = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(public.keys() - set(known)):
            raise ValueError(f"unknown keys: found {', '.join(unknown)}; supported are {', '.join(known)}")
        return cls(**public)

    def _expect(self, holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}: found {getattr(self, key)!r}, supported: {expected}")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as JSON has them: a whole number is also a number; true is none, nor is infinity."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if inner:  # a tuple, of one type and any length or of a type for each element
        inner = inner[:1] * len(value) if inner[-1] is ... and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is_a, value, inner))
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return value is None if kind in (None, types.NoneType) else type(value) is kind


def _in_words(kind: Any) -> str:
    """What :func:`_is_a` takes, in the words of a JSON file."""
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, inner))
    if inner:
        number = "" if inner[-1] is ... else f"{len(inner)} "
        return f"a list of {number}{_WORDS[inner[0]][1]}"
    return _WORDS.get(kind, ("a section",))[0]


def sinusoidal(t: jax.Array, width: int, flip_sin_to_cos: bool, freq_shift: float) -> jax.Array:
    """Sinusoidal features of the timestep (DDPM's, with diffusers' two options).

    Args:
        t: int32 or float32 ``[B]``.
        width: number of features; an odd one ends in a zero.
        flip_sin_to_cos: cosines first.
        freq_shift: what is taken from the number of frequencies in the exponent's denominator.

    Returns:
        float32 ``[B, width]``.
    """
    half = width // 2
    # Constants, made in numpy: an error of one ulp in a frequency is one of 1e-4 in the phase at t = 1000.
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = t.astype(jnp.float32)[:, None] * frequency[None, :]
    parts = [jnp.cos(phase), jnp.sin(phase)] if flip_sin_to_cos else [jnp.sin(phase), jnp.cos(phase)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, width % 2)))


def upsample_nearest(x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """``[B, H, W, C]`` to ``[B, 2H, 2W, C]``, or to another `size` (height and width) by the nearest position above."""
    height, width = x.shape[1:3]
    if size is None or size == (2 * height, 2 * width):
        return x.repeat(2, axis=1).repeat(2, axis=2)
    return x[:, np.arange(size[0]) * height // size[0]][:, :, np.arange(size[1]) * width // size[1]]


def downsample_mean(x: jax.Array) -> jax.Array:
    """``[B, H, W, C]`` to the means of 2x2 positions, ``[B, H/2, W/2, C]``."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class GroupNorm(nn.Module):
    """Group normalisation over all axes but the batch, in float32, of ``[B, ..., C]``; C is a multiple of `groups`."""

    groups: int
    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        batch, per_group = x.shape[0], channels // self.groups
        h = x.astype(jnp.float32).reshape(batch, -1, channels)

        # Positions first, then the few channels of a group: one reduction over both trains slower on a CPU.
        def mean(a: jax.Array) -> jax.Array:
            each = a.mean(axis=1).reshape(batch, self.groups, per_group).mean(axis=-1)
            return jnp.repeat(each, per_group, axis=-1)[:, None]

        h = h - mean(h)
        h = h * (jax.lax.rsqrt(mean(jnp.square(h)) + self.eps) * scale.astype(jnp.float32)[None, None])
        h = h + bias.astype(jnp.float32)[None, None]
        return h.reshape(x.shape).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(jnp.float32).reshape(shape)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32).reshape(shape)
        h = x.astype(jnp.float32)
        h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + self.eps)
        return (h * scale + bias).astype(self.dtype)


def conv3x3(channels: int, dtype: Any, name: str, **kwargs: Any) -> nn.Conv:
    """A 3x3 convolution that keeps the resolution."""
    return nn.Conv(channels, (3, 3), padding=1, dtype=dtype, name=name, **kwargs)


class FourierFeatures(nn.Module):
    """Random Fourier features of ``log t`` (NCSN++), float32 ``[B, 2 * width]``, sines first. Needs t > 0."""

    width: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        # Drawn once and never trained.
        weight = jax.lax.stop_gradient(self.param("weight", nn.initializers.normal(self.scale), (self.width,)))
        phase = jnp.log(t.astype(jnp.float32))[:, None] * weight.astype(jnp.float32)[None] * 2 * math.pi
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers with an activation (a key of :data:`ACTIVATIONS`) between: ``[B, F]`` to ``[B, width]``."""

    width: int
    dtype: Any = jnp.float32
    act: str = "silu"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        h = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(features)
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(ACTIVATIONS[self.act](h))


class ResnetBlock(nn.Module):
    """Residual block with an optional time embedding and an optional change of resolution.

    Attributes:
        channels: output channels; a 1x1 convolution adapts the shortcut where the input has another number.
        groups: groups of both norms.
        eps: epsilon of both norms.
        act: a key of :data:`ACTIVATIONS`.
        scale_shift: the time embedding scales and shifts after the second norm, rather than being added before it.
        resample: ``up`` (nearest), ``down`` (mean of 2x2) or None; applied to both branches after the first norm.
        rescale: what the sum of both branches is divided by.
    """

    channels: int
    groups: int = 32
    eps: float = 1e-5
    act: str = "silu"
    scale_shift: bool = False
    resample: str | None = None
    rescale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
        """``[B, H, W, C]`` (and ``[B, E]``) to ``[B, H', W', channels]``."""
        act = ACTIVATIONS[self.act]
        h = act(GroupNorm(self.groups, self.eps, self.dtype, name="norm1")(x))
        if self.resample == "up":
            x, h = upsample_nearest(x), upsample_nearest(h)
        elif self.resample == "down":
            x, h = downsample_mean(x), downsample_mean(h)
        h = conv3x3(self.channels, self.dtype, "conv1")(h)
        norm2 = GroupNorm(self.groups, self.eps, self.dtype, name="norm2")
        if temb is None:
            h = norm2(h)
        else:
            width = 2 * self.channels if self.scale_shift else self.channels
            temb = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(act(temb))[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(temb, 2, axis=-1)
                h = norm2(h) * (1 + scale) + shift
            else:
                h = norm2(h + temb)
        h = conv3x3(self.channels, self.dtype, "conv2")(act(h))
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return (x + h) / self.rescale


class Attention(nn.Module):
    """Self-attention over the positions of a map, with its residual connection.

    Attributes:
        head_dim: channels per head. There are ``C // head_dim`` heads, so where it does not divide C the inner width is
            smaller than C, as in diffusers.
        groups: groups of the norm; None leaves the norm out.
        eps: epsilon of the norm.
        rescale: what the sum with the residual is divided by.
    """

    head_dim: int
    groups: int | None = 32
    eps: float = 1e-5
    rescale: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` to the same."""
        batch, height, width, channels = x.shape
        h = x if self.groups is None else GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x)
        h = h.reshape(batch, height * width, channels)
        h = attention.multi_head(h, h, channels // self.head_dim, self.head_dim, self.dtype)
        return (x + h.reshape(x.shape)) / self.rescale


class Downsample(nn.Module):
    """Halves the resolution by a strided 3x3 convolution.

    `padding` 1 pads all sides; 0 pads below and on the right only (the original DDPM, in TensorFlow's "SAME" fashion).
    """

    channels: int
    padding: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (self.padding, 1)
        return nn.Conv(self.channels, (3, 3), strides=2, padding=(pad, pad), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles the resolution, or brings it to `size`: nearest neighbour, then a 3x3 convolution."""

    channels: int
    dtype: Any = jnp.float32
    size: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return conv3x3(self.channels, self.dtype, "conv")(upsample_nearest(x, self.size))


class Level(nn.Module):
    """The blocks of one resolution on one side of a U-Net.

    Attributes:
        resnet: makes a residual block of a name (and `resample`).
        attention: makes an attention block of a name, or None for a level without.
        layers: number of residual blocks.
        resample: ``conv`` or ``resnet``, how the level ends, or None if it keeps its resolution.
        direction: ``down`` or ``up``.
        sampler: makes the convolution that resamples, of a name.
    """

    resnet: Any
    attention: Any
    layers: int
    resample: str | None
    direction: str
    sampler: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, temb: jax.Array, *context: jax.Array, skips: list[jax.Array] | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Runs the level on `x`; with `skips` (one per layer, deepest last) each is concatenated before its layer.

        `context`, if there is one, goes to every attention block.

        Returns:
            The level's output, and the output of every block (what the other side takes as skips).
        """
        outputs = []
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
            x = self.resnet(name=f"resnets_{i}")(x, temb)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, *context)
            outputs.append(x)
        name = f"{self.direction}samplers_0"
        if self.resample == "resnet":
            outputs.append(x := self.resnet(name=name, resample=self.direction)(x, temb))
        elif self.resample == "conv":
            outputs.append(x := self.sampler(name=name)(x))
        return x, outputs


class Middle(nn.Module):
    """Residual block, attention (if any; with the context, if any), residual block, at the lowest resolution."""

    resnet: Any
    attention: Any

    @nn.compact
    def __call__(self, x: jax.Array, temb: jax.Array, *context: jax.Array) -> jax.Array:
        x = self.resnet(name="resnets_0")(x, temb)
        if self.attention is not None:
            x = self.attention(name="attentions_0")(x, *context)
        return self.resnet(name="resnets_1")(x, temb)
