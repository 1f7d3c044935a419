"""diffusers' ``AutoencoderKL`` and ``VQModel`` in Flax Linen and NHWC: between images and latents.

Parameters have diffusers' names and layout (see :mod:`mcm_jax.base.blocks`). Written from the behaviour of diffusers
0.42 (`models/autoencoders/vae.py`, `autoencoder_kl.py`, `vq_model.py`); in float32 the outputs agree with PyTorch's to
1e-5 of their scale (``tests/test_autoencoders.py``).

Latents come and go here as the network itself has them. The scale and shift between these and what is diffused are in
the configs (`scaling_factor`, `shift_factor`) and are applied by whoever calls.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base import blocks

_DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}  # diffusers' name -> has attention
_UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_EPS = 1e-6  # of every norm; no config says otherwise


@dataclasses.dataclass(frozen=True)
class _Config(blocks.Config):
    """What both autoencoders' configs have in common."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            self._expect(getattr(self, key) > 0, key, "a whole number above 0")
        widths = self.block_out_channels
        self._expect(min(widths, default=0) > 0, "block_out_channels", "whole numbers above 0, one for each level")
        for key, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, key)
            self._expect(all(name in known for name in types), key, f"block types out of {', '.join(known)}")
            self._expect(len(types) == len(widths), key, f"{len(widths)} block types, as many as block_out_channels")
        divides = all(width % self.norm_num_groups == 0 for width in widths)
        self._expect(divides, "norm_num_groups", f"a divisor of each of block_out_channels {widths}")
        self._expect(self.act_fn in blocks.ACTIVATIONS, "act_fn", f"one of {', '.join(blocks.ACTIVATIONS)}")
        self._expect(self.scaling_factor != 0, "scaling_factor", "a number other than 0")

    @property
    def factor(self) -> int:
        """Pixels to a latent's position, along each side: 2 to the number of levels less one."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(_Config):
    """The keys of a diffusers ``AutoencoderKL`` config, with its defaults; see that class for what each means.

    What is diffused is ``(latent - shift_factor) * scaling_factor``; a `shift_factor` of None is 0. `sample_size` and
    `force_upcast` are read and have no effect: there is no tiling, and the precision is the module's `dtype`.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    shift_factor: float | None = None
    # Stable Diffusion's autoencoders have none; a pipeline that uses them normalises channel by channel.
    latents_mean: None = None
    latents_std: None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def depth(self) -> int:
        """Channels of a latent."""
        return self.latent_channels


@dataclasses.dataclass(frozen=True)
class VQConfig(_Config):
    """The keys of a diffusers ``VQModel`` config, with its defaults; see that class for what each means.

    What is diffused is ``latent * scaling_factor``. Beware: a config without that key gets diffusers' default here,
    0.18215, and so does its ``LDMPipeline``; but CompVis/ldm-celebahq-256 is older than the key, and was trained on
    latents as they are, a factor of 1 (https://github.com/huggingface/diffusers/issues/6725), which :mod:`.loading`
    gives it. Saved anew by diffusers it has the key, with 0.18215: of that the loader warns.

    `sample_size` and `force_upcast` are read and have no effect.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(self.num_vq_embeddings > 0, "num_vq_embeddings", "a whole number above 0")
        fits = self.vq_embed_dim is None or self.vq_embed_dim > 0
        self._expect(fits, "vq_embed_dim", "a whole number above 0, or null")
        self._expect(self.norm_type == "group", "norm_type", "group")
        # Latents are then indices into the codebook, which no diffusion over real numbers makes.
        self._expect(not self.lookup_from_codebook, "lookup_from_codebook", "false")

    @property
    def shift_factor(self) -> None:
        """None: a ``VQModel`` knows no shift."""
        return None

    @property
    def depth(self) -> int:
        """Channels of a latent, as many as a codebook entry has."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim


def _parts(config: _Config, dtype: Any) -> tuple[Any, Any, Any]:
    """Makers, of a width, of what encoder and decoder consist of: residual block, attention of one head, middle."""

    def resnet(width: int) -> Any:
        act, groups = config.act_fn, config.norm_num_groups
        return functools.partial(blocks.ResnetBlock, width, groups=groups, eps=_EPS, act=act, dtype=dtype)

    def attention(width: int) -> Any:
        return functools.partial(blocks.Attention, width, config.norm_num_groups, _EPS, dtype=dtype)

    def middle(width: int) -> Any:
        return blocks.Middle(
            resnet(width), attention(width) if config.mid_block_add_attention else None, name="mid_block"
        )

    return resnet, attention, middle


class _Encoder(nn.Module):
    """``[B, H, W, C]`` to ``[B, H/factor, W/factor, channels]``."""

    config: _Config
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, widths, dtype = self.config, self.config.block_out_channels, self.dtype
        resnet, attention, middle = _parts(c, dtype)
        x = blocks.conv3x3(widths[0], dtype, "conv_in")(x)
        for i, (width, kind) in enumerate(zip(widths, c.down_block_types, strict=True)):
            x, _ = blocks.Level(
                resnet(width),
                attention(width) if _DOWN_BLOCKS[kind] else None,
                c.layers_per_block,
                "conv" if i < len(widths) - 1 else None,
                "down",
                functools.partial(blocks.Downsample, width, 0, dtype),
                name=f"down_blocks_{i}",
            )(x, None)
        x = middle(widths[-1])(x, None)
        # SiLU whatever `act_fn` is, as in diffusers.
        x = jax.nn.silu(blocks.GroupNorm(c.norm_num_groups, _EPS, dtype, name="conv_norm_out")(x))
        return blocks.conv3x3(self.channels, dtype, "conv_out")(x)


class _Decoder(nn.Module):
    """``[B, h, w, C]`` to ``[B, h*factor, w*factor, out_channels]``."""

    config: _Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, widths, dtype = self.config, self.config.block_out_channels, self.dtype
        resnet, attention, middle = _parts(c, dtype)
        x = blocks.conv3x3(widths[-1], dtype, "conv_in")(x)
        x = middle(widths[-1])(x, None)
        for i, (width, kind) in enumerate(zip(widths[::-1], c.up_block_types, strict=True)):
            x, _ = blocks.Level(
                resnet(width),
                attention(width) if _UP_BLOCKS[kind] else None,
                c.layers_per_block + 1,
                "conv" if i < len(widths) - 1 else None,
                "up",
                functools.partial(blocks.Upsample, width, dtype),
                name=f"up_blocks_{i}",
            )(x, None)
        x = jax.nn.silu(blocks.GroupNorm(c.norm_num_groups, _EPS, dtype, name="conv_norm_out")(x))
        return blocks.conv3x3(c.out_channels, dtype, "conv_out")(x)


def _check_image(config: _Config, x: jax.Array) -> None:
    channels, factor = config.in_channels, config.factor
    if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"x: found shape {x.shape}, expected [B, H, W, {channels}], H and W multiples of {factor}")


def _check_latent(z: jax.Array, depth: int) -> None:
    if z.ndim != 4 or z.shape[-1] != depth:
        raise ValueError(f"latent: found shape {z.shape}, expected [B, h, w, {depth}]")


class AutoencoderKL(nn.Module):
    """The variational autoencoder of Stable Diffusion: an image is a Gaussian over latents.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms and softmax are float32 in any case.
    """

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.encoder = _Encoder(c, 2 * c.latent_channels, self.dtype)
        self.decoder = _Decoder(c, self.dtype)
        if c.use_quant_conv:
            self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        if c.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The image decoded from the mean of its latents: uses every parameter, so it is what `init` goes through."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The distribution of an image's latents, unscaled.

        Args:
            x: ``[B, H, W, in_channels]``, images in [-1, 1]; H and W are multiples of ``config.factor``.

        Returns:
            Mean and logarithm of the variance, in -30..20, each ``[B, H/factor, W/factor, latent_channels]`` of x's
            dtype.

        Raises:
            ValueError: a shape that does not fit.
        """
        _check_image(self.config, x)
        h = self.encoder(x)
        h = self.quant_conv(h) if self.config.use_quant_conv else h
        mean, logvar = jnp.split(h.astype(x.dtype), 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    def decode(self, z: jax.Array) -> jax.Array:
        """The image of a latent.

        Args:
            z: ``[B, h, w, latent_channels]``, unscaled.

        Returns:
            ``[B, h*factor, w*factor, out_channels]`` of z's dtype, about in [-1, 1] and not clipped.

        Raises:
            ValueError: a shape that does not fit.
        """
        _check_latent(z, self.config.depth)
        h = self.post_quant_conv(z) if self.config.use_post_quant_conv else z
        return self.decoder(h).astype(z.dtype)


class _Codebook(nn.Module):
    """Replaces each latent by the nearest entry (Euclidean) of a codebook; of several at one distance, the first."""

    entries: int
    depth: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """``[B, h, w, depth]`` to the same, float32; its gradient is passed on as if nothing had been replaced."""
        codebook = jnp.asarray(nn.Embed(self.entries, self.depth, name="embedding").embedding, jnp.float32)
        h = h.astype(jnp.float32)

        def nearest(latents: jax.Array) -> jax.Array:
            # Differences, not |h|^2 - 2 h e + |e|^2: that loses the digits that tell near entries apart.
            squares = jnp.square(latents[..., None, :] - codebook[None, None])
            return codebook[jnp.argmin(squares.sum(axis=-1), axis=-1)]

        # Row by row of the map: the distances of 64x64 latents to 8192 entries would be 134 MB an image.
        rows = jax.lax.map(nearest, jax.lax.stop_gradient(h).swapaxes(0, 1))
        return h + jax.lax.stop_gradient(rows.swapaxes(0, 1) - h)


class VQModel(nn.Module):
    """The autoencoder of unconditional latent diffusion, with a codebook between encoder and decoder.

    diffusers' ``LDMPipeline`` diffuses what :meth:`encode` gives, so before the codebook, times `scaling_factor`; at
    the end it divides by that factor and decodes with the codebook.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms, softmax and the search in the codebook are float32 in any case.
    """

    config: VQConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.encoder = _Encoder(c, c.latent_channels, self.dtype)
        self.quant_conv = nn.Conv(c.depth, (1, 1), dtype=self.dtype)
        self.quantize = _Codebook(c.num_vq_embeddings, c.depth)
        self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)
        self.decoder = _Decoder(c, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The image decoded from its own latents: uses every parameter, so it is what `init` goes through."""
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        """An image's latents, before the codebook (diffusers' ``VQModel.encode(x).latents``) and unscaled.

        Args:
            x: ``[B, H, W, in_channels]``, images in [-1, 1]; H and W are multiples of ``config.factor``.

        Returns:
            ``[B, H/factor, W/factor, config.depth]`` of x's dtype.

        Raises:
            ValueError: a shape that does not fit.
        """
        _check_image(self.config, x)
        return self.quant_conv(self.encoder(x)).astype(x.dtype)

    def decode(self, h: jax.Array, quantize: bool = True) -> jax.Array:
        """The image of a latent.

        Args:
            h: ``[B, h, w, config.depth]``, unscaled.
            quantize: replace each latent by the nearest codebook entry first, as diffusers does by default. The
                gradient with respect to `h` is then that at the entries (straight through).

        Returns:
            ``[B, h*factor, w*factor, out_channels]`` of h's dtype, about in [-1, 1] and not clipped.

        Raises:
            ValueError: a shape that does not fit.
        """
        _check_latent(h, self.config.depth)
        quantized = self.quantize(h) if quantize else h
        return self.decoder(self.post_quant_conv(quantized)).astype(h.dtype)
