"""Readers: what finds the labels in a picture, so that they can be compared with those it was drawn for."""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from mcm_jax.data.colours import nearest
from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import ASSET, load_segmenter
from mcm_jax.pictures import to_uint8

CAN_BE = (
    "scenes (the shipped net), palette (nearest colour, where the data set has colours), palette:FILE.json (a list of "
    "[r, g, b], or {name: [r, g, b]}), module:function (pictures to labels), or the folder of a segmentation net"
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Finds labels in pictures.

    Attributes:
      name: for the report.
      read: float32 ``[N, H, W, 3]`` in [-1, 1] to integers ``[N, H, W]``.
      channels: how many classes there are.
      size: the pictures' ``(H, W)`` that it takes; None for any.
      classes: their names, where it knows them.
    """

    name: str
    read: Callable[[np.ndarray], np.ndarray]
    channels: int
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Labels of pictures.

        Raises:
          UserError: what it gave has another shape or type, or a class that there is not.
        """
        found = np.asarray(self.read(images))
        if found.shape != images.shape[:3] or not np.issubdtype(found.dtype, np.integer):
            raise UserError(
                f"the judge {self.name} gave {found.dtype}{list(found.shape)} for pictures {list(images.shape)}; "
                f"expected a class of each pixel, integers {list(images.shape[:3])}"
            )
        if found.size and not (found.min() >= 0 and found.max() < self.channels):
            raise UserError(
                f"the judge {self.name} found classes {found.min()} to {found.max()}, but the labels here have "
                f"0..{self.channels - 1}"
            )
        return found


def resize_images(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pictures ``[N, H, W, 3]`` on another grid: area averages where it is smaller, else bilinear."""
    count, h, w, _ = images.shape
    if (h, w) == (height, width):
        return images
    if h % height == 0 and w % width == 0:
        return images.reshape(count, height, h // height, width, w // width, 3).mean(axis=(2, 4))
    how = Image.Resampling.BOX if h >= height and w >= width else Image.Resampling.BILINEAR

    def resized(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((width, height), how))

    return np.stack([np.stack([resized(image[..., c]) for c in range(3)], -1) for image in images.astype(np.float32)])


def open_reader(spec: str, *, channels: int, palette: np.ndarray | None, names: tuple[str, ...] | None) -> Reader:
    """The reader that a text describes.

    Args:
      spec: see :data:`CAN_BE`.
      channels: number of classes that the labels have.
      palette: the data set's colours of these, uint8 ``[channels, 3]``, if it has any.
      names: the data set's names of these, if it has any.

    Raises:
      UserError: it cannot be had, or knows another number of classes.
    """
    if spec == "scenes" or pathlib.Path(spec, "model.safetensors").is_file():
        return _of_net(spec, channels)
    kind, _, rest = spec.partition(":")
    if kind == "palette":
        if rest:
            palette, names = _read_palette(pathlib.Path(rest))
        if palette is None:
            raise UserError("judge palette: this data set has no colours of its classes; give them, palette:FILE.json")
        if len(palette) != channels:
            raise UserError(f"judge {spec}: found {len(palette)} colours, expected one for each of {channels} classes")
        return Reader(spec, lambda images: nearest(to_uint8(images), palette), channels, classes=names)
    if kind and rest:
        return Reader(spec, _imported(kind, rest, spec), channels, classes=names)
    raise UserError(f"judge {spec!r}: there is no such judge of labels; expected {CAN_BE}")


def _of_net(spec: str, channels: int) -> Reader:
    try:
        net = load_segmenter(ASSET if spec == "scenes" else spec)
    except (OSError, KeyError, ValueError) as e:
        raise UserError(f"judge {spec}: no segmentation net that can be read ({e})") from e
    if len(net.classes) != channels:
        raise UserError(f"judge {spec}: the net knows {len(net.classes)} classes, the labels here have {channels}")
    size = net.config["height"], net.config["width"]
    return Reader(os.fspath(spec), net.predict, channels, size, net.classes)


def _read_palette(path: pathlib.Path) -> tuple[np.ndarray, tuple[str, ...] | None]:
    try:
        content = json.loads(path.read_text())
        colours = np.array(list(content.values()) if isinstance(content, dict) else content)
        if colours.ndim != 2 or colours.shape[1] != 3 or not np.issubdtype(colours.dtype, np.integer):
            raise ValueError(f"values of shape {list(colours.shape)}, {colours.dtype}")
        if colours.min() < 0 or colours.max() > 255:
            raise ValueError(f"values from {colours.min()} to {colours.max()}")
    except (OSError, ValueError) as e:
        raise UserError(
            f"judge palette:{path}: no palette ({e}); expected JSON, [[r, g, b], ...] or {{name: [r, g, b], ...}} of "
            f"whole numbers in 0..255, in the order of the classes"
        ) from e
    return colours.astype(np.uint8), tuple(content) if isinstance(content, dict) else None


def _imported(module: str, name: str, spec: str) -> Callable[[np.ndarray], np.ndarray]:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise UserError(
            f"judge {spec}: cannot be imported ({e}); expected module:function, or {CAN_BE}. A module of your own is "
            f"found from where the command is typed if PYTHONPATH has that folder"
        ) from e
    if not callable(function):
        raise UserError(f"judge {spec}: {name} is a {type(function).__name__}, expected a function")
    return function
