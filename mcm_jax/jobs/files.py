"""The picture files that jobs name, read to the size that a picture is drawn in."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mcm_jax import pictures
from mcm_jax.base import Base
from mcm_jax.data.reading import read_image, turn_of
from mcm_jax.jobs.job import Job
from mcm_jax.modalities import Modality, cover
from mcm_jax.modalities.files import open_picture, over
from mcm_jax.modalities.modality import open_condition
from mcm_jax.pipeline import Pipeline

_MASK = Modality("mask", "map", 1)


class Files:
    """Reads for the MCMs of a pipeline; what was read lately is kept. Of all pictures the centre is taken.

    Attributes:
      known: the modalities by name.
    """

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self.known = {m.name: m for m in pipeline.modalities}
        self.condition = functools.lru_cache(256)(self._condition)
        self.mask = functools.lru_cache(256)(self._mask)
        self.image = functools.lru_cache(64)(self._image)

    def read(self, path: str, name: str) -> np.ndarray:
        """The condition in a picture file, at its own resolution; labels by the colours of the run's classes, too."""
        condition = self._pipeline.read(path, name)
        with open_picture(path) as picture:
            if turn_of(picture):
                warnings.warn(
                    f"{path}: EXIF data would turn it, but a condition is taken as it is stored; save it upright "
                    f"without them",
                    stacklevel=2,
                )
        if doubt := self.known[name].doubt(condition):
            warnings.warn(f"{path}: {doubt}", stacklevel=2)
        return condition

    def show(self, path: str, name: str, size: tuple[int, int]) -> np.ndarray:
        """The condition as a picture, uint8 ``[1, H, W, 3]``."""
        shown = self.known[name].fit(self.read(path, name), *size)[None]
        return pictures.show(self.known[name], shown, self._pipeline.palette(name))

    def check(self, job: Job, base: Base) -> None:
        """Reads a job's files. Raises UserError where one is damaged or holds something else than it should."""
        self.arrays([job], base)

    def arrays(self, jobs: Sequence[Job], base: Base) -> dict[str, Any]:
        """What :meth:`mcm_jax.pipeline.Pipeline.__call__` takes of what jobs show, for pictures of a base's size.

        Raises:
          UserError: a file is damaged or holds something else than it should.
        """
        grid, size, latent = self._pipeline.grid_for(base), base.image_shape[:2], base.latent_shape[:2]
        given: dict[str, Any] = {"conditions": {}, "present": {}, "strength": {}, "window": {}}
        for name, modality in self.known.items():
            shown = np.array([name in j.conditions for j in jobs])
            if shown.any():
                null = modality.null(1, *grid)[0]
                each = [self.condition(j.conditions[name], name, grid) if name in j.conditions else null for j in jobs]
                given["conditions"][name], given["present"][name] = np.stack(each), shown
                given["strength"][name] = np.array([j.strength.get(name, 1.0) for j in jobs])
                given["window"][name] = np.array([j.window.get(name, (0.0, 1.0)) for j in jobs])
        for key, shape in (("mask", latent), ("inpaint", size)):  # where a job has none it is white
            if any(getattr(j, key) for j in jobs):
                white = np.ones(shape, np.float32)
                given[key] = np.stack([self.mask(path, shape) if (path := getattr(j, key)) else white for j in jobs])
        if "inpaint" in given:
            given["inpaint"] = given["inpaint"] >= 0.5
        if jobs[0].image:
            given["image"] = np.stack([self.image(j.image, size) for j in jobs])
        return given

    def _condition(self, path: str, name: str, size: tuple[int, int]) -> np.ndarray:
        return self.known[name].fit(self.read(path, name), *size)

    def _mask(self, path: str, size: tuple[int, int]) -> np.ndarray:
        """Values in [0, 1], float32 ``[H, W]``: 1 is white. What is transparent is black: strokes alone are a mask."""
        picture = open_condition(path, _MASK)
        if picture.has_transparency_data and not picture.mode.startswith("I;16"):  # which have one grey, at most
            picture = over(picture, "black")
        return _MASK.fit(_MASK.definition.decode(picture, path), *size)

    def _image(self, path: str, size: tuple[int, int]) -> np.ndarray:
        """float32 ``[H, W, 3]`` in [-1, 1]."""
        picture = read_image(path)
        top, left, bottom, right = cover(picture.height, picture.width, *size)
        fitted = picture.resize(size[::-1], Image.Resampling.LANCZOS, (left, top, right, bottom))
        return np.asarray(fitted, np.float32) / 127.5 - 1
