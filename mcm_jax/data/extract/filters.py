"""Extractors without a net: uint8 ``[H, W, 3]`` to uint8 ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``.

Keyword arguments with a default are an extractor's settings, ``rng`` is what it draws at random by.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from mcm_jax.data.colours import to_lab
from mcm_jax.errors import UserError, expect


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


def _brush(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], width: int, fill: Any) -> None:
    """A line with round ends through points (y, x)."""
    places, radius = [(x, y) for y, x in points], width / 2
    if len(places) > 1:
        draw.line(places, fill, width, joint="curve")
    for x, y in (places[0], places[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
