"""Emoji: real drawn art, 1,609 pictures of Google's Noto Emoji with colour classes, line drawings and names.

Shipped as one archive that ``tools/make_emoji.py`` makes; every rule is there, and in the archive's ``recipe.json``.
Nothing is unpacked to disk. An example, at 32x32 or 64x64, holds

============ ========================= ==============================================================================
image        uint8 ``[H, W, 3]``        the picture on white; at 32x32 the mean of 2x2 pixels of the one at 64x64
segmentation uint8 ``[H, W]``           colour of the largest area in the pixel, an index into :data:`CLASSES`
sketch       uint8 ``[H, W]``           value * 255: black lines (0) on white, where colours meet
caption      str, as an array           the name in words, e.g. "woman firefighter, medium skin tone"
============ ========================= ==============================================================================
"""

import functools
import hashlib
import io
import json
import pathlib
import zipfile

import numpy as np
from PIL import Image

from mcm_jax import assets
from mcm_jax.data.colours import nearest
from mcm_jax.errors import UserError

__all__ = ["CLASSES", "COLUMNS", "PALETTE", "SIZES", "SPLITS", "Emoji", "classes_of"]

SPLITS = ("train", "test")
SIZES = (32, 64)
"""Rows, and columns, of the pictures that there are."""

COLUMNS = 40
"""Pictures in a row of a sheet of the archive."""

_COLOURS = {
    "white": (255, 255, 255),
    "grey": (180, 188, 194),
    "black": (63, 55, 51),
    "brown": (141, 90, 60),
    "red": (238, 61, 48),
    "orange": (245, 150, 30),
    "yellow": (253, 202, 40),
    "beige": (248, 207, 160),
    "green": (88, 171, 86),
    "blue": (58, 142, 224),
    "pink": (216, 100, 168),
}
CLASSES = tuple(_COLOURS)
"""Names of the colours. White is the background, and all else that is white."""

PALETTE = np.array(list(_COLOURS.values()), np.uint8)
"""uint8 ``[len(CLASSES), 3]``: the colour of each class."""


def classes_of(picture: np.ndarray) -> np.ndarray:
    """The class whose colour is nearest in CIELAB to each pixel of uint8 ``[..., 3]``: uint8 ``[...]``."""
    return nearest(picture, PALETTE)


class Emoji:
    """A random-access source of emoji.

    Attributes:
      names: what each example is called in the package that it is from; the position is the index.

    Args:
      split: ``train`` or ``test``. Variants of one emoji (skin tones, hair, genders, directions) are in one split.
      height: rows of the pictures, one of :data:`SIZES`.
      width: columns, as many as rows.
      limit: the first so many alone.

    Raises:
      UserError: there is no such resolution.
    """

    def __init__(self, split: str, height: int = 32, width: int = 32, limit: int | None = None):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"a data set needs at least one example, got limit={limit}")
        if height != width or height not in SIZES:
            raise UserError(
                f"the data set 'emoji' is there at {' and at '.join(f'{n}x{n}' for n in SIZES)}, but the base makes "
                f"pictures of {height}x{width}: take a base of one of these sizes, or set data.name "
                f"to 'folder' with your own pairs"
            )
        self.split, self.size = split, height
        examples = json.loads(_members()[f"{split}/examples.json"])[:limit]
        self.names = tuple(e["name"] for e in examples)
        self._captions = [e["caption"] for e in examples]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        pictures = _pictures(self.split, self.size)
        return {name: values[index] for name, values in pictures.items()} | {"caption": np.array(self._captions[index])}

    def fingerprints(self) -> dict[str, str]:
        """All that decides what the examples are."""
        return {"emoji": f"{_digest()}, {self.split}, {len(self)} of {self.size}x{self.size}"}

    def stamp(self) -> str:
        """Equal for equal examples."""
        return self.fingerprints()["emoji"]


@functools.cache
def _archive() -> bytes:
    return (pathlib.Path(assets.__file__).parent / "emoji" / "emoji.zip").read_bytes()


@functools.cache
def _digest() -> str:
    return hashlib.sha256(_archive()).hexdigest()


@functools.cache
def _members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(_archive())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@functools.cache
def _pictures(split: str, size: int) -> dict[str, np.ndarray]:
    """``image``, ``segmentation`` and ``sketch`` of a split, stacked."""
    image = _cut(split, "image", 64)
    if size == 32:
        pairs = image.reshape(len(image), 32, 2, 32, 2, 3).astype(np.uint16).sum((2, 4))
        image = ((pairs + 2) // 4).astype(np.uint8)
    return {"image": image} | {name: _cut(split, name, size) for name in ("segmentation", "sketch")}


def _cut(split: str, name: str, size: int) -> np.ndarray:
    """The pictures on a sheet, ``[N, size, size]`` or ``[N, size, size, 3]``, row by row; the last row may be short."""
    with Image.open(io.BytesIO(_members()[f"{split}/{name}_{size}.png"])) as sheet:
        cells = np.asarray(sheet)
    cells = cells.reshape(-1, size, COLUMNS, size, *cells.shape[2:]).swapaxes(1, 2)
    count = len(json.loads(_members()[f"{split}/examples.json"]))
    return np.ascontiguousarray(cells.reshape(-1, size, size, *cells.shape[4:])[:count])
