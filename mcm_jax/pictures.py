"""Grids of images and conditions as PNG files."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mcm_jax.files import write_atomically
from mcm_jax.modalities import Modality
from mcm_jax.modalities.files import png

_ABSENT = 160


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as 8-bit values; outside values are clipped."""
    return np.round((np.clip(np.asarray(images, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8)


def show(
    modality: Modality,
    conditions: np.ndarray,
    palette: np.ndarray | None = None,
    present: np.ndarray | None = None,
) -> np.ndarray:
    """A batch of conditions as RGB uint8 ``[B, H, W, 3]``: labels in colours, maps in grey (or as they are).

    Labels have the colours of `palette`, uint8 ``[channels, 3]``, or some; where anything is unknown, a checkerboard,
    which no class looks like. Where `present`, bool ``[B]``, says that there is none, all is grey.
    """
    shown = modality.show(conditions, palette)
    return shown if present is None else np.where(present[:, None, None, None], shown, np.uint8(_ABSENT))


def grid(rows: Sequence[np.ndarray], *, gap: int = 1, least_size: int = 96) -> np.ndarray:
    """One picture of rows of images.

    Args:
      rows: each uint8 ``[N, H, W, 3]``, the same N, H and W.
      gap: white pixels between the images, before enlarging.
      least_size: images are enlarged by a whole factor to at least this height.

    Returns:
      uint8 ``[H', W', 3]``.
    """
    factor = max(1, -(-least_size // rows[0].shape[1]))
    cells = [[np.pad(image, ((gap, 0), (gap, 0), (0, 0)), constant_values=255) for image in row] for row in rows]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in cells], axis=0)
    sheet = np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=255)
    return sheet.repeat(factor, axis=0).repeat(factor, axis=1)


def rows_of(images: np.ndarray, columns: int) -> list[np.ndarray]:
    """Images ``[N, H, W, 3]`` in rows of so many; what the last one lacks is white."""
    filled = np.concatenate([images, np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)])
    return [filled[i : i + columns] for i in range(0, len(filled), columns)]


def signed(values: np.ndarray, scale: float) -> np.ndarray:
    """Values as RGB uint8 ``[..., 3]``: white at 0, red at ``scale``, blue at ``-scale``."""
    share = np.clip(np.asarray(values, np.float32) / (scale or 1.0), -1, 1)[..., None]
    ends = np.where(share > 0, np.float32([178, 24, 43]), np.float32([33, 102, 172]))
    return np.round(255 + np.abs(share) * (ends - 255)).astype(np.uint8)


def save_png(path: str | os.PathLike, picture: np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """Writes uint8 ``[H, W]`` or ``[H, W, 3]``, with texts by name; the file appears when it is complete."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png(Image.fromarray(picture), texts))
