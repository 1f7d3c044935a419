"""ADE20K as the scene parsing challenge of 2016 has it (SceneParse150): 20,210 + 2,000 pictures, 150 classes.

Source: Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017; https://github.com/CSAILVision/sceneparsing, whose
README gives layout, counts, and 0 as "other objects", which are not evaluated: here they are 255, unknown, and class 1
is 0. Names are those of ``objectInfo150.txt``, the first of each class's synonyms.
"""

import dataclasses
import pathlib

import numpy as np

from mcm_jax.data.classes import Classes
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, lines, picture, pixels, png, shards
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

_ROOT = "ADEChallengeData2016"
_SPLITS = {"train": "training", "test": "validation"}
_CLASSES = 150


@dataclasses.dataclass(frozen=True)
class ADE20K(Layout):
    """Pictures (JPEG) of any size, their segmentations, and the kind of scene in words as caption. Its validation
    tests."""

    name = "ade20k"
    page = "http://sceneparsing.csail.mit.edu"
    licence = "pictures: non-commercial research and education; annotations: BSD 3-clause"
    download = f"""unpack {_ROOT}.zip, so that --manual_dir has {_ROOT}/images/training/ADE_train_00000001.jpg,
        {_ROOT}/annotations/training/ADE_train_00000001.png, the same of validation, {_ROOT}/objectInfo150.txt and
        {_ROOT}/sceneCategories.txt."""
    counts = {"train": 20_210, "test": 2_000}

    def holds(self, folder: pathlib.Path) -> Holds:
        """150 classes of segmentation, 255 where unknown, and captions."""
        classes = {"segmentation": Classes(self._names(self._root(folder)), ignore=255)}
        return Holds((Modality("segmentation", "labels", _CLASSES, ignore=255),), True, classes)

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """Training trains, validation tests."""
        root = self._root(folder)
        fields = [line.split(None, 1) for line in lines(root / "sceneCategories.txt")]
        scenes = {f[0]: " ".join(f[1].replace("_", " ").split()) for f in fields if len(f) == 2}

        def shards_of(published: str) -> list[Shard]:
            names = sorted(path.stem for path in (root / "images" / published).glob("ADE_*.jpg"))
            self.need(root, *(f"annotations/{published}/{name}.png" for name in names))
            if without := [name for name in names if name not in scenes]:
                raise UserError(
                    f"{root / 'sceneCategories.txt'}: expected a line for each picture, found none for {without[0]}"
                )

            def read(name: str) -> Record:
                path = root / "annotations" / published / f"{name}.png"
                labels = pixels(path)
                if labels.max() > _CLASSES:
                    raise UserError(f"{path}: found the value {labels.max()}, expected 0..{_CLASSES}")
                return {
                    "image": picture(root / "images" / published / f"{name}.jpg"),
                    "segmentation": png(labels.astype(np.uint8) - np.uint8(1)),  # 0, unknown, becomes 255
                    "caption": scenes[name],
                }

            return shards(names, read)

        found = {split: shards_of(published) for split, published in _SPLITS.items()}
        if not found["train"]:
            self.need(root, "images/training/ADE_train_00000001.jpg")
        return {split: parts for split, parts in found.items() if parts}

    def _root(self, folder: pathlib.Path) -> pathlib.Path:
        root = folder / _ROOT if (folder / _ROOT).is_dir() else folder
        self.need(root, "images/training", "annotations/training", "objectInfo150.txt", "sceneCategories.txt")
        return root

    def _names(self, root: pathlib.Path) -> tuple[str, ...]:
        path = root / "objectInfo150.txt"  # Idx, Ratio, Train, Val, Name
        rows = [line.split("\t") for line in lines(path)[1:]]
        if [row[0].strip() for row in rows] != [str(i + 1) for i in range(_CLASSES)] or any(len(r) < 5 for r in rows):
            raise UserError(f"{path}: expected {_CLASSES} lines Idx, Ratio, Train, Val, Name after the first, in order")
        return tuple(row[4].split(",")[0].strip() for row in rows)
