"""A modality: a name, a kind, and what that kind answers."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
from PIL import Image

from mcm_jax.errors import UserError
from mcm_jax.modalities.files import PictureBytes, open_picture
from mcm_jax.modalities.kind import Kind
from mcm_jax.modalities.known import known
from mcm_jax.modalities.labels import Labels
from mcm_jax.modalities.maps import Lines, Map
from mcm_jax.modalities.normals import Normals
from mcm_jax.modalities.sparse import Sparse

KINDS: dict[str, type[Kind]] = {
    "labels": Labels,
    "map": Map,
    "lines": Lines,
    "normals": Normals,
    "sparse": Sparse,
}
"""Every kind of condition, by what configs call it."""


@dataclasses.dataclass(frozen=True)
class Modality:
    """A named kind of condition. What the kind decides is said, and documented, by its :class:`.kind.Kind`.

    Attributes:
      name: what flags, configs and data sets call it.
      kind: one of :data:`KINDS`: ``labels`` (integer classes ``[H, W]``, one-hot to ``channels`` channels), ``map``
        (values in [0, 1], ``[H, W]`` for one channel or ``[H, W, channels]``), ``lines`` (a map of black lines on
        white, whose lines keep their strength when a large drawing is brought to a small grid: the MCM sees the ink,
        1 - value), ``normals`` (unit vectors as colours), ``sparse`` (colours where alpha, the last plane, is opaque).
      channels: number of classes, or of the map's channels.
      ignore: the pixel value of labels that means "unknown here" (often 255), which is no class; -1 for none.
    """

    name: str
    kind: str
    channels: int
    ignore: int = dataclasses.field(default=-1, repr=False)  # names of caches are made of the others' repr

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"{self.name}.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        self.definition  # noqa: B018 - it checks the rest

    @functools.cached_property
    def definition(self) -> Kind:
        """The kind, with this modality's facts."""
        return KINDS[self.kind](self.name, self.channels, self.ignore)

    @property
    def continuous(self) -> bool:
        """Whether values lie in [0, 1], kept in 8 bits as value * 255; else they are integers that mean classes."""
        return self.definition.continuous

    @property
    def planes(self) -> int:
        """Of a condition's array, ``[H, W]`` where it is 1, else ``[H, W, planes]``."""
        return self.definition.planes

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files that it is read from, in small letters."""
        return self.definition.endings

    @property
    def judge(self) -> str:
        """What judges it where nothing else is said, as ``evaluation.judges`` takes it; '' where the user must say."""
        by_name = known(self.name)
        if by_name and by_name.judge and (by_name.kind, by_name.channels) == (self.kind, self.channels):
            return by_name.judge
        return self.definition.judge

    def check(self, array: np.ndarray, source: str) -> None:
        """Raises UserError, naming ``source``, where ``array`` is no condition of this modality."""
        self.definition.check(array, source)

    def doubt(self, array: np.ndarray) -> str:
        """What about a condition is allowed, but probably a mistake; '' where nothing is."""
        return self.definition.doubt(array)

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Brings a condition to the grid ``height`` x ``width``: nearest for labels, area averaging for the others."""
        if array.shape[:2] == (height, width):
            return array
        return self.definition.resize(array, height, width)

    def fit(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """:meth:`resize` of the centre that has the grid's aspect ratio: nothing is squeezed."""
        top, left, bottom, right = (round(edge) for edge in cover(*array.shape[:2], height, width))
        # A picture one pixel wide keeps it.
        return self.resize(array[top : max(bottom, top + 1), left : max(right, left + 1)], height, width)

    def crop(self, array: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
        """The part ``box`` (top, left, bottom, right, in the condition's pixels) on the grid ``height`` x ``width``."""
        return self.definition.crop(array, box, height, width)

    def mirror(self, array: np.ndarray) -> np.ndarray:
        """A condition left to right, packed or not."""
        return self.definition.mirror(array)

    def pack(self, array: np.ndarray) -> np.ndarray:
        """A condition as integers, to keep: values in [0, 1] as uint8, value * 255; labels in the least type."""
        return self.definition.pack(array)

    def unpack(self, array: np.ndarray) -> np.ndarray:
        """The condition that was packed: labels as they are, others float32 in [0, 1]."""
        return self.definition.unpack(array)

    def resize_all(self, batch: np.ndarray, height: int, width: int) -> np.ndarray:
        """:meth:`resize` of each of a batch ``[B, H, W]``; uint8 maps (value * 255) stay uint8."""
        if batch.shape[1:3] == (height, width):
            return batch
        if not self.continuous or batch.dtype != np.uint8:
            return np.stack([self.resize(condition, height, width) for condition in batch])
        return np.stack([self.pack(self.resize(self.unpack(condition), height, width)) for condition in batch])

    def channels_of(self, condition: jax.Array) -> jax.Array:
        """Turns a batch ``[B, H, W]`` (or ``[B, H, W, planes]``) into float32 ``[B, H, W, channels]``."""
        return self.definition.channels_of(condition)

    def known_at(self, condition: jax.Array) -> jax.Array | None:
        """How much of each pixel of a batch is known: bool, or shares in [0, 1], ``[B, H, W]``; None where all is."""
        return self.definition.known_at(condition)

    def null(self, batch: int, height: int, width: int) -> np.ndarray:
        """A batch of conditions for an absent modality (its values are never seen: the flag zeroes them)."""
        return self.definition.null(batch, height, width)

    def show(self, conditions: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """A batch of conditions as RGB uint8 ``[B, H, W, 3]``; classes in the colours of ``palette``, if it has all."""
        return self.definition.show(np.asarray(conditions), palette)


def cover(height: int, width: int, grid_height: int, grid_width: int) -> tuple[float, float, float, float]:
    """The centre of a picture that has a grid's aspect ratio: top, left, bottom, right, in the picture's pixels.

    Top and left are whole, so that a picture and a condition which are only cut stay as they are.
    """
    if width * grid_height >= height * grid_width:
        rows, columns = height, height * grid_width / grid_height
    else:
        rows, columns = width * grid_height / grid_width, width
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return top, left, top + rows, left + columns


def read_png(path: str | pathlib.Path | PictureBytes, modality: Modality) -> np.ndarray:
    """Reads a condition from a picture file, or from what is in one.

    Labels come from a PNG whose pixel values are the classes (greyscale or palette indices); a colour picture or a
    lossy one (JPEG, WebP) is refused, since its values are no classes. Maps come from any picture, grey for one channel
    and RGB for three, divided by 255; what is sparse from one with transparency.

    Returns:
      int32 ``[H, W]`` for labels, float32 ``[H, W]`` or ``[H, W, planes]`` in [0, 1] for the others.

    Raises:
      UserError: the file is missing, no picture, lossy, in colour, or holds an unknown class.
    """
    picture = open_condition(path, modality)
    array = modality.definition.decode(picture, path)
    modality.check(array, str(path))
    return array


def open_condition(path: str | pathlib.Path | PictureBytes, modality: Modality) -> Image.Image:
    """A condition's picture, loaded. Raises UserError where it is missing or no picture."""
    if not isinstance(path, PictureBytes) and not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file (wanted: the {modality.name}'s PNG)")
    with open_picture(path, f"A {modality.name} is a PNG file") as picture:
        picture.load()
    return picture
