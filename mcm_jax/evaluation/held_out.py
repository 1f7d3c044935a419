"""Held-out examples: the conditions that samples are drawn for, and real pictures of them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from mcm_jax.base import BaseCard
from mcm_jax.data import DataSettings
from mcm_jax.data.pipeline import to_float
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

_AT_ONCE = 256  # training pictures in memory


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """The first examples of a data set's test split, stacked.

    Attributes:
      data: the data set.
      card: of the base, whose pictures' size is that of :attr:`images`.
      modalities: of the MCM; what the data set holds besides is read too.
      most: how many examples at most; a folder may hold fewer.
    """

    data: DataSettings
    card: BaseCard
    modalities: tuple[Modality, ...]
    most: int

    def __post_init__(self):
        if not self.data.has_test_split():
            place = (
                f"Put pairs that training shall not see into {self.data.path}/test, laid out as {self.data.path}/train"
            )
            if self.data.name == "tfds":
                place = "Put it back if it was moved, or build it with one (docs/tfds.md)"
            raise UserError(f"{self.data.path}: there is no test split, so nothing is held out to evaluate on. {place}")

    @property
    def judged(self) -> tuple[Modality, ...]:
        """Every modality of the examples, whether the MCM knows it or not."""
        own = {m.name for m in self.modalities}
        return (*(m for m in self.data.holds if m.name not in own), *self.modalities)

    @functools.cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return self._read(self.card)

    def _read(self, card: BaseCard) -> dict[str, np.ndarray]:
        source = self.data.open("test", self.judged, card, size=self.most)
        examples = [source[i] for i in range(min(self.most, len(source)))]
        arrays = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
        return to_float(arrays, [m.name for m in self.judged if m.continuous])

    def __len__(self) -> int:
        return len(self._arrays["image"])

    @property
    def images(self) -> np.ndarray:
        """Real pictures, float32 ``[N, H, W, 3]`` in [-1, 1]."""
        return self._arrays["image"]

    @property
    def conditions(self) -> dict[str, np.ndarray]:
        """Of each modality, on the grid of the pictures: labels integers, the others float32 in [0, 1]."""
        return {m.name: self._arrays[m.name] for m in self.judged}

    @functools.cached_property
    def present(self) -> dict[str, np.ndarray]:
        """Which examples have each modality, bool ``[N]``: all, but where a data set has gaps."""
        there = self._arrays.get("present", np.ones((len(self), len(self.judged)))) > 0
        return {m.name: there[:, i] for i, m in enumerate(self.judged)}

    @functools.cached_property
    def captions(self) -> list[str]:
        """One of each example, whether the base takes them or not. Raises UserError where the data set has none."""
        found = self._arrays.get("caption")
        if found is None:  # a folder's, which are read where they are asked for
            card = dataclasses.replace(self.card, is_text_conditional=True)
            source = self.data.open("test", (), card, size=self.most)
            found = [source[i]["caption"] for i in range(len(self))]
        return list(map(str, found))

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """What each example is called: of a folder its files' name, else its number."""
        found = self.data.find("test", self.modalities, self.card, size=self.most)
        return list(getattr(found, "names", map(str, range(len(self)))))[: len(self)]

    def training_images(self, most: int) -> Iterator[np.ndarray]:
        """The first training pictures, as they are, at most so many, in parts: float32 ``[N, H, W, 3]`` in [-1, 1].

        They have the size of :attr:`images`: sets are compared whose pictures came to a judge's size in the same way.
        """
        data = self.data.without_views()
        count = min(most, len(data.find("train", (), self.card)))
        source = data.open("train", (), self.card, size=count)
        for start in range(0, count, _AT_ONCE):
            part = np.stack([source[i]["image"] for i in range(start, min(start + _AT_ONCE, count))])
            yield to_float({"image": part}, [])["image"]

    def at(self, height: int, width: int) -> dict[str, np.ndarray]:
        """:attr:`conditions` on another grid: drawn or read anew, then squeezed where its aspect ratio is another."""
        rows, columns = self.images.shape[1:3]
        factor = max(height / rows, width / columns)
        size = round(factor * rows), round(factor * columns)
        if size == (rows, columns):
            arrays = self.conditions
        else:
            arrays = self._read(dataclasses.replace(self.card, image_shape=(*size, 3)))
        return {m.name: m.resize_all(arrays[m.name], height, width) for m in self.judged}
