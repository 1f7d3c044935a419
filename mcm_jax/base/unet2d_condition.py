"""diffusers' ``UNet2DConditionModel`` in Flax Linen and NHWC: the network of Stable Diffusion 1.x and 2.x.

A U-Net whose attention blocks are transformers that also attend to a context, such as the embedding of a prompt.
Parameters have diffusers' names and layout (see :mod:`mcm_jax.base.blocks`). Written from the behaviour of diffusers
0.42 (`models/unets/unet_2d_condition.py`, `transformers/transformer_2d.py`, `attention.py`). In float32 the output
agrees with PyTorch's to 1e-5 of its scale (``tests/test_unet2d_condition.py``).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base import attention, blocks

# diffusers' name -> has transformers
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Options that hold one or few values here; diffusers knows more. What tells most about a config comes first.
_SUPPORTED: dict[str, tuple] = {
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "encoder_hid_dim": (None,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (0, 1),
    "act_fn": tuple(blocks.ACTIVATIONS),
}
_PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(blocks.Config):
    """The keys of a diffusers ``UNet2DConditionModel`` config, with its defaults; see that class for what each means.

    `attention_head_dim` is the number of heads, not their width: a misnomer that diffusers keeps for this class.

    Without effect are `dropout` (the network runs as at inference), `upcast_attention` (the softmax is in float32 in
    any case), `mid_block_only_cross_attention` and `addition_embed_type_num_heads` (they belong to blocks that are not
    supported).

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: None = None
    addition_time_embed_dim: None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False  # null in the files that diffusers' converter of checkpoints once wrote
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64

    def __post_init__(self) -> None:
        for key, supported in _SUPPORTED.items():
            self._expect(getattr(self, key) in supported, key, f"one of {', '.join(map(str, supported))}")
        super().__post_init__()
        levels = len(self.block_out_channels)
        self._expect(levels > 0, "block_out_channels", "at least one level")
        for key, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, key)
            self._expect(all(name in known for name in types), key, f"block types out of {', '.join(known)}")
            self._expect(len(types) == levels, key, f"{levels} block types, as many as block_out_channels")
        for key in _PER_LEVEL:
            values = self.per_level(key)
            fits = len(values) == levels and all(value > 0 for value in values)
            self._expect(fits, key, f"a positive number, or {levels} of them, as many as block_out_channels")
        fits = len(self.per_level("only_cross_attention")) == levels
        self._expect(fits, "only_cross_attention", f"true or false, or {levels} of them, as many as block_out_channels")
        groups, widths = self.norm_num_groups, self.block_out_channels
        fits = all(heads <= width for heads, width in zip(self.per_level("attention_head_dim"), widths, strict=True))
        self._expect(fits, "attention_head_dim", f"no more heads than channels in block_out_channels {widths}")
        divides = groups > 0 and all(width % groups == 0 for width in widths)
        self._expect(divides, "norm_num_groups", f"a divisor of each of block_out_channels {widths}")
        self._expect(self.cross_attention_dim > 0, "cross_attention_dim", "one positive number for all levels")

    def per_level(self, key: str) -> tuple:
        """The value of a key for each level, highest resolution first; a single value holds for all."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


class CrossAttention(nn.Module):
    """Attention from tokens to a context, without norm and residual connection.

    Attributes:
        heads: number of heads.
        head_dim: channels per head.
    """

    heads: int
    head_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """``[B, L, C]`` and ``[B, S, E]`` to ``[B, L, C]``."""
        return attention.multi_head(x, context, self.heads, self.head_dim, self.dtype, use_bias=False)


class GEGLU(nn.Module):
    """A dense layer gated by the (exact) GELU of another: ``[..., C]`` to ``[..., width]``."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h, gate = jnp.split(nn.Dense(2 * self.width, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return h * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """A gated layer of four times the width, and a dense one back: ``[..., C]`` to the same."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each after a norm and with its residual connection.

    Attributes:
        heads: number of heads.
        head_dim: channels per head.
        only_cross: the first attention is to the context as well.
    """

    heads: int
    head_dim: int
    only_cross: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """``[B, L, C]`` and ``[B, S, E]`` to ``[B, L, C]``."""
        attention = functools.partial(CrossAttention, self.heads, self.head_dim, self.dtype)
        norm = functools.partial(blocks.LayerNorm, dtype=self.dtype)
        h = norm(name="norm1")(x)
        x = x + attention(name="attn1")(h, context if self.only_cross else h)
        x = x + attention(name="attn2")(norm(name="norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer2D(nn.Module):
    """Transformer over the positions of a map, with its residual connection.

    Attributes:
        heads: number of heads, of ``C // heads`` channels each: where it does not divide C the inner width is smaller
            than C, as in diffusers.
        layers: number of transformer blocks.
        groups: groups of the norm.
        linear: project in and out by dense layers rather than 1x1 convolutions: a matter of the weights' shapes only.
        only_cross: see :class:`TransformerBlock`.
    """

    heads: int
    layers: int = 1
    groups: int = 32
    linear: bool = False
    only_cross: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """``[B, H, W, C]`` and ``[B, S, E]`` to ``[B, H, W, C]``."""
        batch, height, width, channels = x.shape
        head_dim = channels // self.heads
        project = nn.Dense if self.linear else functools.partial(nn.Conv, kernel_size=(1, 1))
        # Its epsilon is diffusers' own, whatever the config's norm_eps.
        h = blocks.GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
        h = project(self.heads * head_dim, dtype=self.dtype, name="proj_in")(h)
        h = h.reshape(batch, height * width, -1)
        for i in range(self.layers):
            block = TransformerBlock(self.heads, head_dim, self.only_cross, self.dtype, name=f"transformer_blocks_{i}")
            h = block(h, context)
        h = h.reshape(batch, height, width, -1)
        return x + project(channels, dtype=self.dtype, name="proj_out")(h)


class UNet2DCondition(nn.Module):
    """U-Net over latents with a timestep and a context.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms, softmax and time features are float32 in any case.
    """

    config: UNet2DConditionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        """Evaluates the network.

        Args:
            x: float32 ``[B, H, W, in_channels]``; any H and W, or with `downsample_padding` 0 such as can be halved
                ``levels - 1`` times.
            t: int32 ``[B]``, timesteps in 0..T-1.
            context: ``[B, S, cross_attention_dim]``, what to attend to; any S above 0.

        Returns:
            ``[B, H, W, out_channels]`` of x's dtype.

        Raises:
            ValueError: shapes that do not fit.
        """
        c, widths, dtype = self.config, self.config.block_out_channels, self.dtype
        levels = len(widths)
        least = 1 if c.downsample_padding else 2 ** (levels - 1)
        if x.ndim != 4 or x.shape[-1] != c.in_channels or min(x.shape[1:3]) < least:
            raise ValueError(f"x: found shape {x.shape}, expected [B, H, W, {c.in_channels}], H and W at least {least}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: found shape {t.shape}, expected {x.shape[:1]}, one timestep an example")
        if context.ndim != 3 or context.shape[::2] != (x.shape[0], c.cross_attention_dim) or not context.shape[1]:
            raise ValueError(
                f"context: found shape {context.shape}, expected [{x.shape[0]}, S, {c.cross_attention_dim}], S above 0"
            )
        resnet = functools.partial(
            blocks.ResnetBlock,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            act=c.act_fn,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
            dtype=dtype,
        )
        layers, only_cross = c.per_level("layers_per_block"), c.per_level("only_cross_attention")
        heads, depths = c.per_level("attention_head_dim"), c.per_level("transformer_layers_per_block")

        def transformer(level: int, only_cross: bool) -> Any:
            groups, linear = c.norm_num_groups, c.use_linear_projection
            return functools.partial(Transformer2D, heads[level], depths[level], groups, linear, only_cross, dtype)

        features = blocks.sinusoidal(t, widths[0], c.flip_sin_to_cos, c.freq_shift)
        width = c.time_embedding_dim or 4 * widths[0]
        temb = blocks.TimestepEmbedding(width, dtype, c.act_fn, name="time_embedding")(features)

        h = 2 * x - 1 if c.center_input_sample else x
        h = blocks.conv3x3(widths[0], dtype, "conv_in")(h)
        skips = [h]
        for i, (width, kind) in enumerate(zip(widths, c.down_block_types, strict=True)):
            h, outputs = blocks.Level(
                functools.partial(resnet, width),
                transformer(i, only_cross[i]) if _DOWN_BLOCKS[kind] else None,
                layers[i],
                "conv" if i < levels - 1 else None,
                "down",
                functools.partial(blocks.Downsample, width, c.downsample_padding, dtype),
                name=f"down_blocks_{i}",
            )(h, temb, context)
            skips += outputs

        if c.mid_block_type is not None:
            h = blocks.Middle(
                functools.partial(resnet, widths[-1], rescale=c.mid_block_scale_factor),
                transformer(-1, False),
                name="mid_block",
            )(h, temb, context)

        for i, kind in enumerate(c.up_block_types):
            level = levels - 1 - i
            taken = [skips.pop() for _ in range(layers[level] + 1)][::-1]
            # An odd size is halved with rounding: on the way up the next skip, not twice the size, is the measure.
            size = skips[-1].shape[1:3] if skips else None
            h, _ = blocks.Level(
                functools.partial(resnet, widths[level]),
                transformer(level, only_cross[level]) if _UP_BLOCKS[kind] else None,
                len(taken),
                "conv" if skips else None,
                "up",
                functools.partial(blocks.Upsample, widths[level], dtype, size),
                name=f"up_blocks_{i}",
            )(h, temb, context, skips=taken)

        h = blocks.GroupNorm(c.norm_num_groups, c.norm_eps, dtype, name="conv_norm_out")(h)
        return blocks.conv3x3(c.out_channels, dtype, "conv_out")(blocks.ACTIVATIONS[c.act_fn](h)).astype(x.dtype)
