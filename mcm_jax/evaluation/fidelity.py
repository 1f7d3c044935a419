"""How like real pictures samples are, as sets: distances between features, arrays ``[N, D]`` of any net.

No net is in here: a distance is as good as its features, and compares with nothing that was measured by others.
"""

from collections.abc import Callable

import numpy as np

_KEPT, _SUBSETS = 0.75, 50  # of the jackknife: the share of the pictures in a subset, and how many
_ROWS = 256  # of a matrix of distances at a time


def least(features: np.ndarray) -> int:
    """How many pictures :func:`fid` needs: more than features have dimensions, or the covariance is singular."""
    return features.shape[1] + 1


def fid(found: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance between two sets of features (Heusel et al. 2017, eq. 6), each taken as a Gaussian.

    ``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``. Few pictures bias it upwards: compare equal numbers.

    Args:
      found: ``[N, D]``.
      real: ``[M, D]``.

    Raises:
      ValueError: fewer pictures than :func:`least`, or sets of different features.
    """
    found, real = _checked(found, real)
    if min(len(found), len(real)) < least(found):
        raise ValueError(
            f"FID on {found.shape[1]} features needs at least {least(found)} pictures on either side, got {len(found)} "
            f"and {len(real)}"
        )
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (found, real))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # The product's eigenvalues are those of this symmetric matrix, whose root needs no complex numbers.
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * both)


def kid(found: np.ndarray, real: np.ndarray) -> float:
    """Squared maximum mean discrepancy, unbiased, by the kernel ``(x.y / D + 1)^3`` (Binkowski et al. 2018, eq. 4).

    Over whole sets, where others average it over random subsets of 1,000. Around 0, and negative as often as positive,
    for two samples of one distribution. A picture that is in both sets is not compared with itself, which is no
    comparison of two draws (ours): equal sets are at 0.

    Args:
      found: ``[N, D]``, N at least 2.
      real: ``[M, D]``, M at least 2.

    Raises:
      ValueError: fewer pictures, or sets of different features.
    """
    found, real = _checked(found, real)
    n, m = len(found), len(real)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least 2 pictures on either side, got {n} and {m}")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(found, found), kernel(real, real)))
    across = kernel(found, real)
    squares = (found**2).sum(1)[:, None] + (real**2).sum(1)
    others = squares - 2 * found @ real.T > 1e-12 * squares
    return float(own - 2 * across[others].mean()) if others.any() else 0.0


def interval(distance: Callable[[np.ndarray, np.ndarray], float], found: np.ndarray, real: np.ndarray) -> float:
    """Half of a distance's 95% interval, by the delete-d jackknife (Shao & Wu 1989): how it varies over subsets.

    Args:
      distance: :func:`fid` or :func:`kid`.
      found: ``[N, D]``.
      real: ``[M, D]``.

    Raises:
      ValueError: as `distance`, of three quarters of the pictures.
    """
    rng, values = np.random.default_rng(0), []
    sizes = [min(round(len(x) * _KEPT), len(x) - 1) for x in (found, real)]  # all of two would vary by nothing
    for _ in range(_SUBSETS):
        parts = (x[rng.permutation(len(x))[:size]] for x, size in zip((found, real), sizes, strict=True))
        values.append(distance(*parts))
    return float(1.96 * np.sqrt(_KEPT / (1 - _KEPT) * np.var(values, ddof=1)))


def nearest(found: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Euclidean distance of each picture's features to the nearest real one's: float64 ``[N]``.

    Where samples are much nearer to the training pictures than other real pictures are, they are copies of these.
    """
    found, real = _checked(found, real)
    squares = (real**2).sum(1)
    parts = [np.zeros(0)]
    for start in range(0, len(found), _ROWS):
        part = found[start : start + _ROWS]
        distances = (part**2).sum(1)[:, None] - 2 * part @ real.T + squares
        parts.append(np.sqrt(np.maximum(distances.min(1), 0)))
    return np.concatenate(parts)


def _checked(found: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, real = np.asarray(found, np.float64), np.asarray(real, np.float64)
    if found.ndim != 2 or real.ndim != 2 or found.shape[1] != real.shape[1]:
        raise ValueError(f"expected features [N, D] and [M, D], got {list(found.shape)} and {list(real.shape)}")
    if not (np.isfinite(found).all() and np.isfinite(real).all()):
        raise ValueError("features must be finite")
    return found, real
