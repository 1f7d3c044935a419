"""Nets that ship with the package as extractors of conditions (:mod:`mcm_jax.data.extract`).

``python -m mcm_jax.data make DATA --extract=segmentation=mcm_jax.evaluation.extractors:scenes``
"""

import dataclasses
import functools

import numpy as np

from mcm_jax.evaluation.judges.readers import resize_images
from mcm_jax.evaluation.segmenter import Segmenter, load_segmenter
from mcm_jax.modalities import Modality


@functools.cache
def _scenes() -> Segmenter:
    return dataclasses.replace(load_segmenter(), batch=1)  # extractors see one picture at a time


def scenes(images: np.ndarray) -> np.ndarray:
    """Labels of scenes, by the net that judges segmentations.

    Args:
      images: float32 ``[B, H, W, 3]`` in [-1, 1], of any size; the net sees them at its own, 32x32.

    Returns:
      uint8 ``[B, H, W]``, indices into :data:`mcm_jax.data.scenes.CLASSES`.
    """
    net = _scenes()
    found = net.predict(resize_images(images, net.config["height"], net.config["width"]))
    return Modality("segmentation", "labels", len(net.classes)).resize_all(found, *images.shape[1:3])
