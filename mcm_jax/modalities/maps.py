"""Maps of values in [0, 1], and of black lines on white."""

import pathlib

import jax
import numpy as np
from PIL import Image

from mcm_jax.modalities.files import over
from mcm_jax.modalities.kind import Kind


class Map(Kind):
    """Values in [0, 1], ``[H, W]`` for one channel or ``[H, W, channels]``: area averages, in grey or as they are."""


class Lines(Map):
    """Black lines on white, which keep their strength on a small grid. The MCM sees the ink, 1 - value."""

    judge = "edges"

    def decode(self, picture: Image.Image, path: pathlib.Path) -> np.ndarray:
        """Over white where it is transparent: a drawing program's export has ink alone."""
        shows_through = picture.has_transparency_data and not picture.mode.startswith("I;16")  # one grey, at most
        return super().decode(over(picture, "white") if shows_through else picture, path)

    def doubt(self, array: np.ndarray) -> str:
        """White on black."""
        if array.mean() >= 0.5:
            return ""
        return f"mostly dark; a {self.name} is black lines on white, so invert it if it is the other way round"

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Area averages, whose ink is then as strong as that of lines drawn on the small grid."""
        out = super().resize(array, height, width)
        if not (ink := 1 - out).any():
            return out
        # A line two pixels wide fills an eighth of a sixteen-pixel cell: scaled so that most inked cells are near
        # 1, it looks as lines drawn on the small grid do (correlation 0.97 on scenes, 256 to 32 pixels). Never
        # more than a line one pixel wide needs, or a scan's noise would become lines.
        thinnest = min(1.0, height / array.shape[0], width / array.shape[1])
        return 1 - np.clip(ink / max(np.quantile(ink[ink > 0], 0.8), thinnest), 0, 1)

    def channels_of(self, batch: jax.Array) -> jax.Array:
        """The ink."""
        return 1 - super().channels_of(batch)
