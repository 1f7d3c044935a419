"""Do samples follow the conditions that they were sampled for? Held-out conditions, and what judges the samples.

Training asks every now and then (:mod:`mcm_jax.training.actions`), ``evaluate.py`` at length. Both know a judge by its
protocol alone; scenes have one.
"""

from typing import Protocol

import numpy as np

from mcm_jax.base import BaseCard
from mcm_jax.data.pipeline import InMemory, to_float
from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.modalities import Modality


class Judge(Protocol):
    """Held-out examples, and how well pictures follow their conditions.

    Attributes:
      names: of the numbers; more is better.
      examples: stacked: ``image`` in [-1, 1], each modality at the base's resolution, ``caption``.
    """

    names: tuple[str, ...]
    examples: dict[str, np.ndarray]

    def __call__(self, images: np.ndarray) -> dict[str, float]:
        """The numbers by their names, of one picture an example, ``[N, H, W, 3]`` in [-1, 1]."""
        ...


class ScenesJudge:
    """Judges pictures of held-out scenes by the shipped segmentation net, and their edges against the sketches.

    Args:
      seed: of the scenes.
      count: how many.
      card: of the base.
      modalities: which conditions.

    Raises:
      UserError: the net does not take pictures of the base's size.
    """

    names = ("mean_iou", "edge_f1")

    def __init__(self, seed: int, count: int, card: BaseCard, modalities: tuple[Modality, ...]):
        self._segmenter = load_segmenter()
        height, width, _ = card.image_shape
        self._size = size = self._segmenter.config["height"]
        self._factor = height // size
        if height != width or height % size:
            raise UserError(
                f"the shipped segmentation net reads {size}x{size} pictures, or larger ones by a whole factor, but the "
                f"base {card.name!r} makes {height}x{width}: its samples cannot be evaluated yet"
            )
        source = InMemory.render(Scenes("test", count, height, width, seed))
        self.examples = to_float(source.arrays, [m.name for m in modalities if m.kind != "labels"])
        # Judged at the segmentation net's resolution, against the same scenes drawn at it.
        small = source if height == size else InMemory.render(Scenes("test", count, size, size, seed))
        self._labels, self._sketches = small.arrays["segmentation"], small.arrays["sketch"].astype(np.float32) / 255

    def reduce(self, images: np.ndarray) -> np.ndarray:
        """Pictures at the net's resolution."""
        return images.reshape(-1, self._size, self._factor, self._size, self._factor, 3).mean(axis=(2, 4))

    def details(self, images: np.ndarray) -> dict:
        """``miou`` (over all pixels, mean over classes), ``class_iou``, ``edge_f1`` (precision, recall, F1)."""
        images = self.reduce(images)
        confusion = metrics.confusion_matrix(self._segmenter.predict(images), self._labels, len(CLASSES))
        values = zip(CLASSES, metrics.class_iou(confusion), strict=True)
        return {
            "miou": float(metrics.mean_iou(confusion)),
            # A class that is in no map and in no sample has no IoU.
            "class_iou": {c: None if np.isnan(v) else float(v) for c, v in values},
            "edge_f1": {k: float(v) for k, v in metrics.edge_f1(images, self._sketches).items()},
        }

    def __call__(self, images: np.ndarray) -> dict[str, float]:
        """``mean_iou`` and ``edge_f1``."""
        found = self.details(images)
        return {"mean_iou": found["miou"], "edge_f1": found["edge_f1"]["f1"]}
