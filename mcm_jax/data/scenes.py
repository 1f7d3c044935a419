"""Procedural landscapes with exact conditions: data that needs no download.

Every example is a function of (seed, split, index) alone. A scene is first drawn as a set of numbers in unit
coordinates (:mod:`.scene`) and then rendered at any resolution (:mod:`.render`), so the same scene can be had at
32x32 and at 512x512. Ours, in the spirit of the paper's Flickr Mountains.

An example holds

========== =================================== =====================================================================
image      float32 ``[H, W, 3]`` in [-1, 1]     the picture
segmentation uint8 ``[H, W]`` in 0..5           class of the largest area in the pixel, an index into :data:`CLASSES`
sketch     float32 ``[H, W]`` in [0, 1]         black lines (0) on white (1): outlines, main ridges, a few ripples
caption    str                                  e.g. "a mountain lake at sunset with three trees"
facts      dict                                 what the caption says: time, water, trees, sun, ranges
========== =================================== =====================================================================
"""

from collections.abc import Iterator

import numpy as np

from mcm_jax.data.render import CLASSES, PALETTE, render
from mcm_jax.data.scene import TIMES, Scene, draw_scene

__all__ = ["CLASSES", "PALETTE", "SPLITS", "TIMES", "Scenes", "scene_at"]

SPLITS = ("train", "test")
VERSION = 1
"""Raised whenever a scene is drawn differently."""


def scene_at(seed: int, split: str, index: int) -> Scene:
    """The scene of (seed, split, index). Splits use different branches of the seed sequence: they cannot overlap."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, got seed={seed}, index={index}")
    branch = np.random.SeedSequence((seed, index), spawn_key=(SPLITS.index(split),))
    return draw_scene(np.random.default_rng(branch))


class Scenes:
    """A random-access source of scenes.

    Args:
      split: ``train`` or ``test``.
      size: number of examples.
      height: rows of the pictures.
      width: columns of the pictures.
      seed: another seed is another data set.
    """

    def __init__(self, split: str, size: int, height: int = 32, width: int = 32, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if size < 1:
            raise ValueError(f"a data set needs at least one example, got size={size}")
        self.split, self.size, self.height, self.width, self.seed = split, size, height, width, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        scene = scene_at(self.seed, self.split, int(index))
        return render(scene, self.height, self.width) | {"caption": scene.caption, "facts": scene.facts}

    def fingerprints(self) -> dict[str, str]:
        """All that decides what the examples are."""
        size = f"{self.size} of {self.height}x{self.width}"
        return {"scenes": f"version {VERSION}, {self.split}, {size}, seed {self.seed}"}

    def stamp(self) -> str:
        """Equal for equal examples; of files it is cheaper than their fingerprints."""
        return self.fingerprints()["scenes"]

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[i] for i in range(self.size))
