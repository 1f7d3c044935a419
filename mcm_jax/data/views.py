"""Augmentation: several views of each example, image and conditions changed alike, colours of the image alone.

A base's predictions are made once and kept (:mod:`mcm_jax.cache`), so what they are made of must be fixed beforehand:
each example has V views, and each draw of it sees one. View v of example i is a function of (seed, i, v) alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from mcm_jax.data.reading import to_grid
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality


def check_views(views: int, flip: bool, crop: float, jitter: float) -> None:
    """Raises UserError where views would not differ or nothing would be augmented."""
    expect(0 < crop <= 1, "crop", "above 0 and at most 1", crop)
    expect(views >= 1, "views", "at least 1", views)
    expect(0 <= jitter < 1, "jitter", "at least 0 and below 1", jitter)
    if views == 1 and (flip or crop < 1 or jitter):
        raise UserError(
            "views=1 is the picture as it is, so data.flip, data.crop and data.jitter change nothing: set data.views "
            "to 2 with flip alone, or to as many as draws.count with crop or jitter"
        )
    if crop == 1 and not jitter and views > (2 if flip else 1):
        raise UserError(
            f"views={views}, but there are only {2 if flip else 1} different ones with data.flip={flip}, no crop "
            f"and no jitter; set data.crop below 1 or data.jitter above 0, or fewer views"
        )


class Views:
    """A random-access source of the views of another source's examples: ``[i * V + v]`` is view v of example i.

    View 0 is the example as it is. Where `flip` asks for it, odd views are mirrored, left to right. Where `crop` is
    below 1, each view but the first shows a part of the example, brought back to the grid: the part's sides are a share
    of the example's, uniform in [crop, 1], its place is uniform. Where `jitter` is above 0, each view but the first
    has the picture's brightness, contrast and saturation multiplied, one after the other, by factors uniform in
    [1 - jitter, 1 + jitter].

    Args:
      source: gives ``image`` (uint8 ``[H, W, 3]``) and the modalities on the same grid.
      modalities: which conditions.
      views: V.
      flip: whether odd views are mirrored.
      crop: the least share of the sides that is shown.
      jitter: how far colours are changed.
      swaps: by modality of labels, what each class becomes where it is mirrored (a left eye is a right one then): int
        ``[classes]``. Other values stay.
      seed: of shares, places and colours.

    Raises:
      UserError: the views would not differ, or nothing would be augmented; names the config's keys.
    """

    def __init__(
        self,
        source: Sequence[dict],
        modalities: Sequence[Modality],
        *,
        views: int = 1,
        flip: bool = False,
        crop: float = 1.0,
        jitter: float = 0.0,
        swaps: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
    ):
        check_views(views, flip, crop, jitter)
        self.source, self.modalities = source, tuple(modalities)
        self.views, self.flip, self.crop, self.seed = views, flip, crop, seed
        self.jitter, self.swaps = jitter, swaps or {}

    def __len__(self) -> int:
        return len(self.source) * self.views

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        index, view = divmod(range(len(self))[row], self.views)  # row -1 is the last one, by the same numbers
        example = dict(self.source[index])
        if view and self.crop < 1:
            self._cut(example, np.random.default_rng((self.seed, index, view)))
        if view and self.jitter:  # by numbers of its own: the same parts are shown with it and without
            example["image"] = self._jittered(example["image"], np.random.default_rng((self.seed, index, view, 1)))
        if view % 2 and self.flip:
            example["image"] = np.ascontiguousarray(example["image"][:, ::-1])
            for m in self.modalities:
                example[m.name] = m.mirror(example[m.name])
            for name, becomes in self.swaps.items():
                example[name] = _swapped(example[name], becomes)
        return example

    def _jittered(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picture = Image.fromarray(image)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = change(picture).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        return np.array(picture)

    def _cut(self, example: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        height, width = example["image"].shape[:2]
        share = rng.uniform(self.crop, 1)
        top, left = rng.uniform(0, (1 - share) * height), rng.uniform(0, (1 - share) * width)
        box = top, left, top + share * height, left + share * width
        picture = Image.fromarray(example["image"])
        whole = (left, top, box[3], box[2])
        example["image"] = np.array(picture.resize((width, height), Image.Resampling.LANCZOS, whole))
        for m in self.modalities:
            condition = example[m.name]
            example[m.name] = to_grid(m, m.unpack(condition), box, height, width).astype(condition.dtype, copy=False)


def _swapped(labels: np.ndarray, becomes: np.ndarray) -> np.ndarray:
    known = labels < len(becomes)
    return np.where(known, becomes[np.where(known, labels, 0)], labels).astype(labels.dtype)
