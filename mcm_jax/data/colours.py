"""Colours as people tell them apart: CIELAB, and the nearest of a palette."""

import numpy as np


def to_lab(colours: np.ndarray) -> np.ndarray:
    """sRGB colours, uint8 ``[..., 3]``, in CIELAB under D65 (IEC 61966-2-1, CIE 15), float32 ``[..., 3]``."""
    value = np.arange(256) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear[colours] @ (to_xyz / to_xyz.sum(1, keepdims=True)).T  # white is (1, 1, 1)
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def nearest(picture: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Which colour of a palette, uint8 ``[C, 3]``, is nearest in CIELAB to each pixel of uint8 ``[..., 3]``: ``[...]``.

    The first of equals; uint8 for up to 256 colours.
    """
    lab = to_lab(picture)
    found = np.stack([((lab - colour) ** 2).sum(-1) for colour in to_lab(palette)]).argmin(0)
    return found.astype(np.uint8 if len(palette) <= 256 else np.int32)
