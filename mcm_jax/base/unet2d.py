"""diffusers' ``UNet2DModel`` in Flax Linen and NHWC: the network of the unconditional bases, and of MCM itself.

Parameters have diffusers' names and layout (see :mod:`mcm_jax.base.blocks`). In float32 the output agrees with
PyTorch's to 1e-5 of its scale (``tests/test_unet2d.py``).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base import blocks

# diffusers' name -> (has attention, how it resamples: the config's choice, a residual block, or a convolution)
_DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, "config"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, "config"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
# Options that hold one or few values here; diffusers knows more.
_SUPPORTED: dict[str, tuple] = {
    "time_embedding_type": ("positional", "fourier"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(blocks.ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(blocks.Config):
    """The keys of a diffusers ``UNet2DModel`` config, with its defaults; see that class for what each means.

    `dropout` and `num_train_timesteps` are read and have no effect: the network runs as at inference.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        for key, supported in _SUPPORTED.items():
            self._expect(getattr(self, key) in supported, key, f"one of {', '.join(map(str, supported))}")
        super().__post_init__()
        levels = len(self.block_out_channels)
        for key, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, key)
            self._expect(all(name in known for name in types), key, f"block types out of {', '.join(known)}")
            self._expect(len(types) == levels, key, f"{levels} block types, as many as block_out_channels")
        self._expect(levels > 0, "block_out_channels", "at least one level")
        for key in ("norm_num_groups", "attn_norm_num_groups"):
            groups = getattr(self, key)
            if groups is None and key == "attn_norm_num_groups":
                continue
            widths = self.block_out_channels if key == "norm_num_groups" else self.block_out_channels[-1:]
            divides = groups > 0 and all(width % groups == 0 for width in widths)
            self._expect(divides, key, f"a divisor of each of block_out_channels {widths}")
        head_dim = self.attention_head_dim
        fits = head_dim is None or 0 < head_dim <= min(self._attention_widths, default=head_dim)
        self._expect(fits, "attention_head_dim", f"null or 1..{min(self._attention_widths, default=0)}")

    @property
    def _attention_widths(self) -> list[int]:
        """Channels wherever there is attention."""
        down = [w for w, b in zip(self.block_out_channels, self.down_block_types, strict=True) if _DOWN_BLOCKS[b][0]]
        up = [w for w, b in zip(self.block_out_channels[::-1], self.up_block_types, strict=True) if _UP_BLOCKS[b][0]]
        return down + up + [self.block_out_channels[-1]] * bool(self.mid_block_type and self.add_attention)


class UNet2D(nn.Module):
    """U-Net over images or latents with a timestep.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms, softmax and time features are float32 in any case.
        zero_init_output: initialise the last convolution with zeros, so that a fresh network's output is 0.
        remat: recompute residual and attention blocks in the backward pass rather than keep their activations.
    """

    config: UNet2DConfig
    dtype: Any = jnp.float32
    zero_init_output: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Evaluates the network.

        Args:
            x: float32 ``[B, H, W, in_channels]``; H and W are multiples of ``2 ** (levels - 1)``.
            t: int32 ``[B]``, timesteps in 0..T-1 (with `fourier` time embedding, above 0).

        Returns:
            ``[B, H, W, out_channels]`` of x's dtype.

        Raises:
            ValueError: shapes that do not fit.
        """
        c, widths, dtype = self.config, self.config.block_out_channels, self.dtype
        factor = 2 ** (len(widths) - 1)
        if x.ndim != 4 or x.shape[-1] != c.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"x: found shape {x.shape}, expected [B, H, W, {c.in_channels}], H and W multiples of {factor}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: found shape {t.shape}, expected {x.shape[:1]}, one timestep an example")
        resnet_class = nn.remat(blocks.ResnetBlock) if self.remat else blocks.ResnetBlock
        attention_class = nn.remat(blocks.Attention) if self.remat else blocks.Attention
        resnet = functools.partial(
            resnet_class,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            act=c.act_fn,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
            dtype=dtype,
        )

        def attention(width: int, groups: int | None = c.norm_num_groups, rescale: float = 1.0) -> Any:
            head_dim = width if c.attention_head_dim is None else c.attention_head_dim
            return functools.partial(attention_class, head_dim, groups, c.norm_eps, rescale, dtype)

        if c.time_embedding_type == "fourier":
            features = blocks.FourierFeatures(widths[0], name="time_proj")(t)
        else:
            features = blocks.sinusoidal(t, widths[0], c.flip_sin_to_cos, c.freq_shift)
        temb = blocks.TimestepEmbedding(c.time_embedding_dim or 4 * widths[0], dtype, name="time_embedding")(features)

        h = 2 * x - 1 if c.center_input_sample else x
        h = blocks.conv3x3(widths[0], dtype, "conv_in")(h)
        skips = [h]
        for i, (width, kind) in enumerate(zip(widths, c.down_block_types, strict=True)):
            attends, resample = _DOWN_BLOCKS[kind]
            resample = c.downsample_type if resample == "config" else resample
            h, outputs = blocks.Level(
                functools.partial(resnet, width),
                attention(width) if attends else None,
                c.layers_per_block,
                resample if i < len(widths) - 1 else None,
                "down",
                functools.partial(blocks.Downsample, width, c.downsample_padding, dtype),
                name=f"down_blocks_{i}",
            )(h, temb)
            skips += outputs

        if c.mid_block_type is not None:
            # A quirk of diffusers: with scale_shift the middle attention has no norm unless it gets its own groups.
            groups = c.norm_num_groups if c.resnet_time_scale_shift == "default" else None
            groups = groups if c.attn_norm_num_groups is None else c.attn_norm_num_groups
            scale = c.mid_block_scale_factor
            h = blocks.Middle(
                functools.partial(resnet, widths[-1], rescale=scale),
                attention(widths[-1], groups, scale) if c.add_attention else None,
                name="mid_block",
            )(h, temb)

        for i, (width, kind) in enumerate(zip(widths[::-1], c.up_block_types, strict=True)):
            attends, resample = _UP_BLOCKS[kind]
            resample = c.upsample_type if resample == "config" else resample
            layers = c.layers_per_block + 1
            h, _ = blocks.Level(
                functools.partial(resnet, width),
                attention(width) if attends else None,
                layers,
                resample if i < len(widths) - 1 else None,
                "up",
                functools.partial(blocks.Upsample, width, dtype),
                name=f"up_blocks_{i}",
            )(h, temb, skips=skips[-layers:])
            del skips[-layers:]

        h = jax.nn.silu(blocks.GroupNorm(c.norm_num_groups, c.norm_eps, dtype, name="conv_norm_out")(h))
        init = {"kernel_init": nn.initializers.zeros} if self.zero_init_output else {}
        h = blocks.conv3x3(c.out_channels, dtype, "conv_out", **init)(h).astype(x.dtype)
        if c.time_embedding_type == "fourier":
            h = h / t.astype(x.dtype)[:, None, None, None]
        return h
