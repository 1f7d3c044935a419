"""Label maps: a class for each pixel."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mcm_jax.errors import UserError
from mcm_jax.modalities.files import GREY_STEP
from mcm_jax.modalities.kind import Kind, checkerboard, under_centres


class Labels(Kind):
    """Integer classes ``[H, W]``: one-hot to ``channels`` channels, by nearest neighbour, in colours.

    Pixels of the value :attr:`ignore` are of no class but unknown: where they are, the modality is absent.
    """

    continuous = False
    endings = (".png",)

    def may_ignore(self, value: int) -> bool:
        """What is no class."""
        return self.channels <= value < 2**16

    @property
    def planes(self) -> int:
        """One."""
        return 1

    def check(self, array: np.ndarray, source: str) -> None:
        """Says which classes are strange, and how they can be had."""
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(
                f"{source}: a {self.name} is a 2-D integer array of classes, got {array.dtype}{list(array.shape)}"
            )
        unknown = np.unique(array[(array < 0) | ((array >= self.channels) & (array != self.ignore))])
        if not len(unknown):
            return
        void = "" if self.ignore == -1 else f", and {self.ignore} for unknown"
        known = f"but this model knows 0..{self.channels - 1} ({self.channels} classes{void})"
        if len(unknown) == 1 and unknown[0] > self.channels and self.ignore == -1:
            raise UserError(
                f"{source}: found the classes [{unknown[0]}], {known}. If {unknown[0]} means unlabelled, train "
                f"with config.modalities.{self.name}.ignore={unknown[0]}; if it is a class, with "
                f"config.modalities.{self.name}.channels set to how many there are, or map it to another one"
            )
        raise UserError(
            f"{source}: found the classes {unknown[:10].tolist()}, {known}. Map the others to one of these, or "
            f"train with config.modalities.{self.name}.channels set to how many there are, or with "
            f"config.modalities.{self.name}.ignore set to the one value that is no class but means unknown"
        )

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """A cell is what the pixel under its centre is, be that a class or unknown, whatever else it covers."""
        return self.crop(array, (0, 0, *array.shape[:2]), height, width)

    def crop(self, array: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
        """As :meth:`resize`."""
        return under_centres(array, box, height, width)

    def pack(self, array: np.ndarray) -> np.ndarray:
        """The smallest type that holds all classes and unknown: uint8, uint16 or int32."""
        most = max(self.channels - 1, self.ignore)
        return array.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32)

    def unpack(self, array: np.ndarray) -> np.ndarray:
        """As it is."""
        return array

    def channels_of(self, batch: jax.Array) -> jax.Array:
        """One-hot; zero in all where unknown."""
        return jax.nn.one_hot(batch, self.channels, dtype=jnp.float32)

    def known_at(self, batch: jax.Array) -> jax.Array | None:
        """Where a class is."""
        return None if self.ignore == -1 else batch.astype(jnp.int32) != self.ignore

    def null(self, batch: int, height: int, width: int) -> np.ndarray:
        """Of the first class."""
        return np.zeros((batch, height, width), np.uint8)

    def decode(self, picture: Image.Image, path: pathlib.Path) -> np.ndarray:
        """The pixel values of a greyscale or palette PNG; others' are no classes. int32 ``[H, W]``."""
        if picture.format not in (None, "PNG"):  # None: made in memory
            raise UserError(
                f"{path}: found a {picture.format} file, expected PNG: lossy formats change the classes. Save it as "
                f"PNG from the labels themselves"
            )
        if picture.mode not in ("L", "P", "1", "I", "I;16"):
            raise UserError(
                f"{path}: found a colour picture (mode {picture.mode}), expected one class a pixel: a greyscale or "
                f"palette PNG with values 0..{self.channels - 1}"
            )
        return np.asarray(picture).astype(np.int32) // picture.info.get(GREY_STEP, 1)

    def show(self, batch: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
        """In the palette's colours, or in random ones if it has too few; unknown as a checkerboard."""
        if palette is None or len(palette) < self.channels:
            palette = np.random.default_rng(0).integers(0, 256, (self.channels, 3), dtype=np.uint8)
        unknown = batch == self.ignore
        return np.where(unknown[..., None], checkerboard(*batch.shape[-2:]), palette[np.where(unknown, 0, batch)])
