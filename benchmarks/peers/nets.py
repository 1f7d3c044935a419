"""The peers' own networks, with diffusers' names of their parameters; they compute in the dtype of the base's U-Net."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base.blocks import conv3x3
from mcm_jax.mcm import ConditionEncoder

_HINT = (16, 32, 96, 256)  # of ControlNet, at the pictures' resolution, halved once between each two
MOST_HALVINGS = len(_HINT) - 1


class Seen(nn.Module):
    """Conditions as further channels of the base's first convolution, which ignores them at first.

    The strided convolutions before it, for a latent base, are those of the MCM (:class:`ConditionEncoder`).

    Attributes:
      width: of the base's first convolution.
      halvings: from the conditions' grid to the latents'.
      dtype: of the computation.
      encoder_width: of the strided convolutions.
    """

    width: int
    halvings: int
    dtype: Any = jnp.float32
    encoder_width: int = 16

    @nn.compact
    def __call__(self, conditions: jax.Array) -> jax.Array:
        """``[B, H, W, D]`` to ``[B, H / 2^halvings, W / 2^halvings, width]``."""
        h = ConditionEncoder(self.encoder_width, self.halvings, self.dtype, name="encoder")(conditions)
        return conv3x3(self.width, self.dtype, "conv_in", kernel_init=nn.initializers.zeros, use_bias=False)(h)


class Hint(nn.Module):
    """ControlNet's embedding of the conditions (diffusers' ``ControlNetConditioningEmbedding``); zero at first.

    Attributes:
      width: of the result.
      halvings: from the conditions' grid to the latents', at most :data:`MOST_HALVINGS`.
      dtype: of the computation.
    """

    width: int
    halvings: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, conditions: jax.Array) -> jax.Array:
        """``[B, H, W, D]`` to ``[B, H / 2^halvings, W / 2^halvings, width]``."""
        widths, dtype = _HINT[: self.halvings + 1], self.dtype
        h = nn.silu(conv3x3(widths[0], dtype, "conv_in")(conditions))
        for i, (width, wider) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            h = nn.silu(conv3x3(width, dtype, f"blocks_{2 * i}")(h))
            h = nn.silu(nn.Conv(wider, (3, 3), strides=2, padding=1, dtype=dtype, name=f"blocks_{2 * i + 1}")(h))
        return conv3x3(self.width, dtype, "conv_out", kernel_init=nn.initializers.zeros)(h)


class Adapter(nn.Module):
    """T2I-Adapter (diffusers' ``T2IAdapter`` of the type ``full_adapter``): sees the conditions alone, not x_t, not t.

    Attributes:
      widths: of the base's levels.
      factor: from the conditions' grid to the latents'.
      dtype: of the computation.
      blocks: residual blocks a level.
    """

    widths: tuple[int, ...]
    factor: int
    dtype: Any = jnp.float32
    blocks: int = 2

    @nn.compact
    def __call__(self, conditions: jax.Array) -> list[jax.Array]:
        """``[B, H, W, D]`` to features of each level, the finest first."""
        batch, height, width, channels = conditions.shape
        f, dtype = self.factor, self.dtype
        h = conditions.reshape(batch, height // f, f, width // f, f, channels).transpose(0, 1, 3, 5, 2, 4)
        h = h.reshape(batch, height // f, width // f, channels * f * f)
        h = conv3x3(self.widths[0], dtype, "conv_in")(h)
        features = []
        for i, wanted in enumerate(self.widths):
            if i:
                h = nn.avg_pool(h, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
            if h.shape[-1] != wanted:
                h = nn.Conv(wanted, (1, 1), dtype=dtype, name=f"body_{i}_in_conv")(h)
            for j in range(self.blocks):
                inner = nn.relu(conv3x3(wanted, dtype, f"body_{i}_resnets_{j}_block1")(h))
                h = h + nn.Conv(wanted, (1, 1), dtype=dtype, name=f"body_{i}_resnets_{j}_block2")(inner)
            features.append(h)
        return features


def zero_convolution(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """A 1x1 convolution, whose parameters begin as zeros."""
    return x @ params["kernel"][0, 0].astype(x.dtype) + params["bias"].astype(x.dtype).reshape(1, 1, 1, -1)
