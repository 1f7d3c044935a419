"""Picture files: which there are, and one error for each way in which a file is none."""

import contextlib
import io
import os
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mcm_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are pictures, in any case."""

GREY_STEP = "grey_step"
"""In a picture's ``info``: what its grey levels are in steps of, the values in the file times that."""

# Whatever a file is called. Pillow knows many more, rarely tried ones, and of EPS it runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
# Of Pillow, of damaged or hostile files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, NotImplementedError)
_BROKEN += (struct.error, Image.DecompressionBombError)


def over(picture: Image.Image, colour: str) -> Image.Image:
    """A picture with transparency, laid over a colour: RGB."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16-bit greys in 8, which ``convert`` would cut off at 255; others as they are."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))


class PictureBytes(io.BytesIO):
    """What is in a picture file. As a text it says where it is from."""

    def __init__(self, data: bytes, where: str):
        super().__init__(data)
        self._where = where

    def __str__(self) -> str:
        return self._where


@contextlib.contextmanager
def open_picture(source: str | os.PathLike | PictureBytes, fix: str = "Replace it") -> Iterator[Image.Image]:
    """Opens a picture file, or what is in one.

    Args:
      source: the file.
      fix: what the user can do, for the message.

    Raises:
      UserError: it is no picture, damaged, or of so many pixels that it would fill the memory; also of errors within
        the block, where pixels are first decoded.
    """
    try:
        with Image.open(source, formats=_FORMATS) as picture:
            # Greys of 2 and 4 bits are opened as 8, times 85 or 17.
            raw = picture.tile[0][-1] if picture.format == "PNG" and picture.tile else ""
            picture.info[GREY_STEP] = {"L;2": 85, "L;4": 17}.get(raw, 1)
            yield picture
    except UserError:
        raise
    except _BROKEN as e:
        raise UserError(f"{source}: not a picture that can be read ({e}). {fix}") from e
