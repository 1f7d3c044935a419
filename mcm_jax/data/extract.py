"""Extractors: conditions found in pictures. A text says which, and into which modality's folder its output goes.

::

    canny                          one of these by its own name, with the settings that its function below has
    canny:sigma=2:low=0.05         the same with other settings
    fine=canny:sigma=0.5           into a folder of another name
    depth=mymodule:depth           a function of yours
    segmentation=net.onnx          a net of any framework, run by onnxruntime (the extra ``onnx``)

A function or a net is held to the judges' contract (:mod:`mcm_jax.plugins`), so one function can extract a condition
from pictures and judge samples by it. It is given one picture, float32 ``[1, H, W, 3]`` in [-1, 1], and gives integers
``[1, H, W]``, which are labels, or floats in [0, 1] of ``[1, H, W]`` or ``[1, H, W, C]`` with 1, 3 or 4 (RGBA)
channels.

Every extractor sees a picture brought to ``size`` pixels along its shorter side, if it is larger: which lines there are
depends on the scale at which one looks. For lines, smaller ones than 128 pixels are enlarged to that.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from mcm_jax.data.colours import to_lab
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import ModalitiesSettings, Modality, known
from mcm_jax.plugins import imported, open_onnx

VERSION = 1
"""Raised whenever an extractor gives something else for the same picture and settings."""

SIZE = 512
"""The shorter side, in pixels, at which pictures are looked at unless the text says otherwise; 0 is as they are."""

_LEAST = 128  # the shorter side at which lines are looked for: in fewer pixels they run together
_LONGEST = 16  # times as long as it is wide; a thread of pixels, enlarged, would fill the memory
_LINES = ("canny", "soft_edges", "sketch")
_PROBE = 64  # height and width of the picture that tries what takes any size


# The extractors: uint8 [H, W, 3] to uint8 [H, W], [H, W, 3] or [H, W, 4]


def canny(picture: np.ndarray, *, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> np.ndarray:
    """Edges one pixel wide (Canny 1986), black on white, uint8 ``[H, W]``.

    Args:
      picture: uint8 ``[H, W, 3]``, as of all extractors.
      sigma: of the smoothing, in pixels.
      low: least gradient of an edge that goes on, of greys in [0, 1].
      high: least gradient that begins one.
    """
    expect(sigma > 0, "sigma", "above 0", sigma)
    expect(0 <= low <= high, "low", f"in [0, high], here [0, {high}]", low)
    try:
        from skimage.feature import canny as edges
    except ImportError as e:
        raise UserError("the extractor canny needs scikit-image; pip install 'mcm-jax[data]'") from e
    found = edges(_luma(picture) / 255, sigma, low, high, mode="nearest")
    return np.where(found, 0, 255).astype(np.uint8)


def soft_edges(picture: np.ndarray, *, strength: float = 8.0) -> np.ndarray:
    """How strong an edge is there, as a net's soft edges look: black on white, uint8 ``[H, W]``.

    The gradient's magnitude in CIELAB, at scales of 1, 2 and 4 pixels, each normalised by its scale (Lindeberg 1998),
    averaged. A gradient of less than 1, as of a clear sky, is none; tanh keeps the rest in [0, 1].

    Args:
      picture: uint8 ``[H, W, 3]``.
      strength: the gradient that is drawn three quarters black; of a step by 20 in lightness it is about 8.
    """
    expect(strength > 0, "strength", "above 0", strength)
    lab = to_lab(picture)
    squares = [
        sum((s * ndimage.gaussian_gradient_magnitude(lab[..., c], s, mode="nearest")) ** 2 for c in range(3))
        for s in (1, 2, 4)
    ]
    return _drawn(np.tanh(np.maximum(np.mean(np.sqrt(squares), 0) - 1, 0) / strength))


def sketch(picture: np.ndarray, *, sigma: float = 0.7, gain: float = 8.0) -> np.ndarray:
    """Pencil lines where the picture is darker than what is around, black on white, uint8 ``[H, W]``.

    A difference of Gaussians as a ratio, which shadows do not change, in the colour channel where it is strongest
    (after XDoG, Winnemöller, Kyprianidis & Olsen 2012).

    Args:
      picture: uint8 ``[H, W, 3]``.
      sigma: of the finer Gaussian, in pixels: thin lines for small ones. The other one is three times as wide.
      gain: how fast lines turn black.
    """
    expect(sigma > 0, "sigma", "above 0", sigma)
    expect(gain > 0, "gain", "above 0", gain)
    values = picture.astype(np.float32) / 255
    fine, coarse = (ndimage.gaussian_filter(values, (s, s, 0), mode="nearest") for s in (sigma, 3 * sigma))
    darker = 1 - (fine + 0.1) / (coarse + 0.1)  # 0.1: the noise of black is no line
    return _drawn(np.clip((darker.max(-1) - 0.02) * gain, 0, 1))


def strokes(
    picture: np.ndarray, *, rng: np.random.Generator, share: float = 0.15, width: float = 0.03, length: float = 0.4
) -> np.ndarray:
    """Strokes of a brush in the picture's colours, along its contours; RGBA, transparent where there is none.

    A stroke begins anywhere, follows the contours of the smoothed picture and ends where the colour is another one
    (after Hertzmann 1998).

    Args:
      picture: uint8 ``[H, W, 3]``.
      rng: where strokes begin.
      share: of the picture that strokes cover, about.
      width: of a stroke, as a share of the shorter side.
      length: of a stroke at most, as a share of the shorter side.

    Returns:
      uint8 ``[H, W, 4]``; alpha is 0 or 255.
    """
    expect(0 < share <= 0.9, "share", "in (0, 0.9]", share)
    expect(0 < width <= 0.5, "width", "in (0, 0.5]", width)
    expect(0 < length <= 2, "length", "in (0, 2]", length)
    h, w, _ = picture.shape
    brush = max(1, round(width * min(h, w)))
    smooth = ndimage.gaussian_filter(picture.astype(np.float32), (brush / 2, brush / 2, 0), mode="nearest")
    lab = to_lab(np.round(smooth).astype(np.uint8))
    dy, dx = (ndimage.sobel(lab[..., 0], axis, mode="nearest") for axis in (0, 1))
    canvas = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(canvas)
    for _ in range(1000):
        y, x = rng.uniform(0, (h, w))
        direction = rng.uniform(0, 2 * np.pi)
        tangent = np.array([np.sin(direction), np.cos(direction)])
        colour, points = lab[int(y), int(x)], [(y, x)]
        fill = (*(int(v) for v in np.round(smooth[int(y), int(x)])), 255)
        for _ in range(max(1, round(length * min(h, w) / brush))):
            gradient = np.array([-dx[int(y), int(x)], dy[int(y), int(x)]])  # turned by 90 degrees: along the contour
            if (norm := np.linalg.norm(gradient)) > 1:
                tangent = gradient / norm * (1 if gradient @ tangent >= 0 else -1)
            y, x = y + brush * tangent[0], x + brush * tangent[1]
            if not (0 <= y < h and 0 <= x < w) or np.linalg.norm(lab[int(y), int(x)] - colour) > 10:
                break
            points.append((y, x))
        _brush(draw, points, brush, fill)
        if np.asarray(canvas.getchannel("A")).mean() >= 255 * share:
            break
    return np.asarray(canvas)


def inpainting(picture: np.ndarray, *, rng: np.random.Generator, least: float = 0.1, most: float = 0.5) -> np.ndarray:
    """The picture with a hole, a rectangle or what a thick brush wipes out; RGBA, transparent and black in the hole.

    Args:
      picture: uint8 ``[H, W, 3]``.
      rng: of the hole.
      least: the least share of the picture that is hidden, about.
      most: the most, about.

    Returns:
      uint8 ``[H, W, 4]``; alpha is 0 or 255.
    """
    expect(0 < least <= most <= 0.9, "least", f"in (0, most], and most in (0, 0.9], here {most}", least)
    h, w, _ = picture.shape
    hole = Image.new("L", (w, h))
    draw = ImageDraw.Draw(hole)
    share = rng.uniform(least, most)
    if rng.random() < 0.5:
        ratio = np.exp(rng.uniform(-0.7, 0.7))  # of the rectangle's sides, relative to the picture's: 1:2 to 2:1
        high, wide = min(1.0, np.sqrt(share * ratio)), min(1.0, np.sqrt(share / ratio))
        top, left = rng.uniform(0, 1 - high), rng.uniform(0, 1 - wide)
        box = round(left * w), round(top * h), round((left + wide) * w) - 1, round((top + high) * h) - 1
        draw.rectangle((box[0], box[1], max(box[0], box[2]), max(box[1], box[3])), fill=255)
    else:
        brush = max(1, round(0.12 * min(h, w)))
        point, direction = rng.uniform(0.2, 0.8, 2) * (h, w), rng.uniform(0, 2 * np.pi)
        while np.asarray(hole).mean() < 255 * share:
            direction += rng.normal(0, 0.8)
            step = point + brush * 1.5 * np.array([np.sin(direction), np.cos(direction)])
            inside = np.clip(step, 0, (h - 1, w - 1))
            _brush(draw, [tuple(point), tuple(inside)], brush, 255)
            if (step != inside).any():
                inside, direction = rng.uniform(0.1, 0.9, 2) * (h, w), rng.uniform(0, 2 * np.pi)
            point = inside
    seen = np.asarray(hole) == 0
    return np.dstack([picture * seen[..., None], np.where(seen, 255, 0).astype(np.uint8)])


def low_resolution(picture: np.ndarray, *, factor: int = 8) -> np.ndarray:
    """The picture itself with 1 pixel for ``factor`` x ``factor``: their mean, uint8 ``[H/factor, W/factor, 3]``.

    Args:
      picture: uint8 ``[H, W, 3]``.
      factor: at least 1.
    """
    expect(factor >= 1, "factor", "at least 1", factor)
    h, w, _ = picture.shape
    size = max(1, round(w / factor)), max(1, round(h / factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def grey(picture: np.ndarray) -> np.ndarray:
    """The picture in grey (ITU-R BT.601's luma), uint8 ``[H, W]``."""
    return np.round(_luma(picture)).astype(np.uint8)


EXTRACTORS: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function for function in (canny, soft_edges, sketch, strokes, inpainting, low_resolution, grey)
}
"""By the name that a text begins with, which is their modality's."""


def _luma(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114], np.float32)


def _drawn(ink: np.ndarray) -> np.ndarray:
    """Ink in [0, 1] as black on white."""
    return np.round(255 * (1 - ink)).astype(np.uint8)


def _scaled(picture: Image.Image, shorter: int) -> Image.Image:
    """A picture with so many pixels along its shorter side."""
    factor = shorter / min(picture.size)
    return picture.resize(tuple(round(side * factor) for side in picture.size), Image.Resampling.BICUBIC)


def _brush(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], width: int, fill: Any) -> None:
    """A line with round ends through points (y, x)."""
    places, radius = [(x, y) for y, x in points], width / 2
    if len(places) > 1:
        draw.line(places, fill, width, joint="curve")
    for x, y in (places[0], places[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


# Texts that name them


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Finds a condition in a picture.

    Attributes:
      modality: whose conditions it gives: the name of their folder.
      record: all that decides what it gives, as far as it is known: of a function of the user's, its name alone.
      size: of the shorter side of the pictures that :attr:`find` is given at most; 0 for any.
      find: from uint8 ``[H, W, 3]`` and the picture's name to uint8 ``[h, w]``, ``[h, w, 3]`` or ``[h, w, 4]``, or
        uint16 ``[h, w]`` of many classes; ``h:w`` is ``H:W``.
    """

    modality: str
    record: dict[str, Any]
    size: int
    find: Callable[[np.ndarray, str], np.ndarray]

    def __call__(self, picture: Image.Image, name: str) -> Image.Image:
        """The condition, to be saved as PNG.

        Args:
          picture: RGB, upright.
          name: of the picture: where an extractor draws at random, it draws the same for the same name.

        Raises:
          UserError: the user's function or net gave no condition.
        """
        if self.size and min(picture.size) > self.size:
            picture = _scaled(picture, self.size)
        return Image.fromarray(self.find(np.asarray(picture), name))


def open_extractors(text: str) -> tuple[Extractor, ...]:
    """The extractors that a text names, with commas between them.

    Args:
      text: see the top of this module.

    Raises:
      UserError: there is no such extractor, or setting, or two write into one folder.
    """
    found = [_open(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise UserError(f"--extract={text}: names no extractor; expected {_can_be()}")
    names = [e.modality for e in found]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(
            f"--extract={text}: two extractors write into the folder {twice[0]}; give one another name, "
            f"{twice[0]}_2={twice[0]}:..."
        )
    return tuple(found)


def _can_be() -> str:
    return f"{', '.join(EXTRACTORS)}, or for any modality NAME=module:function or NAME=FILE.onnx (docs/extract.md)"


def _open(text: str) -> Extractor:
    modality, _, what = ("", "", text) if text.split(":")[0] in EXTRACTORS else text.partition("=")
    parts = what.split(":")
    cut = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    what, settings = ":".join(parts[:cut]), parts[cut:]
    modality = modality or what
    if what not in EXTRACTORS and not what.endswith(".onnx") and not (len(parts[:cut]) == 2 and all(parts[:cut])):
        raise UserError(f"--extract={text}: there is no extractor {what or text!r}; expected {_can_be()}")
    if not modality.isidentifier():
        raise UserError(f"--extract={text}: {modality!r} is no name for a modality; expected letters, digits and _")
    try:
        ModalitiesSettings((Modality(modality, "map", 1),))  # refuses names that mean something else
        if what in EXTRACTORS:
            return _of_ours(modality, what, settings)
        return _plugged_in(modality, what, settings)
    except UserError as e:
        raise UserError(f"--extract={text}: {e}") from e


def _settings(texts: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    values = dict(defaults)
    for text in texts:
        key, _, value = text.partition("=")
        try:
            values[key] = type(defaults[key])(value)
            if not math.isfinite(values[key]):
                raise ValueError
        except (KeyError, ValueError, OverflowError) as e:
            known = ", ".join(f"{k}={v} ({type(v).__name__})" for k, v in defaults.items())
            raise UserError(f"found the setting {text!r}; expected of {known}") from e
    expect(values["size"] >= 0, "size", "at least 0", values["size"])
    return values


def _of_ours(modality: str, what: str, texts: Sequence[str]) -> Extractor:
    function, parameters = EXTRACTORS[what], inspect.signature(EXTRACTORS[what]).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty} | {"size": SIZE}
    if "rng" in parameters:
        defaults["seed"] = 0
    settings = _settings(texts, defaults)
    chosen = {k: v for k, v in settings.items() if k in parameters}

    def find(picture: np.ndarray, name: str) -> np.ndarray:
        shorter, longer = sorted(picture.shape[:2])
        if what in _LINES and shorter < _LEAST and longer <= _LONGEST * shorter:
            picture = np.asarray(_scaled(Image.fromarray(picture), _LEAST))
        if "rng" not in parameters:
            return function(picture, **chosen)
        digest = hashlib.sha256(f"{what}/{settings['seed']}/{name}".encode()).digest()
        return function(picture, rng=np.random.default_rng(list(digest)), **chosen)

    find(np.zeros((8, 8, 3), np.uint8), "")  # what is wrong with the settings shows before any picture
    return Extractor(modality, {"by": what, **settings, "version": VERSION}, settings["size"], find)


def _plugged_in(modality: str, what: str, texts: Sequence[str]) -> Extractor:
    size = _settings(texts, {"size": SIZE})["size"]
    record: dict[str, Any] = {"by": what, "size": size}
    checked = functools.partial(_condition_of, what, modality)
    fixed = None
    if what.endswith(".onnx"):
        read, fixed = open_onnx("extractor", what, checked)
        record["sha256"] = hashlib.sha256(pathlib.Path(what).read_bytes()).hexdigest()
    else:
        function, alone = imported("extractor", what, "FILE.onnx"), threading.Lock()

        def read(images: np.ndarray) -> np.ndarray:
            with alone:  # nobody promised that it can do two at a time
                out = function(images)
            return checked(out, images.shape[:3], False)

    def find(picture: np.ndarray, name: str) -> np.ndarray:
        shown = picture
        if fixed and fixed != picture.shape[:2]:
            shown = np.asarray(Image.fromarray(picture).resize(fixed[::-1], Image.Resampling.LANCZOS))
        condition = read(shown[None].astype(np.float32) / 127.5 - 1)[0]
        labels = condition.dtype == np.int32
        if condition.shape[:2] != picture.shape[:2]:  # a net of a fixed size sees the picture squeezed
            how = Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR
            condition = np.asarray(Image.fromarray(condition).resize(picture.shape[1::-1], how))
        return condition.astype(np.uint16 if condition.max() > 255 else np.uint8) if labels else condition

    find(np.zeros((*(fixed or (_PROBE, _PROBE)), 3), np.uint8), "")  # what is wrong shows before any picture
    return Extractor(modality, record, size, find)


def _condition_of(
    what: str, modality: str, out: np.ndarray, pixels: tuple[int, int, int], channels_first: bool
) -> np.ndarray:
    """Labels, int32 ``[N, H, W]``, or maps, uint8 ``[N, H, W]`` or ``[N, H, W, C]``, from what was found."""
    n, h, w = pixels
    kind = found.kind if (found := known(modality)) else ""
    if out.ndim == 4:  # channels first, last, or none
        first, last = out.shape[::2] == (n, h) and out.shape[3] == w, out.shape[:3] == (n, h, w)
        if first and (channels_first or not last):
            out = np.moveaxis(out, 1, -1)
        floats = np.issubdtype(out.dtype, np.floating)
        if out.shape[:3] == (n, h, w) and floats and (kind == "labels" or out.shape[3] not in (1, 3, 4)):
            out = out.argmax(-1)  # logits
        elif out.shape[3] == 1:
            out = out[..., 0]
    labels, maps = np.issubdtype(out.dtype, np.integer), np.issubdtype(out.dtype, np.floating)
    if out.shape[:3] != (n, h, w) or not (labels or maps) or (labels and out.ndim != 3):
        raise UserError(
            f"the extractor {what} gave {out.dtype}{list(out.shape)} for pictures {[n, h, w, 3]}; expected labels, "
            f"integers {[n, h, w]}, or maps, floats {[n, h, w]} or {[n, h, w, 'C']} with 1, 3 or 4 channels"
        )
    most = 65535 if labels else 1
    if not np.isfinite(out).all() or out.min() < 0 or out.max() > most:
        expected = "labels in 0..65535" if labels else "maps of values in [0, 1]: scale or clip them in the extractor"
        raise UserError(f"the extractor {what} gave values from {out.min()} to {out.max()}; expected {expected}")
    return out.astype(np.int32) if labels else np.round(out * 255).astype(np.uint8)
