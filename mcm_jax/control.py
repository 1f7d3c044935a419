"""What acts on which sample, how much and when: settings become numbers for each call of the network.

All of it is data to one compiled program (:mod:`mcm_jax.engine`): another strength, window, schedule or subset is other
numbers in arrays of the same shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcm_jax.samplers import Table
from mcm_jax.sampling import SamplingSettings


class Control(NamedTuple):
    """How one MCM acts on B samples in the R calls of the network.

    Attributes:
      conditions: of each modality, ``[B, H, W]`` or ``[B, H, W, planes]``, on the MCM's grid.
      subsets: bool ``[B, R, M + 1, M]``, see :func:`subsets_of`.
      weights: float32 ``[B, R, M + 1]``.
      scale: float32 ``[B, R]``, what its change of the prediction is multiplied with; 0 where it rests.
    """

    conditions: Mapping[str, Any]
    subsets: Any
    weights: Any
    scale: Any


def subsets_of(strengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Strengths of modalities as a weighted sum of predictions, each under a subset of them that is fully shown.

    With the modalities from the strongest on, ``eps'(s) = (1 - s_1) eps'({}) + (s_1 - s_2) eps'({1}) + ... +
    s_M eps'({1..M})``: linear between strengths 0 and 1, where it is the MCM's own prediction for a subset (the Lovász
    extension of these), and going on beyond. An MCM has seen nothing between shown and absent, so it is not asked.

    Args:
      strengths: ``[N, M]``, at least 0; 0 is absent.

    Returns:
      ``(subsets, weights)``, bool ``[N, M + 1, M]`` and float32 ``[N, M + 1]``; weights sum to 1, the subsets whose
      weight is 0 come last. Where all strengths are 0 or 1 that is all but the first.
    """
    order = np.argsort(-strengths, axis=1, kind="stable")
    falling = np.take_along_axis(np.asarray(strengths, np.float64), order, axis=1)
    weights = -np.diff(np.pad(np.pad(falling, ((0, 0), (1, 0)), constant_values=1), ((0, 0), (0, 1))), axis=1)
    count = np.arange(strengths.shape[1] + 1)
    subsets = np.argsort(order, axis=1)[:, None] < count[:, None]  # the count strongest
    first = np.argsort(weights == 0, axis=1, kind="stable")
    return np.take_along_axis(subsets, first[..., None], 1), np.take_along_axis(weights, first, 1).astype(np.float32)


def plan(
    conditions: Mapping[str, np.ndarray],
    strengths: np.ndarray,
    windows: np.ndarray,
    weights: np.ndarray,
    each: Sequence[SamplingSettings],
    table: Table,
    rests_unasked: bool = False,
) -> tuple[Control, np.ndarray]:
    """Of one MCM and a batch.

    Args:
      conditions: of each of its modalities.
      strengths: ``[B, M]``, at least 0; 0 is absent.
      windows: ``[B, M, 2]``, the shares of the steps between which each modality is shown.
      weights: ``[B]``, of the MCM.
      each: the settings of each sample.
      table: filled up or not.
      rests_unasked: whether it does nothing for a sample that shows it none of its modalities. One whose modalities
        are all outside their windows always rests.

    Returns:
      The control, and how many of the subsets any sample of the batch needs, int32 ``[R]``.
    """
    count, rows = int(table.count), len(table.t)
    share = np.asarray(table.share[:count], np.float32)

    bounds = np.asarray(windows, np.float32)
    shown = (bounds[..., :1] <= share) & (share < bounds[..., 1:])  # [B, M, count]
    now = np.where(shown, strengths[..., None], 0.0).swapaxes(1, 2)  # [B, count, M]
    subsets, parts = subsets_of(now.reshape(-1, strengths.shape[1]))
    subsets, parts = (x.reshape(*now.shape[:2], *x.shape[1:]) for x in (subsets, parts))

    start, end = (np.array([getattr(s, k) for s in each], np.float32)[:, None] for k in ("start", "end"))
    factors = [s.guidance * _scheduled(s.guidance_schedule, share) for s in each]
    asked = (strengths > 0).any(1)[:, None]
    rests = (asked | rests_unasked) & ~(now > 0).any(2)
    acts = (start <= share) & (share < end) & ~rests
    scale = np.where(acts, np.asarray(weights)[:, None] * np.array(factors), 0.0).astype(np.float32)

    def fill(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, rows - count), *[(0, 0)] * (x.ndim - 2)])

    needed = np.where(scale != 0, np.count_nonzero(parts, axis=2), 0).max(0, initial=0).astype(np.int32)
    return Control(conditions, fill(subsets), fill(parts), fill(scale)), np.pad(needed, (0, rows - count))


def _scheduled(factors: Sequence[float], share: np.ndarray) -> np.ndarray:
    """Factors that are evenly spaced over the steps, at ``share`` of them: the last is reached in the last step."""
    if not factors:
        return np.ones(len(share))
    return np.interp(share / max(share[-1], 1e-9), np.linspace(0, 1, len(factors)), factors)
