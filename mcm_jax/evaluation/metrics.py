"""How well pictures follow their conditions, and how much they differ: pure numpy functions.

Pictures are float ``[N, H, W, 3]`` in [-1, 1], label maps integer arrays, sketches float ``[N, H, W]`` in [0, 1], other
maps float ``[N, H, W]`` or ``[N, H, W, C]``.
"""

import numpy as np
from scipy import ndimage

from mcm_jax.data.colours import to_lab

EDGE_THRESHOLD = 0.12
"""Least gradient (value per pixel, values in [-1, 1]) of an edge; a lone step of height h has h / 2.

Chosen with :data:`SKETCH_THRESHOLD` for the best F1 of 32x32 test scenes against their own sketches: 0.90 (precision
0.86, recall 0.93). Against the sketch of another scene, which is the level of chance, it is 0.66.
"""

SKETCH_THRESHOLD = 0.35
"""Least ink (1 - value) of a pixel that counts as drawn: a 1-pixel line between two pixels leaves one half in each."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales of :func:`ms_ssim`, the finest first (Wang, Simoncelli and Bovik 2003)."""

LEAST_DEPTH = 0.02
"""Least true depth that has a relative error: below five steps of an 8-bit map, its rounding alone is a tenth."""

VISIBLE = 0.5
"""Least confidence of a keypoint that counts as seen."""

_WINDOW, _SIGMA, _K = 11, 1.5, (0.01, 0.03)  # of SSIM: the Gaussian's side and width in pixels, K1 and K2


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


def ms_ssim_scales(height: int, width: int) -> int:
    """How many scales of :func:`ms_ssim` pictures have, each half of the one before: 0 to 5 (from 161 pixels on)."""
    scales = 0
    while scales < len(MS_SSIM_WEIGHTS) and min(height, width) >= _WINDOW:
        scales, height, width = scales + 1, -(-height // 2), -(-width // 2)
    return scales


def ms_ssim(found: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003) of each map with its target.

    A Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, five scales with :data:`MS_SSIM_WEIGHTS`. Maps
    that are too small for five have as many as the window fits into, whose weights are scaled to the same sum; numbers
    compare only where there are as many scales. As is usual, what is negative at a scale counts as 0.

    Args:
      found: ``[N, H, W]``, or ``[N, H, W, C]`` whose channels are compared one by one, in [0, 1]; at least 11 pixels
        high and wide.
      target: of the same shape and range.

    Returns:
      float64 ``[N]`` in [0, 1], the mean over channels; 1 for equal maps.

    Raises:
      ValueError: wrong shapes or ranges.
    """
    found, target = _maps(found, target)
    scales = ms_ssim_scales(*found.shape[1:3])
    if not scales:
        raise ValueError(f"maps must have at least {_WINDOW}x{_WINDOW} pixels, got {found.shape[1]}x{found.shape[2]}")
    for name, maps in (("found", found), ("target", target)):
        _check_range(name, maps, 0, 1)
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) * (sum(MS_SSIM_WEIGHTS) / sum(MS_SSIM_WEIGHTS[:scales]))

    def of_pair(x: np.ndarray, y: np.ndarray) -> float:
        each = np.empty((scales, x.shape[-1]))
        for scale in range(scales):
            if scale:
                x, y = _halved(x), _halved(y)
            similarity, contrast = _ssim(x, y)
            each[scale] = similarity if scale == scales - 1 else contrast
        return (np.maximum(each, 0) ** weights[:, None]).prod(0).mean()

    return np.array([of_pair(x, y) for x, y in zip(found, target, strict=True)])


def _ssim(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and its product of contrast and structure, of each channel ``[H, W, C]``: the mean over whole windows."""
    reach = _WINDOW // 2
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SIGMA) ** 2)
    window /= window.sum()

    def blurred(plane: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            plane = ndimage.correlate1d(plane, window, axis=axis)
        return plane[reach:-reach, reach:-reach]

    c1, c2 = (k**2 for k in _K)
    mean_x, mean_y = blurred(x), blurred(y)
    covariance = blurred(x * y) - mean_x * mean_y
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean((0, 1)), contrast.mean((0, 1))


def _halved(plane: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels; an odd row or column is repeated."""
    height, width, channels = plane.shape
    plane = np.pad(plane, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return plane.reshape(-(-height // 2), 2, -(-width // 2), 2, channels).mean((1, 3))


def _maps(found: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two batches of maps as float64 ``[N, H, W, C]``; refuses other shapes."""
    found, target = np.asarray(found, np.float64), np.asarray(target, np.float64)
    if found.shape != target.shape or found.ndim not in (3, 4) or not found.size:
        raise ValueError(
            f"found and target must both be [N, H, W] or [N, H, W, C], not empty, got {found.shape} and {target.shape}"
        )
    return (found[..., None], target[..., None]) if found.ndim == 3 else (found, target)


def depth_errors(found: np.ndarray, target: np.ndarray, align: bool = False) -> dict[str, np.ndarray]:
    """Errors of each depth map.

    Args:
      found: float ``[N, H, W]``.
      target: the true depth, of the same shape, in [0, 1].
      align: whether each map is brought to its target's scale and shift by least squares first, which can turn it
        upside down, too (Ranftl et al. 2020, MiDaS): for nets that know depth, or its inverse, but for these. The fit
        is in the target's units, so both must be depth or both inverse depth.

    Returns:
      Float64 ``[N]`` each: ``rmse``, the root mean square difference over all pixels, in the target's units;
      ``abs_rel``, the mean of ``|found - target| / target`` over pixels whose target is at least
      :data:`LEAST_DEPTH`, NaN for a map without any.

    Raises:
      ValueError: wrong shapes or ranges.
    """
    found, target = (maps.reshape(len(maps), -1) for maps in _maps(found, target))
    _check_range("target", target, 0, 1)
    _check_range("found", found, -np.inf, np.inf)
    if align:
        centred, wanted = (maps - maps.mean(1, keepdims=True) for maps in (found, target))
        variance = (centred**2).sum(1)
        scale = np.divide((centred * wanted).sum(1), variance, out=np.zeros(len(found)), where=variance > 0)
        found = centred * scale[:, None] + target.mean(1, keepdims=True)
    error, counts = np.abs(found - target), target >= LEAST_DEPTH
    relative = np.divide(error, target, out=np.zeros_like(error), where=counts).sum(1)
    number = counts.sum(1)
    return {
        "rmse": np.sqrt((error**2).mean(1)),
        "abs_rel": np.divide(relative, number, out=np.full(len(found), np.nan), where=number > 0),
    }


def colour_distance(found: np.ndarray, target: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean distance of two pictures' colours in CIELAB (CIE76's Delta E; about 2.3 is just noticeable).

    Args:
      found: sRGB colours, uint8 ``[N, H, W, 3]``.
      target: of the same shape and type.
      counts: bool ``[N, H, W]``, which pixels count; None for all.

    Returns:
      float64 ``[N]``, at least 0, 100 for black against white; NaN where no pixel counts.

    Raises:
      ValueError: wrong shapes or types.
    """
    found, target = np.asarray(found), np.asarray(target)
    if found.shape != target.shape or found.ndim != 4 or found.shape[-1] != 3:
        raise ValueError(f"found and target must both be [N, H, W, 3], got {found.shape} and {target.shape}")
    if found.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(f"colours must be uint8, got {found.dtype} and {target.dtype}")
    counts = np.ones(found.shape[:3], bool) if counts is None else counts
    distance = np.sqrt(((to_lab(found) - to_lab(target)) ** 2).sum(-1, dtype=np.float64))
    number = counts.sum((1, 2))
    total = np.where(counts, distance, 0).sum((1, 2))
    return np.divide(total, number, out=np.full(len(found), np.nan), where=number > 0)


def angular_error(found: np.ndarray, target: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Mean angle between two maps of surface normals, in degrees.

    Args:
      found: normals as colours, (v + 1) / 2 of vectors v of any length above 0, float ``[N, H, W, 3]`` in [0, 1].
      target: of the same shape and range.
      counts: bool ``[N, H, W]``, which pixels count; None for all.

    Returns:
      float64 ``[N]`` in [0, 180]; NaN where no pixel counts. A vector of no length is at 90 degrees to all.

    Raises:
      ValueError: wrong shapes or ranges.
    """
    found, target = _maps(found, target)
    if found.shape[-1] != 3:
        raise ValueError(f"normals have three channels, got {found.shape[-1]}")
    for name, maps in (("found", found), ("target", target)):
        _check_range(name, maps, 0, 1)
    a, b = 2 * found - 1, 2 * target - 1
    # Of the cosine alone, small angles would be lost to rounding.
    angle = np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    angle = np.where(lengths > 0, angle, 90.0)
    counts = np.ones(angle.shape, bool) if counts is None else counts
    number = counts.sum((1, 2))
    total = np.where(counts, angle, 0).sum((1, 2))
    return np.divide(total, number, out=np.full(len(found), np.nan), where=number > 0)


def correct_keypoints(found: np.ndarray, target: np.ndarray, alpha: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """How many keypoints are where they should be: their share is PCK (Yang and Ramanan 2013).

    A point of the target counts if it is seen (confidence at least :data:`VISIBLE`); it is right if it is seen in the
    found ones, too, no farther away than ``alpha`` times the longer side of the box around the target's seen points.
    Where that box has no extent (fewer than two points are seen) there is no measure, and no point counts.

    Args:
      found: ``[N, K, 3]``: y and x in pixels, and a confidence in [0, 1].
      target: of the same shape.
      alpha: above 0.

    Returns:
      How many are right, and how many count, int64 ``[N]`` each.

    Raises:
      ValueError: wrong shapes, ranges or alpha.
    """
    found, target = np.asarray(found, np.float64), np.asarray(target, np.float64)
    if found.shape != target.shape or found.ndim != 3 or found.shape[-1] != 3:
        raise ValueError(f"found and target must both be [N, K, 3], got {found.shape} and {target.shape}")
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    for name, points in (("found", found), ("target", target)):
        _check_range(name, points[..., :2], -np.inf, np.inf)
        _check_range(f"confidence of {name}", points[..., 2], 0, 1)
    seen = target[..., 2] >= VISIBLE
    low, high = (
        np.where(seen[..., None], target[..., :2], empty).reshape(len(target), -1, 2) for empty in (np.inf, -np.inf)
    )
    side = (high.max(1, initial=-np.inf) - low.min(1, initial=np.inf)).max(-1)
    counts = seen & (side > 0)[:, None]
    near = np.hypot(*np.moveaxis(found[..., :2] - target[..., :2], -1, 0)) <= alpha * side[:, None]
    return (counts & near & (found[..., 2] >= VISIBLE)).sum(1), counts.sum(1)
