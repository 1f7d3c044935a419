"""A small segmentation net that judges whether pictures follow the label maps that they were drawn for.

The shipped one is trained by ``tools/train_scenes_segmenter.py`` on other scenes than the base model; one for your own
pairs by ``python -m mcm_jax.evaluation.judges train`` (:mod:`.judges.train`).
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mcm_jax.evaluation import nets

ASSET = pathlib.Path(__file__).parents[1] / "assets" / "scenes-segmenter"
"""The shipped segmenter: ``model.safetensors`` (float16), ``config.json`` and ``training_log.jsonl``."""


class SegmentationNet(nn.Module):
    """A U-Net with GroupNorm: images ``[B, H, W, 3]`` in [-1, 1] to logits ``[B, H, W, classes]``.

    H and W must be multiples of ``2 ** (len(widths) - 1)``.

    Attributes:
      classes: number of classes.
      widths: channels at each resolution, finest first; multiples of ``groups``.
      groups: groups of each GroupNorm.
    """

    classes: int = 6
    widths: tuple[int, ...] = (16, 32, 64)
    groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        """Logits; or, for ``features``, mean and maximum over the coarsest level: ``[B, 2 * widths[-1]]``."""

        def block(x: jax.Array, width: int) -> jax.Array:
            for _ in range(2):
                x = nn.silu(nn.GroupNorm(self.groups)(nn.Conv(width, (3, 3), use_bias=False)(x)))
            return x

        skips = []
        for width in self.widths[:-1]:
            skips.append(block(x, width))
            b, h, w, c = skips[-1].shape
            # A reshape rather than a strided convolution, whose gradient is slow on CPUs.
            x = skips[-1].reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
        x = block(x, self.widths[-1])
        if features:
            return jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
        for skip in reversed(skips):
            x = nn.Conv(skip.shape[-1], (1, 1))(x)
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = block(jnp.concatenate([x, skip], -1), skip.shape[-1])
        return nn.Conv(self.classes, (1, 1))(x)


@functools.partial(jax.jit, static_argnums=0)
def _labels(net: SegmentationNet, params: Mapping, images: jax.Array) -> jax.Array:
    return net.apply({"params": params}, images).argmax(-1).astype(jnp.uint8 if net.classes <= 256 else jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _features(net: SegmentationNet, params: Mapping, images: jax.Array) -> jax.Array:
    return net.apply({"params": params}, images, features=True)


@dataclasses.dataclass(frozen=True)
class Segmenter:
    """A trained net with its weights.

    Attributes:
      net: the Flax module.
      params: its float32 weights.
      config: what ``config.json`` says: classes, sizes, held-out score, recipe.
      batch: pictures a call of the net; every call has this size, so that one compilation serves all.
    """

    net: SegmentationNet
    params: Mapping
    config: Mapping
    batch: int = 64

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""
        return tuple(self.config["classes"])

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Labels pictures.

        Args:
          images: float ``[B, H, W, 3]`` in [-1, 1], H and W as trained (32); B may be 0.

        Returns:
          uint8 ``[B, H, W]`` (int32 of more than 256 classes), indices into :attr:`classes`.

        Raises:
          ValueError: another shape or dtype, values outside [-1, 1] or not finite.
        """
        return nets.predict(functools.partial(_labels, self.net, self.params), images, self.config, self.batch)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Mean and maximum of the coarsest channels, float32 ``[B, D]``; takes and raises as :meth:`predict`."""
        return nets.predict(functools.partial(_features, self.net, self.params), images, self.config, self.batch)


def save_segmenter(path: str | os.PathLike, net: SegmentationNet, params: Mapping, config: Mapping) -> None:
    """Writes ``model.safetensors`` (float16) and ``config.json`` (``config`` and the net's sizes) into ``path``."""
    sizes = {"classes": net.classes, "widths": list(net.widths), "groups": net.groups}
    nets.save(path, params, {**config, "net": sizes})


def load_segmenter(path: str | os.PathLike = ASSET) -> Segmenter:
    """Loads a segmenter, by default the shipped one, with float32 weights; raises as :func:`.nets.load` does."""
    found = Segmenter(*nets.load(path, lambda n: SegmentationNet(n["classes"], tuple(n["widths"]), n["groups"])))
    names = found.config.get("classes")
    if not isinstance(names, list) or len(names) != found.net.classes:
        raise ValueError(f"{path}: classes of config.json are {names}, expected the names of {found.net.classes}")
    return found
