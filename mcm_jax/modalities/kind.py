"""What a kind of condition is: everything that the rest of the code asks of one, and what most answer."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mcm_jax.errors import UserError, expect
from mcm_jax.modalities.files import PICTURES, fine_greys


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of condition, with the facts of a modality of it. Here are the answers of maps of values in [0, 1].

    A condition is one array ``[H, W]``, or ``[H, W, planes]`` where there are several planes. A new kind is a subclass
    that overrides what is different, and a line of :data:`mcm_jax.modalities.modality.KINDS`.

    Attributes:
      name: of the modality, for messages.
      channels: that the MCM sees of it, apart from the flag.
      ignore: the pixel value that means unknown; -1 for none.
    """

    name: str
    channels: int
    ignore: int = -1

    continuous = True
    """Whether values lie in [0, 1], kept in 8 bits as value * 255; else they are integers that mean classes."""
    endings = PICTURES
    """Of the files that it is read from."""
    judge = ""
    """What judges it where nothing else is said, as ``evaluation.judges`` takes it; '' where the user must say."""

    def __post_init__(self):
        expect(self.channels >= 1, f"{self.name}.channels", "at least 1", self.channels)
        expect(
            self.ignore == -1 or self.may_ignore(self.ignore),
            f"{self.name}.ignore",
            f"-1 for none, or of labels a value that is no class, here {self.channels}..{2**16 - 1}",
            self.ignore,
        )

    def may_ignore(self, value: int) -> bool:
        """Whether a pixel's value can be given to mean unknown."""
        return False

    @property
    def planes(self) -> int:
        """Of a condition's array."""
        return self.channels

    def check(self, array: np.ndarray, source: str) -> None:
        """Raises UserError, naming ``source``, where ``array`` is no condition of this kind."""
        shape = array.shape if array.ndim == 3 else (*array.shape, 1)
        if len(shape) != 3 or shape[-1] != self.planes:
            raise UserError(f"{source}: a {self.name} has {self.planes} channel(s), got shape {list(array.shape)}")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError(f"{source}: a {self.name} has values in [0, 1], got {array.min()} to {array.max()}")

    def doubt(self, array: np.ndarray) -> str:
        """What about a condition is allowed, but probably a mistake; '' where nothing is."""
        return ""

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Brings a condition to another grid."""
        return averaged(array, height, width)

    def crop(self, array: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
        """The part ``box`` (top, left, bottom, right, in pixels) on a grid."""
        top, left, bottom, right = box
        if bottom - top <= height and right - left <= width:
            return under_centres(array, box, height, width)  # area averaging does the same where it enlarges
        # Cut at whole pixels, at most half of one away: less than half of the grid's.
        part = array[round(top) : round(bottom), round(left) : round(right)]
        return part if part.shape[:2] == (height, width) else self.resize(part, height, width)

    def mirror(self, array: np.ndarray) -> np.ndarray:
        """Left to right, of values or of what :meth:`pack` gave."""
        return np.ascontiguousarray(array[:, ::-1])

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Integers, to keep: uint8 where that will do."""
        return np.round(array * 255).astype(np.uint8)

    def unpack(self, array: np.ndarray) -> np.ndarray:
        """The values of what :meth:`pack` gave."""
        return array.astype(np.float32) / 255

    def channels_of(self, batch: jax.Array) -> jax.Array:
        """What the MCM sees of a batch: float32 ``[B, H, W, channels]``."""
        return batch.reshape(*batch.shape[:3], self.channels).astype(jnp.float32)

    def known_at(self, batch: jax.Array) -> jax.Array | None:
        """How much of each pixel of a batch is known: bool, or shares in [0, 1], ``[B, H, W]``; None where all is."""
        return None

    def null(self, batch: int, height: int, width: int) -> np.ndarray:
        """A batch of conditions for an absent modality."""
        return np.zeros((batch, height, width) + ((self.planes,) if self.planes > 1 else ()), np.float32)

    def decode(self, picture: Image.Image, path: pathlib.Path) -> np.ndarray:
        """The condition that an opened picture file holds. Raises UserError where it cannot hold one."""
        self.check_picture(path)
        values = fine_greys(picture, path)
        if values is not None:
            return values if self.channels == 1 else np.repeat(values[..., None], self.channels, axis=-1)
        return self.converted(picture, path, "L" if self.channels == 1 else "RGB")

    def check_picture(self, path: pathlib.Path) -> None:
        """Raises UserError unless pictures have as many channels as this."""
        if self.channels not in (1, 3):
            raise UserError(f"{path}: a picture cannot hold the {self.channels} channels of a {self.name}")

    def converted(self, picture: Image.Image, path: pathlib.Path, mode: str) -> np.ndarray:
        """A picture's values in [0, 1] in a mode of Pillow's: float32. Raises UserError where it has no such."""
        try:
            return np.asarray(picture.convert(mode)).astype(np.float32) / 255
        except ValueError as e:
            raise UserError(f"{path}: cannot read a picture of mode {picture.mode} as a {self.name} ({e})") from e

    def show(self, batch: np.ndarray, palette: np.ndarray | None) -> np.ndarray:
        """A batch as pictures, uint8 ``[B, H, W, 3]``: three channels as colours, else the first in grey."""
        values = np.round(batch * 255).astype(np.uint8)
        if values.ndim == 3:
            values = values[..., None]
        return np.broadcast_to(values[..., :3] if values.shape[-1] == 3 else values[..., :1], (*values.shape[:3], 3))


def averaged(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averages of values in [0, 1], each plane by itself: float32 ``[height, width, ...]``."""
    planes = array.reshape(*array.shape[:2], -1).astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(planes[..., c]).resize((width, height), Image.Resampling.BOX))
        for c in range(planes.shape[-1])
    ]
    return np.clip(np.stack(resized, -1).reshape(height, width, *array.shape[2:]), 0, 1)


def under_centres(array: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """The pixel under the centre of each cell of a grid over ``box`` (top, left, bottom, right, in pixels)."""
    top, left, bottom, right = box
    rows = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(int)
    columns = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(int)
    return array[rows[:, None], columns[None, :]]


def checkerboard(height: int, width: int) -> np.ndarray:
    """Of single pixels, black and white, uint8 ``[height, width, 1]``: how what is unknown is drawn."""
    return (np.indices((height, width)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
