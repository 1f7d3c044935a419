"""Two-dimensional conditions and the channels that the MCM sees of them.

A *modality* is a named kind of 2-D condition (segmentation, sketch, depth, ...). Every one becomes channels on the
grid of ``x_t``: labels one-hot by nearest neighbour, maps and lines by area averaging. An absent modality is its null
condition, zeros, and a presence flag tells it from a map that happens to be zero, so that one MCM serves any subset.
Where a label map says "unknown here" (:attr:`Modality.ignore`), its channels and flag are the null condition's, too.
One-hot labels, flags and zeros are ours; the paper claims the subsets and shows the grids (see also ``drop``).
"""

import dataclasses
import io
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from mcm_jax.errors import UserError, expect

KINDS = ("labels", "map", "lines")


@dataclasses.dataclass(frozen=True)
class Modality:
    """One kind of condition.

    Attributes:
      name: what flags, configs and data sets call it.
      kind: ``labels`` (integer classes ``[H, W]``, one-hot to ``channels`` channels) or ``map`` (values in [0, 1],
        ``[H, W]`` for one channel or ``[H, W, channels]``), or ``lines``: a map of black lines on white, whose lines
        keep their strength when a large drawing is brought to a small grid. The MCM sees the ink, 1 - value.
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
        expect(self.channels >= 1, f"{self.name}.channels", "at least 1", self.channels)
        expect(
            self.ignore == -1 or (self.kind == "labels" and self.channels <= self.ignore < 2**16),
            f"{self.name}.ignore",
            f"-1 for none, or of labels a value that is no class, here {self.channels}..{2**16 - 1}",
            self.ignore,
        )

    def check(self, array: np.ndarray, source: str) -> None:
        """Raises UserError, naming ``source``, where ``array`` is no condition of this modality."""
        if self.kind == "labels":
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
                raise UserError(
                    f"{source}: a {self.name} is a 2-D integer array of classes, got {array.dtype}{list(array.shape)}"
                )
            unknown = np.unique(array[(array < 0) | ((array >= self.channels) & (array != self.ignore))])
            if len(unknown):
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
        else:
            shape = array.shape if array.ndim == 3 else (*array.shape, 1)
            if len(shape) != 3 or shape[-1] != self.channels:
                raise UserError(
                    f"{source}: a {self.name} has {self.channels} channel(s), got shape {list(array.shape)}"
                )
            if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
                raise UserError(f"{source}: a {self.name} has values in [0, 1], got {array.min()} to {array.max()}")

    def resize(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """Brings a condition to the grid ``height`` x ``width``: nearest for labels, area averaging for the others.

        A cell of labels is what the pixel under its centre is, be that a class or unknown, whatever else it covers.
        """
        if array.shape[:2] == (height, width):
            return array
        if self.kind == "labels":
            rows = ((np.arange(height) + 0.5) * array.shape[0] / height).astype(int)
            columns = ((np.arange(width) + 0.5) * array.shape[1] / width).astype(int)
            return array[rows[:, None], columns[None, :]]
        planes = array.reshape(*array.shape[:2], -1).astype(np.float32)
        resized = [
            np.asarray(Image.fromarray(planes[..., c]).resize((width, height), Image.Resampling.BOX))
            for c in range(planes.shape[-1])
        ]
        out = np.clip(np.stack(resized, -1).reshape(height, width, *array.shape[2:]), 0, 1)
        if self.kind == "lines" and (ink := 1 - out).any():
            # A line two pixels wide fills an eighth of a sixteen-pixel cell: scaled so that most inked cells are near
            # 1, it looks as lines drawn on the small grid do (correlation 0.97 on scenes, 256 to 32 pixels). Never
            # more than a line one pixel wide needs, or a scan's noise would become lines.
            thinnest = min(1.0, height / array.shape[0], width / array.shape[1])
            out = 1 - np.clip(ink / max(np.quantile(ink[ink > 0], 0.8), thinnest), 0, 1)
        return out

    def fit(self, array: np.ndarray, height: int, width: int) -> np.ndarray:
        """:meth:`resize` of the centre that has the grid's aspect ratio: nothing is squeezed."""
        top, left, bottom, right = (round(edge) for edge in cover(*array.shape[:2], height, width))
        return self.resize(array[top:bottom, left:right], height, width)

    def resize_all(self, batch: np.ndarray, height: int, width: int) -> np.ndarray:
        """:meth:`resize` of each of a batch ``[B, H, W]``; uint8 maps (value * 255) stay uint8."""
        if batch.shape[1:3] == (height, width):
            return batch
        if self.kind == "labels" or batch.dtype != np.uint8:
            return np.stack([self.resize(condition, height, width) for condition in batch])
        resized = (self.resize(condition.astype(np.float32) / 255, height, width) for condition in batch)
        return np.stack([np.round(condition * 255).astype(np.uint8) for condition in resized])

    def channels_of(self, condition: jax.Array) -> jax.Array:
        """Turns a batch ``[B, H, W]`` (or ``[B, H, W, C]`` for a map) into float32 ``[B, H, W, channels]``.

        A pixel whose label is :attr:`ignore` is zero in all of them.
        """
        if self.kind == "labels":
            return jax.nn.one_hot(condition, self.channels, dtype=jnp.float32)
        values = condition.reshape(*condition.shape[:3], self.channels).astype(jnp.float32)
        return 1 - values if self.kind == "lines" else values

    def null(self, batch: int, height: int, width: int) -> np.ndarray:
        """A batch of conditions for an absent modality (its values are never seen: the flag zeroes them)."""
        if self.kind == "labels":
            return np.zeros((batch, height, width), np.uint8)
        return np.zeros((batch, height, width) + ((self.channels,) if self.channels > 1 else ()), np.float32)


# What else an example or a record holds.
_TAKEN = ("image", "latent", "caption", "prompt", "index", "draw", "seen", "t", "eps", "eps_scale", "noise", "x_t")


@dataclasses.dataclass(frozen=True)
class ModalitiesSettings:
    """The conditions, each by its name with ``kind`` and ``channels``. The config's section ``modalities``.

    Attributes:
      shown: each :class:`Modality`, in the order of their names. ``ignore``, the value of label pixels that means
        unknown, may be left out.
      drop_rate: how often training hides each modality, independently.
    """

    shown: tuple[Modality, ...] = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
    drop_rate: float = 0.3

    def __post_init__(self):
        expect(0 <= self.drop_rate <= 1, "drop_rate", "in [0, 1]", self.drop_rate)
        expect(self.drop_rate < 1, "drop_rate", "below 1: at 1 no condition is ever seen", self.drop_rate)
        if not self.shown:
            raise UserError("shown must have a modality at least: a section by its name, with kind and channels")
        if taken := [m.name for m in self.shown if m.name in _TAKEN]:
            raise UserError(f"{taken[0]}: this name is taken, as are {', '.join(_TAKEN)}; choose another")


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


def total_channels(modalities: tuple[Modality, ...]) -> int:
    """Channels that :func:`stack` returns: each modality's and its flag."""
    return sum(m.channels + 1 for m in modalities)


def stack(modalities: tuple[Modality, ...], conditions: Mapping[str, jax.Array], present: jax.Array) -> jax.Array:
    """Builds the MCM's condition channels.

    Args:
      modalities: which, in their order.
      conditions: a batch for each modality's name, on the grid.
      present: bool ``[B, len(modalities)]``.

    Returns:
      float32 ``[B, H, W, total_channels(modalities)]``: per modality its channels, zero where absent, and its flag. A
      pixel whose label is the modality's ``ignore`` is as where the modality is absent, its flag, too.
    """
    parts = []
    for i, modality in enumerate(modalities):
        channels = modality.channels_of(conditions[modality.name])
        flag = present[:, i, None, None, None].astype(jnp.float32)
        if modality.ignore != -1:
            known = conditions[modality.name].astype(jnp.int32) != modality.ignore
            flag = flag * known[..., None].astype(jnp.float32)
        parts += [channels * flag, jnp.broadcast_to(flag, (*channels.shape[:3], 1))]
    return jnp.concatenate(parts, axis=-1)


def drop(key: jax.Array, count: int, rate: float) -> jax.Array:
    """Draws which modalities one training example shows: bool ``[count]``, each hidden independently with ``rate``."""
    return jax.random.bernoulli(key, 1 - rate, (count,))


def read_png(path: str | pathlib.Path | io.BytesIO, modality: Modality) -> np.ndarray:
    """Reads a condition from a picture file, or from what is in one; then its ``str()`` says where that is.

    Labels come from a PNG whose pixel values are the classes (greyscale or palette indices); a colour picture or a
    lossy one (JPEG, WebP) is refused, since its values are no classes. Maps come from any picture, grey for one channel
    and RGB for three, divided by 255.

    Returns:
      int32 ``[H, W]`` for labels, float32 ``[H, W]`` or ``[H, W, C]`` in [0, 1] for maps.

    Raises:
      UserError: the file is missing, no picture, lossy, in colour, or holds an unknown class.
    """
    if not isinstance(path, io.BytesIO) and not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file (wanted: the {modality.name}'s PNG)")
    try:
        with Image.open(path) as picture:
            picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: not a picture that can be read ({e}). A {modality.name} is a PNG file") from e
    if modality.kind == "labels":
        if picture.format != "PNG":
            raise UserError(
                f"{path}: found a {picture.format} file, expected PNG: lossy formats change the classes. Save it as "
                f"PNG from the labels themselves"
            )
        if picture.mode not in ("L", "P", "1", "I", "I;16"):
            raise UserError(
                f"{path}: found a colour picture (mode {picture.mode}), expected one class a pixel: a greyscale or "
                f"palette PNG with values 0..{modality.channels - 1}"
            )
        array = np.asarray(picture).astype(np.int32)
    else:
        if modality.channels not in (1, 3):
            raise UserError(f"{path}: a picture cannot hold the {modality.channels} channels of a {modality.name}")
        if picture.mode.startswith("I;16"):  # also I;16B, big-endian TIFF, which convert() would cut off at 255
            array = np.asarray(picture).astype(np.float32) / 65535
        else:
            try:
                converted = picture.convert("L" if modality.channels == 1 else "RGB")
            except ValueError as e:
                raise UserError(
                    f"{path}: cannot read a picture of mode {picture.mode} as a {modality.name} ({e})"
                ) from e
            array = np.asarray(converted).astype(np.float32) / 255
    modality.check(array, str(path))
    return array
