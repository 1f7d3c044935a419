"""Scenes in another palette: the same landscapes in winter, their maps unchanged. What bases are fine-tuned to."""

import numpy as np

# By class: a colour, and how its brightness follows the summer picture's, as lift + gain * luminance; and how much of
# the summer colour stays, which keeps the hue of the time of day. RGB in [0, 1].
_WINTER = {
    "sky": ((0.90, 0.96, 1.00), 0.22, 0.92, 0.35),  # pale
    "sun": ((1.00, 0.97, 0.93), 0.10, 0.95, 0.50),
    "mountain": ((0.80, 0.92, 1.00), 0.10, 0.85, 0.00),  # bare rock, blue
    "water": ((0.60, 0.98, 1.00), 0.34, 0.95, 0.00),  # ice
    "meadow": ((1.00, 0.99, 1.00), 0.42, 1.00, 0.00),  # snow
    "tree": ((1.00, 0.72, 0.52), 0.10, 0.60, 0.00),  # bare wood
}
_LUMINANCE = np.array((0.299, 0.587, 0.114), np.float32)


def winter(image: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """Recolours a rendered scene, each class by a colour map of its own.

    Args:
      image: float32 ``[..., 3]`` in [-1, 1].
      segmentation: classes of the scenes ``[...]``.

    Returns:
      float32 ``[..., 3]`` in [-1, 1].
    """
    tint, lift, gain, keep = (np.array(v, np.float32)[segmentation] for v in zip(*_WINTER.values(), strict=True))
    summer = (image + 1) / 2
    bright = (lift + gain * (summer @ _LUMINANCE))[..., None] * tint
    return np.clip(keep[..., None] * summer + (1 - keep[..., None]) * bright, 0, 1) * 2 - 1
