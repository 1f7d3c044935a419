"""How well pictures follow their conditions, and how much they differ: pure numpy functions.

Pictures are float ``[N, H, W, 3]`` in [-1, 1], label maps integer arrays, sketches float ``[N, H, W]`` in [0, 1].
"""

import numpy as np
from scipy import ndimage

EDGE_THRESHOLD = 0.12
"""Least gradient (value per pixel, values in [-1, 1]) of an edge; a lone step of height h has h / 2.

Chosen with :data:`SKETCH_THRESHOLD` for the best F1 of 32x32 test scenes against their own sketches: 0.90 (precision
0.86, recall 0.93). Against the sketch of another scene, which is the level of chance, it is 0.66.
"""

SKETCH_THRESHOLD = 0.35
"""Least ink (1 - value) of a pixel that counts as drawn: a 1-pixel line between two pixels leaves one half in each."""


def _check_range(name: str, values: np.ndarray, low: float, high: float) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite")
    if values.size and (values.min() < low - 1e-3 or values.max() > high + 1e-3):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {values.min()} to {values.max()}")


def confusion_matrix(predicted: np.ndarray, target: np.ndarray, classes: int) -> np.ndarray:
    """Counts how often each target class was given each label.

    Args:
      predicted: integer labels in 0..classes-1, any shape.
      target: the true labels, of the same shape.
      classes: number of classes C.

    Returns:
      int64 ``[C, C]``; row is the target's class, column the predicted one. Matrices of batches add up.

    Raises:
      ValueError: shapes differ, labels are no integers or lie outside 0..C-1.
    """
    predicted, target = np.asarray(predicted), np.asarray(target)
    if predicted.shape != target.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, target {target.shape}")
    for name, labels in (("predicted", predicted), ("target", target)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name} must hold integer labels, got {labels.dtype}")
        if labels.size and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(f"{name} has labels {labels.min()}..{labels.max()}, expected 0..{classes - 1}")
    pairs = target.ravel().astype(np.int64) * classes + predicted.ravel().astype(np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class.

    Args:
      confusion: counts ``[C, C]`` from :func:`confusion_matrix`.

    Returns:
      float64 ``[C]`` in [0, 1]; NaN for a class that is in neither the target nor the prediction.

    Raises:
      ValueError: the matrix is not square or has negative counts.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix is square, got shape {confusion.shape}")
    if (confusion < 0).any():
        raise ValueError("a confusion matrix has no negative counts")
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of :func:`class_iou` over the classes that occur, in [0, 1].

    Args:
      confusion: counts ``[C, C]``, of a whole data set rather than of one picture.

    Raises:
      ValueError: no class occurs, or the matrix is malformed.
    """
    iou = class_iou(confusion)
    if np.isnan(iou).all():
        raise ValueError("the mean IoU of an empty confusion matrix is undefined")
    return float(np.nanmean(iou))


def edge_map(images: np.ndarray, threshold: float = EDGE_THRESHOLD) -> np.ndarray:
    """Finds edges: pixels whose Sobel gradient, in the strongest of the three channels, reaches ``threshold``.

    Args:
      images: ``[N, H, W, 3]`` in [-1, 1].
      threshold: least gradient magnitude, in value per pixel; the default suits 32x32 scenes.

    Returns:
      bool ``[N, H, W]``. Edges are not thinned: a clean step marks the pixel on either side.

    Raises:
      ValueError: wrong shape or range.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must have shape [N, H, W, 3], got {images.shape}")
    images = images.astype(np.float32)
    _check_range("images", images, -1, 1)
    smooth, slope = (np.array(w, np.float32) for w in ((0.25, 0.5, 0.25), (-0.5, 0, 0.5)))

    def derivative(along: int, across: int) -> np.ndarray:
        steps = ndimage.correlate1d(images, slope, axis=along, mode="nearest")
        return ndimage.correlate1d(steps, smooth, axis=across, mode="nearest")

    return np.hypot(derivative(1, 2), derivative(2, 1)).max(-1) >= threshold


def edge_f1(
    images: np.ndarray, sketches: np.ndarray, tolerance: int = 1, threshold: float = EDGE_THRESHOLD
) -> dict[str, float]:
    """Agreement of the pictures' edges with the sketches that they should follow.

    A sketch pixel is found if an edge lies within ``tolerance`` pixels (Chebyshev), and an edge pixel is right if a
    sketch pixel does. The counts are pooled over all pictures. A sketch holds no lines for clouds, snow and texture,
    and faint ripples or ridges leave no edge, so real scenes reach 0.90; other scenes' sketches give 0.66 by chance.

    Args:
      images: ``[N, H, W, 3]`` in [-1, 1].
      sketches: ``[N, H, W]`` in [0, 1], black (0) on white (1).
      tolerance: pixels, at least 0.
      threshold: least gradient of an edge, see :func:`edge_map`.

    Returns:
      ``precision`` (share of the edge pixels that are right), ``recall`` (share of the sketch pixels that are
      found) and ``f1``, their harmonic mean; a share of nothing is 1.

    Raises:
      ValueError: wrong shapes, ranges or tolerance.
    """
    sketches = np.asarray(sketches)
    if sketches.ndim != 3 or sketches.shape != np.shape(images)[:-1]:
        raise ValueError(f"images [N, H, W, 3] need sketches [N, H, W], got {np.shape(images)} and {sketches.shape}")
    if tolerance < 0 or tolerance != int(tolerance):
        raise ValueError(f"tolerance must be a whole number of pixels, at least 0, got {tolerance}")
    _check_range("sketches", sketches, 0, 1)
    edges, drawn = edge_map(images, threshold), sketches <= 1 - SKETCH_THRESHOLD
    side = 2 * int(tolerance) + 1

    def share_near(these: np.ndarray, those: np.ndarray) -> float:
        near = ndimage.maximum_filter(those, size=(1, side, side), mode="constant", cval=0)
        return float(near[these].mean()) if these.any() else 1.0

    precision, recall = share_near(edges, drawn), share_near(drawn, edges)
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}


def diversity(samples: np.ndarray) -> float:
    """How much the samples of one condition differ from seed to seed.

    Args:
      samples: ``[K, N, H, W, 3]`` in [-1, 1], K >= 2 seeds for each of N conditions.

    Returns:
      The root mean square difference of two samples' values, averaged over all pairs of seeds and then over
      conditions; in units of pixel values (0 is identical, 2 is black against white).

    Raises:
      ValueError: wrong shape or range, or fewer than two seeds.
    """
    samples = np.asarray(samples)
    if samples.ndim != 5 or samples.shape[-1] != 3 or not samples.size:
        raise ValueError(f"samples must have shape [K, N, H, W, 3], not empty, got {samples.shape}")
    if len(samples) < 2:
        raise ValueError(f"diversity needs at least two seeds, got K={len(samples)}")
    samples = samples.astype(np.float64)
    _check_range("samples", samples, -1, 1)
    pairs = zip(*np.triu_indices(len(samples), 1), strict=True)
    return float(np.mean([np.sqrt(((samples[i] - samples[j]) ** 2).mean((1, 2, 3))) for i, j in pairs]))
