"""A small segmentation net that judges whether generated scenes follow their label maps.

Trained by ``tools/train_scenes_segmenter.py`` on other scenes than the base model, and shipped with the package.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import numpy as safetensors

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
    def __call__(self, x: jax.Array) -> jax.Array:
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
        for skip in reversed(skips):
            x = nn.Conv(skip.shape[-1], (1, 1))(x)
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = block(jnp.concatenate([x, skip], -1), skip.shape[-1])
        return nn.Conv(self.classes, (1, 1))(x)


@functools.partial(jax.jit, static_argnums=0)
def _labels(net: SegmentationNet, params: Mapping, images: jax.Array) -> jax.Array:
    return net.apply({"params": params}, images).argmax(-1).astype(jnp.uint8)


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
          uint8 ``[B, H, W]``, indices into :attr:`classes`.

        Raises:
          ValueError: another shape or dtype, values outside [-1, 1] or not finite.
        """
        images = np.asarray(images)
        expected = (self.config["height"], self.config["width"], 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"this segmenter was trained on images [B, {expected[0]}, {expected[1]}, 3], got {list(images.shape)}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        images = images.astype(np.float32)
        if not (np.abs(images) <= 1 + 1e-3).all():  # also false for NaN
            raise ValueError(f"images must lie in [-1, 1], got {images.min()} to {images.max()}; clip samples first")
        labels = np.empty(images.shape[:3], np.uint8)
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = np.zeros((self.batch, *expected), np.float32)
            padded[: len(part)] = part
            labels[start : start + self.batch] = np.asarray(_labels(self.net, self.params, padded))[: len(part)]
        return labels


def save_segmenter(path: str | os.PathLike, net: SegmentationNet, params: Mapping, config: Mapping) -> None:
    """Writes ``model.safetensors`` (float16) and ``config.json`` (``config`` and the net's sizes) into ``path``."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    weights = safetensors.save({k: np.asarray(v, np.float16) for k, v in flat.items()})
    (path / "model.safetensors").write_bytes(weights)  # save_file would make a file that only its owner can read
    sizes = {"classes": net.classes, "widths": list(net.widths), "groups": net.groups}
    (path / "config.json").write_text(json.dumps({**config, "net": sizes}, indent=1) + "\n")


def load_segmenter(path: str | os.PathLike | None = None) -> Segmenter:
    """Loads a segmenter.

    Args:
      path: a folder with ``model.safetensors`` and ``config.json``; by default the shipped one (:data:`ASSET`).

    Returns:
      The segmenter, its weights in float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the weights do not fit the net that the config describes.
    """
    path = ASSET if path is None else pathlib.Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no segmenter in {path}: {name} is missing")
    config = json.loads((path / "config.json").read_text())
    sizes = config["net"]
    net = SegmentationNet(sizes["classes"], tuple(sizes["widths"]), sizes["groups"])
    flat = safetensors.load_file(path / "model.safetensors")
    image = jax.ShapeDtypeStruct((1, config["height"], config["width"], 3), jnp.float32)
    wanted = traverse_util.flatten_dict(jax.eval_shape(net.init, jax.random.key(0), image)["params"], sep="/")
    have, want = ({(k, tuple(v.shape)) for k, v in d.items()} for d in (flat, wanted))
    if have != want:
        raise ValueError(f"{path}: missing {sorted(want - have)}, unexpected {sorted(have - want)}")
    params = traverse_util.unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep="/")
    return Segmenter(net, params, config)
