"""Losses of one example each; the mean over the batch is the training step's.

With the noise ``eps`` that made ``x_t = alpha x_0 + sigma eps`` and the modulated prediction ``eps'``, every loss is
``w(t) mean((eps' - eps)^2)``. The weight decides in which space the error is measured, since for a given
``x_t`` the errors of x0 and v are those of eps times ``sigma / alpha`` and ``1 / alpha``:

=========== ===================================== ===============================================================
weighting   w(t)                                  source
=========== ===================================== ===============================================================
``eps``     1                                     the paper's descendant VCM
``x0``      min((1 - abar) / abar, 5)             the other reading of the paper's figure, which ends at x'_0
``v``       min(1 / abar, 20)                     ours: as much weight for the noisy, layout-deciding steps as they bear
``min_snr`` min(snr, gamma) / snr                 Hang et al. 2023, whose gamma is 5
=========== ===================================== ===============================================================

The bounds of x0 and v are ours: without them the steps next to pure noise outweigh all others.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mcm_jax.errors import expect

WEIGHTINGS = ("eps", "x0", "v", "min_snr")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The config's section ``loss``.

    Attributes:
      weighting: ``v`` (ours), ``eps`` (the paper's descendant), ``x0``, ``min_snr``: see mcm_jax/losses.py.
      l1: pull of gamma and nu to zero; VCM: 0.15.
      snr_gamma: of ``min_snr``.
    """

    weighting: str = "v"
    l1: float = 0.0
    snr_gamma: float = 5.0

    def __post_init__(self):
        expect(self.weighting in WEIGHTINGS, "weighting", f"one of {', '.join(WEIGHTINGS)}", self.weighting)
        expect(self.l1 >= 0, "l1", "at least 0", self.l1)
        expect(self.snr_gamma > 0, "snr_gamma", "above 0", self.snr_gamma)


def weight(
    weighting: str | jax.Array, alpha: jax.Array, sigma: jax.Array, snr_gamma: float | jax.Array = 5.0
) -> jax.Array:
    """The weight w of each example.

    Args:
      weighting: one of :data:`WEIGHTINGS`, or its place among them, int32 ``[]``, where that is a program's input.
      alpha: of each example's timestep, ``[B]``.
      sigma: likewise.
      snr_gamma: the gamma of ``min_snr``; of no matter to the others.

    Returns:
      w, float32 ``[B]``.

    Raises:
      ValueError: an unknown weighting.
    """
    if not isinstance(weighting, str):
        return jnp.stack([weight(name, alpha, sigma, snr_gamma) for name in WEIGHTINGS])[weighting]
    abar = jnp.square(alpha)
    snr = abar / jnp.square(sigma)
    match weighting:
        case "eps":
            return jnp.ones_like(alpha)
        case "x0":
            return jnp.minimum(1 / snr, 5.0)
        case "v":
            return jnp.minimum(1 / abar, 20.0)
        case "min_snr":
            return jnp.minimum(1.0, snr_gamma / snr)  # not min(snr, gamma) / snr, which is 0 / 0 at zero SNR
    raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")


def prediction_error(modulated: jax.Array, noise: jax.Array) -> jax.Array:
    """Mean squared error of each example, float32 ``[B]``; both arguments ``[B, H, W, C]``."""
    return jnp.mean(jnp.square(modulated - noise), axis=(1, 2, 3))


def modulation_size(gamma: jax.Array, nu: jax.Array) -> jax.Array:
    """mean |gamma| + mean |nu| of each example, ``[B]``: VCM's L1 pull to zero, which ``loss.l1`` multiplies."""
    return jnp.mean(jnp.abs(gamma), axis=(1, 2, 3)) + jnp.mean(jnp.abs(nu), axis=(1, 2, 3))
