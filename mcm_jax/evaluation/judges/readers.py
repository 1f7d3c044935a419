"""Readers: what finds the labels in a picture, so that they can be compared with those it was drawn for."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from mcm_jax import assets
from mcm_jax.data.colours import nearest
from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.pictures import to_uint8
from mcm_jax.plugins import imported, open_onnx

CAN_BE = (
    "scenes or emoji (the shipped nets), palette (nearest colour, where the data set has colours), palette:FILE.json "
    "(a list of [r, g, b], or {name: [r, g, b]}), module:function (pictures to labels), FILE.onnx (a net), "
    "or a folder that python -m mcm_jax.evaluation.judges train has written; each with interior: before it to leave "
    "out the pixels that a border runs through"
)

_SHIPPED = ("scenes", "emoji")  # data sets whose judge is an asset, scenes-segmenter, emoji-segmenter
_PROBE = 64  # height and width of the picture that tries an ONNX net that takes any size


@dataclasses.dataclass(frozen=True)
class Reader:
    """Finds labels in pictures.

    Attributes:
      name: for the report.
      read: float32 ``[N, H, W, 3]`` in [-1, 1] to integers ``[N, H, W]``.
      channels: how many classes there are.
      size: the pictures' ``(H, W)`` that it takes; None for any.
      classes: their names, where it knows them.
      features: what it sees in pictures before it decides, float32 ``[N, D]``; None where it is no net of ours.
    """

    name: str
    read: Callable[[np.ndarray], np.ndarray]
    channels: int
    size: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None
    features: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Labels of pictures.

        Raises:
          UserError: what it gave has another shape or type, or a class that there is not.
        """
        found = self.read(images)
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


def at_size(size: tuple[int, int], images: np.ndarray) -> str:
    """For a report: the size ``(H, W)`` at which pictures ``[N, H, W, 3]`` are looked at, and whether it is theirs."""
    resized = size != images.shape[1:3]
    return f"at {size[0]}x{size[1]}" + (f" ({images.shape[1]}x{images.shape[2]} resized)" if resized else "")


def open_reader(
    spec: str, *, channels: int, palette: np.ndarray | None = None, names: tuple[str, ...] | None = None
) -> Reader:
    """The reader that a text describes.

    Args:
      spec: see :data:`CAN_BE`.
      channels: number of classes that the labels have.
      palette: the data set's colours of these, uint8 ``[channels, 3]``, if it has any.
      names: the data set's names of these, if it has any.

    Raises:
      UserError: it cannot be had, or knows another number of classes.
    """
    if is_net(spec):
        return of_net(spec, channels)
    if spec.endswith(".onnx"):
        read, size = open_onnx("judge", spec, lambda *given: _labels_of(spec, *given, channels))
        reader = Reader(spec, read, channels, size, names)
        reader(np.zeros((1, *(size or (_PROBE, _PROBE)), 3), np.float32))  # what is wrong shows before any sample
        return reader
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
        return Reader(spec, imported("judge", spec, CAN_BE), channels, classes=names)
    raise UserError(f"judge {spec!r}: there is no such judge of labels; expected {CAN_BE}")


def is_net(spec: str) -> bool:
    """Whether a text says one of our nets: a shipped one, or a folder."""
    return spec in _SHIPPED or (bool(spec) and pathlib.Path(spec).is_dir())


def of_net(spec: str, channels: int | None = None) -> Reader:
    """One of our nets.

    Args:
      spec: the name of a shipped one, or a folder of ``python -m mcm_jax.evaluation.judges train``.
      channels: how many classes it must know; None for any.

    Raises:
      UserError: it cannot be read, or knows another number of classes.
    """
    try:
        net = load_segmenter(assets.resolve(f"{spec}-segmenter") if spec in _SHIPPED else spec)
    except (OSError, ValueError) as e:
        raise UserError(f"judge {spec}: no segmentation net that can be read ({e})") from e
    if channels is not None and len(net.classes) != channels:
        raise UserError(f"judge {spec}: the net knows {len(net.classes)} classes, the labels here have {channels}")
    size = net.config["height"], net.config["width"]
    return Reader(os.fspath(spec), net.predict, len(net.classes), size, net.classes, net.features)


def _labels_of(spec: str, out: np.ndarray, pixels: tuple[int, ...], channels_first: bool, channels: int) -> np.ndarray:
    """Labels ``[N, H, W]`` from what a net gave: these, or logits ``[N, C, H, W]`` or ``[N, H, W, C]``."""
    n, h, w = pixels
    if np.issubdtype(out.dtype, np.integer):
        if out.shape in ((n, h, w), (n, 1, h, w), (n, h, w, 1)):
            return out.reshape(n, h, w).astype(np.int64)
    elif out.ndim == 4:
        first, last = (out.shape == shape for shape in ((n, channels, h, w), (n, h, w, channels)))
        if first or last:
            return out.argmax(1 if first and (channels_first or not last) else 3)
    raise UserError(
        f"judge {spec}: it gave {out.dtype}{list(out.shape)} for pictures {[n, h, w, 3]}; expected a class of each "
        f"pixel, integers {[n, h, w]}, or logits of the {channels} classes here, {[n, channels, h, w]} or "
        f"{[n, h, w, channels]}"
    )


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
