"""Picture files: which there are, and one error for each way in which a file is none."""

import contextlib
import io
import os
import struct
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image, PngImagePlugin

from mcm_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are pictures, in any case."""

GREY_STEP = "grey_step"
"""In a picture's ``info``: what its grey levels are in steps of, the values in the file times that."""

# Whatever a file is called. Pillow knows many more, rarely tried ones, and of EPS it runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
# Of Pillow, of damaged or hostile files.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, NotImplementedError)
BROKEN += (struct.error, Image.DecompressionBombError)


def note_grey_step(picture: Image.Image) -> Image.Image:
    """The same picture, with :data:`GREY_STEP`: greys of 2 and 4 bits are opened as 8, times 85 or 17.

    Of one whose pixels were loaded before, the file no longer tells.
    """
    raw = picture.tile[0][-1] if picture.format == "PNG" and getattr(picture, "tile", None) else ""
    if raw or not isinstance(picture.info.get(GREY_STEP), int):  # a file's own text of that name says nothing
        picture.info[GREY_STEP] = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else raw[0], 1)
    return picture


HEAD = 4096
"""Bytes of a file that :func:`is_read_anew` looks at."""


def is_read_anew(head: bytes, kind: str) -> bool:
    """Whether a condition's file is, by its first bytes, one that was read otherwise before 2026-11-30.

    Lines with an alpha channel, whose hidden colours counted; labels in grey of 2 or 4 bits, times 85 or 17.
    """
    if head.startswith(b"\x89PNG"):
        bits, colour = head[24:25], head[25:26]
        if kind == "labels":
            return bits in (b"\x02", b"\x04") and colour == b"\0"
        return kind == "lines" and (colour in (b"\x04", b"\x06") or b"tRNS" in head)
    flags = {b"VP8X": head[20:21], b"VP8L": head[24:25]}.get(head[12:16], b"") if head[8:12] == b"WEBP" else b""
    return kind == "lines" and bool(flags) and bool(flags[0] & 0x10)


def over(picture: Image.Image, colour: str) -> Image.Image:
    """A picture with transparency, laid over a colour: RGB."""
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("RGB")


def fine_greys(picture: Image.Image, where: object) -> np.ndarray | None:
    """Greys of more than 8 bits, which ``convert`` would cut off at 255: float32 ``[H, W]`` in [0, 1]; None of others.

    16 bits, also in a picture of 32, are divided by 65535; floats are taken as they are. Whole numbers of 32 bits that
    are 255 at most could be of 8 bits as well as dark.

    Args:
      picture: any, opened.
      where: it is from, for the message.

    Raises:
      UserError: values out of these ranges, which could mean anything.
    """
    wide = picture.mode.startswith("I")  # I, and I;16 in either order of the bytes
    if not wide and picture.mode != "F":
        return None
    values, most = np.asarray(picture), 65535 if wide else 1
    if not (np.isfinite(values) & (values >= 0) & (values <= most)).all():
        raise UserError(
            f"{where}: found a grey picture of {'whole numbers' if wide else 'floats'} from {values.min():g} to "
            f"{values.max():g}, expected 0 to {most}; scale it to that, or save it with 8 bits"
        )
    # Pillow opens greys of 16 bits as these, too, where the format has none of 32.
    if picture.mode == "I" and picture.format not in ("PNG", "PPM") and 0 < values.max() <= 255:
        raise UserError(
            f"{where}: found a grey picture of signed or 32-bit whole numbers up to {values.max():g}, expected 0 to "
            f"65535; here 255 may be white, too: save it with 8 or 16 bits"
        )
    return (values / np.float32(most)).astype(np.float32)


def eight_bits(picture: Image.Image, where: object = "the picture") -> Image.Image:
    """A picture of finer greys in 8 bits (:func:`fine_greys`), others as they are."""
    values = fine_greys(picture, where)
    return picture if values is None else Image.fromarray(np.round(values * 255).astype(np.uint8))


def png(picture: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of a picture, with texts by name."""
    data, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in (texts or {}).items():
        info.add_text(name, text)
    picture.save(data, format="PNG", pnginfo=info)
    return data.getvalue()


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
            yield note_grey_step(picture)
    except UserError:
        raise
    except BROKEN as e:
        raise UserError(f"{source}: not a picture that can be read ({e}). {fix}") from e
