"""Depth, normals and pose of scenes, plug-ins of `make --extract` and of the judges: what nets are to photographs.

All three follow from the labels that the shipped segmentation net reads, by rule. They are no physics: they are maps of
their kinds that pictures decide and a judge can read back.

--extract=depth=benchmarks.scene_maps:depth,normals=benchmarks.scene_maps:normals,pose=benchmarks.scene_maps:pose
"""

import numpy as np
from scipy import ndimage

from mcm_jax.data.scenes import CLASSES
from mcm_jax.evaluation.extractors import scenes as labels_of

SKY, SUN, MOUNTAIN, WATER, MEADOW, TREE = (
    CLASSES.index(c) for c in ("sky", "sun", "mountain", "water", "meadow", "tree")
)
_WIDTH = 0.04  # of a keypoint's blob, as a share of the picture's height


def depth(images: np.ndarray) -> np.ndarray:
    """How near each pixel is: float32 ``[B, H, W]`` in [0, 1], of ``[B, H, W, 3]`` in [-1, 1].

    The sky 0, sun or moon 0.1, mountains 0.35, ground from 0.4 at half height to 1 at the lower edge, trees 0.9.
    """
    labels = labels_of(images)
    height = labels.shape[1]
    ground = np.clip(0.4 + 1.2 * (np.arange(height) / (height - 1) - 0.5), 0.4, 1)[:, None]
    near = np.select(
        [labels == SUN, labels == MOUNTAIN, (labels == WATER) | (labels == MEADOW), labels == TREE],
        [0.1, 0.35, np.broadcast_to(ground, labels.shape), 0.9],
        0.0,
    )
    return near.astype(np.float32)


def normals(images: np.ndarray) -> np.ndarray:
    """Normals as colours, float32 ``[B, H, W, 3]`` in [0, 1]: ground up, mountains by the slope of their outline.

    Trees face the viewer. Sky, sun and moon have none: black, which is unknown.
    """
    labels = labels_of(images)
    vectors = np.zeros((*labels.shape, 3), np.float32)
    vectors[(labels == WATER) | (labels == MEADOW)] = 0, 0.9, 0.436
    vectors[labels == TREE] = 0, 0, 1
    for one, out in zip(labels == MOUNTAIN, vectors, strict=True):
        top = np.where(one.any(0), one.argmax(0), one.shape[0]).astype(np.float32)
        slope = np.gradient(ndimage.gaussian_filter1d(top, 1.5, mode="nearest"))
        found = np.stack([slope, np.full_like(slope, 0.6), np.full_like(slope, 0.8)], -1)  # x to the right, y up
        found /= np.linalg.norm(found, axis=-1, keepdims=True)
        out[one] = np.broadcast_to(found, (*one.shape, 3))[one]
    known = np.linalg.norm(vectors, axis=-1, keepdims=True) > 0
    return np.where(known, (vectors + 1) / 2, 0).astype(np.float32)


def points(images: np.ndarray) -> np.ndarray:
    """Keypoints, float32 ``[B, 3, 3]`` of y, x, confidence: sun or moon, the highest peak, the lower edge of trees."""
    labels = labels_of(images)
    out = np.zeros((len(labels), 3, 3), np.float32)
    for one, found in zip(labels, out, strict=True):
        if (one == SUN).any():
            found[0] = *np.argwhere(one == SUN).mean(0), 1
        if (one == MOUNTAIN).any():
            found[1] = *np.argwhere(one == MOUNTAIN)[0], 1
        if (one == TREE).any():
            rows, columns = np.nonzero(one == TREE)
            found[2] = rows.max(), np.median(columns[rows == rows.max()]), 1
    return out


def pose(images: np.ndarray) -> np.ndarray:
    """:func:`points` as blobs, one in each colour: float32 ``[B, H, W, 3]`` in [0, 1]."""
    height, width = images.shape[1:3]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    maps = []
    for found in points(images):
        far = [((y - p[0]) ** 2 + (x - p[1]) ** 2) / (2 * (_WIDTH * height) ** 2) for p in found]
        maps.append(np.stack([p[2] * np.exp(-d) for p, d in zip(found, far, strict=True)], -1))
    return np.stack(maps).astype(np.float32)
