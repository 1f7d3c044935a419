"""Picture files: which there are, and one error for each way in which a file is none."""

import contextlib
import io
import os
import struct
from collections.abc import Iterator

from PIL import Image

from mcm_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are pictures, in any case."""

# Whatever a file is called. Pillow knows many more, rarely tried ones, and of EPS it runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
# Of Pillow, of damaged or hostile files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, NotImplementedError)
_BROKEN += (struct.error, Image.DecompressionBombError)


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
            yield picture
    except UserError:
        raise
    except _BROKEN as e:
        raise UserError(f"{source}: not a picture that can be read ({e}). {fix}") from e
