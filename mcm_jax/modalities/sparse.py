"""Colours at some pixels, nothing at the others: strokes, or a picture with a hole."""

import pathlib

import jax
import numpy as np
from PIL import Image

from mcm_jax.errors import UserError
from mcm_jax.modalities.kind import Kind, averaged, checkerboard


class Sparse(Kind):
    """Colours and, in the last plane, how much of a pixel has any: ``[H, W, channels + 1]`` in [0, 1].

    A cell of a grid has the mean colour of what is known of it, however little that is, and its last plane the share.
    That share is the flag that the MCM sees (the colours times it, too): a thin stroke is a weak one, not lost, and
    bringing a condition to the grid in two steps is as good as in one. Judges take a pixel as known from one half on.
    """

    endings = (".png", ".webp")
    judge = "colour"

    @property
    def planes(self) -> int:
        """One more than channels."""
        return self.channels + 1

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Means weighted by the share that is known; zero where nothing is."""
        colours, share = array[..., :-1], array[..., -1:]
        mean = averaged(share, height, width)
        found = averaged(colours * share, height, width) / np.where(mean > 0, mean, 1)
        return np.concatenate([np.clip(found, 0, 1), mean], -1)

    def channels_of(self, batch: jax.Array) -> jax.Array:
        """The colours."""
        return super().channels_of(batch[..., :-1])

    def known_at(self, batch: jax.Array) -> jax.Array:
        """The last plane."""
        return batch[..., -1]

    def decode(self, picture: Image.Image, path: pathlib.Path) -> np.ndarray:
        """A picture's colours and its alpha; one without transparency is refused, it would be known everywhere."""
        self.check_picture(path)
        if not picture.has_transparency_data:
            raise UserError(
                f"{path}: found a picture without transparency (mode {picture.mode}), expected one that is transparent "
                f"where a {self.name} says nothing: PNG with an alpha channel"
            )
        return self.converted(picture, path, "LA" if self.channels == 1 else "RGBA")

    def show(self, batch: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
        """Over a checkerboard."""
        shown, share = super().show(batch[..., :-1], palette), batch[..., -1:]
        return np.round(shown * share + checkerboard(*batch.shape[1:3]) * (1 - share)).astype(np.uint8)
