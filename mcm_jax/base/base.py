"""A loaded base: the frozen networks of a diffusion model behind one interface, whatever kind of model it is.

What is diffused is an image, or the latent of an autoencoder; what the U-Net sees beside it is nothing, or the context
that a text encoder makes of a prompt. :mod:`mcm_jax.base.loading` makes a base from a folder.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax import sharding
from mcm_jax.base.autoencoders import AutoencoderKL, VQModel
from mcm_jax.base.clip import CLIPText
from mcm_jax.base.tokenizer import Tokenizer
from mcm_jax.base.unet2d import UNet2D
from mcm_jax.base.unet2d_condition import UNet2DCondition
from mcm_jax.errors import UserError
from mcm_jax.predictions import to_eps
from mcm_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class BaseCard:
    """What training needs to know of a base whose predictions are at hand: its networks are no part of it.

    Attributes:
        name: the folder's name.
        fingerprint: see :class:`Base`.
        schedule: the noise schedule that the network was trained with.
        latent_shape: ``(H, W, C)`` of what is diffused.
        image_shape: ``(H, W, C)`` of the images.
        is_text_conditional: whether it takes prompts.
        unet_parameters: how many the predicting network has.
        parameter_bytes: memory of the parameters of all networks.
    """

    name: str
    fingerprint: str
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    is_text_conditional: bool
    unet_parameters: int
    parameter_bytes: int

    @property
    def is_of_pixels(self) -> bool:
        """Whether the grid that is diffused is the pictures'."""
        return self.latent_shape[:2] == self.image_shape[:2]

    def to_json(self) -> dict[str, Any]:
        """As numbers, texts and lists; float32 values come back exactly."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        schedule = {f.name: getattr(self.schedule, f.name) for f in dataclasses.fields(Schedule)}
        schedule["alphas_cumprod"] = [float(a) for a in self.schedule.alphas_cumprod]
        shapes = {"latent_shape": list(self.latent_shape), "image_shape": list(self.image_shape)}
        return fields | shapes | {"schedule": schedule}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BaseCard":
        """What :meth:`to_json` gave. Raises KeyError, TypeError or ValueError where it is something else."""
        schedule = content["schedule"] | {"alphas_cumprod": np.array(content["schedule"]["alphas_cumprod"], np.float32)}
        shapes = {key: tuple(map(int, content[key])) for key in ("latent_shape", "image_shape")}
        return cls(**content | shapes | {"schedule": Schedule(**schedule)})


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen diffusion model. Its methods take its params as an argument.

    All are pure and work under ``jit`` and ``grad``, but for :meth:`tokenize` and :meth:`embed_text`, which read text.
    Where :attr:`params` are split over devices (:func:`mcm_jax.sharding.place`), those given to a method are, too: they
    are made whole as they are used, and each device works on its own rows of the batch.

    Attributes:
        name: the folder's name.
        params: pytree of the networks' parameters, one entry per component: ``unet``, and ``vae`` or ``vqvae``, and
            ``text_encoder``, as far as the base has them. In the asked-for dtype.
        unet: the network that predicts.
        schedule: the noise schedule that the network was trained with.
        latent_shape: ``(H, W, C)`` of what is diffused; a pixel base's is the image's.
        image_shape: ``(H, W, C)`` of the images.
        fingerprint: SHA-256, as hex, of all that decides the values that the methods return: configs, parameters,
            vocabulary, dtype. It does not depend on where the folder lies or on how its files are laid out.
        autoencoder: between images and latents; None for a base that works on pixels.
        text_encoder: from tokens to context; None for an unconditional base.
        tokenizer: from prompts to tokens; None for an unconditional base.
    """

    name: str
    params: Any
    unet: UNet2D | UNet2DCondition
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    fingerprint: str
    autoencoder: AutoencoderKL | VQModel | None = None
    text_encoder: CLIPText | None = None
    tokenizer: Tokenizer | None = None

    @property
    def card(self) -> BaseCard:
        """What is known of it without its networks."""
        return BaseCard(
            name=self.name,
            fingerprint=self.fingerprint,
            schedule=self.schedule,
            latent_shape=self.latent_shape,
            image_shape=self.image_shape,
            is_text_conditional=self.is_text_conditional,
            unet_parameters=sum(leaf.size for leaf in jax.tree.leaves(self.params["unet"])),
            parameter_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params)),
        )

    @property
    def is_latent(self) -> bool:
        """Whether latents of an autoencoder are diffused, rather than pixels."""
        return self.autoencoder is not None

    @property
    def is_of_pixels(self) -> bool:
        """See :class:`BaseCard`."""
        return self.latent_shape[:2] == self.image_shape[:2]

    @property
    def is_text_conditional(self) -> bool:
        """Whether :meth:`predict` needs a context."""
        return self.text_encoder is not None

    @property
    def dtype(self) -> str:
        """Name of what the networks compute in."""
        return jnp.dtype(self.unet.dtype).name

    def cast(self, dtype: str) -> "Base":
        """The same base computing in another dtype, its params rounded to it.

        The fingerprint stays that of what was loaded: an MCM of that base is at home here, too.

        Args:
            dtype: ``float32``, ``bfloat16``, ``float16``.
        """
        names = [name for name in ("unet", "autoencoder", "text_encoder") if getattr(self, name)]
        nets = {name: getattr(self, name).clone(dtype=jnp.dtype(dtype)) for name in names}
        return dataclasses.replace(self, params=jax.tree.map(lambda p: p.astype(dtype), self.params), **nets)

    @property
    def factor(self) -> int:
        """How many pixels one of a latent stands for, along each axis; 1 for a base that works on pixels."""
        return self.autoencoder.config.factor if self.is_latent else 1

    @property
    def multiple(self) -> int:
        """Height and width of pictures are multiples of this: what the U-Net halves, times :attr:`factor`."""
        return self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def sized(self, height: int = 0, width: int = 0, multiple: int = 1) -> "Base":
        """The same base for pictures of another size, in pixels; 0 is its own.

        Args:
            height: of pictures.
            width: of pictures.
            multiple: what else both must be a multiple of.

        Raises:
            UserError: the networks do not take such a size; names the nearest that they take.
        """
        multiple, shape = math.lcm(multiple, self.multiple), []
        for key, size, own in zip(("height", "width"), (height, width), self.image_shape, strict=False):
            nearest = max(round(size / multiple), 1) * multiple
            if size < 0 or size % multiple:
                known = f"a multiple of {multiple} for the base {self.name!r}, such as {nearest}, or 0 (its own {own})"
                raise UserError(f"{key} must be {known}, got {size}")
            shape.append(size or own)
        if tuple(shape) == self.image_shape[:2]:
            return self
        latent = tuple(size // self.factor for size in shape)
        return dataclasses.replace(
            self, image_shape=(*shape, self.image_shape[2]), latent_shape=(*latent, self.latent_shape[2])
        )

    def predict(
        self,
        params: Any,
        x_t: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        level: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Predicts the noise in x_t, whatever the network's own parameterisation.

        Args:
            params: :attr:`params`, or a pytree like it.
            x_t: float32 ``[B, H, W, C]``, noisy latents; H and W need not be those of :attr:`latent_shape`.
            t: int32 ``[B]``, timesteps in 0..T-1; with a level float32, too.
            context: ``[B, L, D]``, from :meth:`embed_text`; None for an unconditional base.
            level: alpha and sigma of x_t, float32 ``[B]``, where a sampler knows them better than t does, as between
                two timesteps; None are the schedule's at t.

        Returns:
            float32 ``[B, H, W, C]``, eps.

        Raises:
            ValueError: a context is missing, or given to an unconditional base, or the shapes do not fit.
        """
        if context is None and self.is_text_conditional:
            raise ValueError(f"context: base {self.name!r} is text-conditional, expected [B, L, D] from embed_text")
        if context is not None and not self.is_text_conditional:
            raise ValueError(f"context: base {self.name!r} is unconditional and takes none")
        contexts = () if context is None else (context,)
        prediction = self._apply(self.unet, params["unet"], x_t, t, *contexts).astype(jnp.float32)
        alpha, sigma = level or (self.schedule.alpha(t), self.schedule.sigma(t))
        return to_eps(prediction, x_t, alpha, sigma, self.schedule.prediction_type)

    def encode(self, params: Any, image: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Image to what is diffused.

        Args:
            params: :attr:`params`, or a pytree like it.
            image: ``[B, H, W, 3]`` in [-1, 1]; H and W are multiples of the autoencoder's factor.
            rng: draws from the posterior of an ``AutoencoderKL``, rather than taking its mean. Without effect on
                others.

        Returns:
            The image itself, for a base that works on pixels; else float32 ``[B, h, w, C]``, latents scaled as the
            U-Net knows them (of a ``VQModel``, before the codebook).
        """
        if not self.is_latent:
            return image
        latent = self._apply_autoencoder(params, image.astype(jnp.float32), "encode")
        if isinstance(self.autoencoder, AutoencoderKL):
            latent, logvar = latent
            if rng is not None:
                latent = latent + jnp.exp(0.5 * logvar) * jax.random.normal(rng, latent.shape, latent.dtype)
        config = self.autoencoder.config
        return (latent - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """What is diffused to image.

        Args:
            params: :attr:`params`, or a pytree like it.
            latent: float32 ``[B, h, w, C]``.

        Returns:
            ``[B, H, W, 3]``, about in [-1, 1] and not clipped: the latent itself, for a base that works on pixels.
        """
        if not self.is_latent:
            return latent
        config = self.autoencoder.config
        latent = latent.astype(jnp.float32) / config.scaling_factor + (config.shift_factor or 0.0)
        return self._apply_autoencoder(params, latent, "decode")

    def tokenize(self, prompts: Sequence[str], cut: dict[str, str] | None = None) -> np.ndarray:
        """Tokens of prompts, int32 ``[B, L]``: the end of a prompt that is too long is cut off, with a warning.

        Args:
            prompts: the texts.
            cut: receives what there is to say about each prompt that is cut, by prompt, in place of the warning.

        Raises:
            ValueError: `prompts` is no sequence of texts, or the base is unconditional.
        """
        self._expect_text_encoder()
        return self.tokenizer(prompts, cut)

    def encode_tokens(self, params: Any, ids: jax.Array) -> jax.Array:
        """Tokens, int32 ``[B, L]``, to context, float32 ``[B, L, D]``.

        Raises:
            ValueError: the base is unconditional.
        """
        self._expect_text_encoder()
        return self._apply(self.text_encoder, params["text_encoder"], ids).astype(jnp.float32)

    def embed_text(self, params: Any, prompts: Sequence[str], cut: dict[str, str] | None = None) -> jax.Array:
        """Prompts to context, float32 ``[B, L, D]``: :meth:`tokenize`, then :meth:`encode_tokens` compiled.

        The context is whole on each device that the params are on, so that each process can read it.

        Args:
            params: :attr:`params`, or a pytree like it.
            prompts: the texts.
            cut: as in :meth:`tokenize`.

        Raises:
            ValueError: as :meth:`tokenize`.
        """
        return self._encode_tokens(params, self.tokenize(prompts, cut))

    @functools.cached_property
    def _encode_tokens(self) -> Any:
        return jax.jit(lambda params, ids: sharding.keep_whole(self.encode_tokens(params, ids), self._mesh))

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh | None:
        return sharding.mesh_of(self.params)

    def _expect_text_encoder(self) -> None:
        if not self.is_text_conditional:
            raise ValueError(f"prompts: base {self.name!r} is unconditional, it has no text encoder")

    def _apply_autoencoder(self, params: Any, x: jax.Array, method: str) -> Any:
        entry = "vae" if "vae" in params else "vqvae"
        return self._apply(self.autoencoder, params[entry], x, method=method)

    def _apply(self, net: Any, params: Any, x: jax.Array, *rest: jax.Array, **options: Any) -> Any:
        params, x = sharding.gather(params, x, self._mesh)
        return sharding.keep_split(net.apply({"params": params}, x, *rest, **options), self._mesh)
