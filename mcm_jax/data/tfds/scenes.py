"""The procedural scenes of :mod:`mcm_jax.data.scenes` as records: the same examples as ``data.name=scenes`` gives."""

import dataclasses
import functools
import pathlib

from mcm_jax.data import scenes
from mcm_jax.data.classes import Classes
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, png, shards
from mcm_jax.errors import expect
from mcm_jax.modalities import Modality


@dataclasses.dataclass(frozen=True)
class RenderedScenes(Layout):
    """Scenes, rendered: nothing is downloaded.

    Attributes:
      size: training examples.
      test_size: held-out examples.
      seed: another seed is another data set.
      height: of the pictures, the base's.
      width: of the pictures.
    """

    name = "scenes"
    page = "docs/data.md"
    licence = "Apache-2.0"
    download = "nothing to download"

    size: int = 2_000
    test_size: int = 256
    seed: int = 2
    height: int = 32
    width: int = 32

    def __post_init__(self):
        for key in ("size", "test_size", "height", "width"):
            expect(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        expect(self.seed >= 0, "seed", "at least 0", self.seed)

    def holds(self, folder: pathlib.Path) -> Holds:
        """Segmentation, sketch and captions."""
        del folder
        labels = Modality("segmentation", "labels", len(scenes.CLASSES))
        return Holds(
            (labels, Modality("sketch", "lines", 1)),
            True,
            {"segmentation": Classes(tuple(scenes.CLASSES), scenes.PALETTE)},
        )

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """Train and test."""
        del folder
        return {split: self._shards(split, size) for split, size in (("train", self.size), ("test", self.test_size))}

    def _shards(self, split: str, size: int) -> list[Shard]:
        source = functools.cache(
            lambda: InMemory.render(scenes.Scenes(split, size, self.height, self.width, self.seed))
        )

        def read(name: str) -> Record:
            example = source()[int(name)]
            images = {key: png(example[key]) for key in ("image", "segmentation", "sketch")}
            return images | {"caption": str(example["caption"])}

        return shards([f"{i:06}" for i in range(size)], read)
