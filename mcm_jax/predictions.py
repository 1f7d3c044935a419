r"""Converters between what a diffusion network may predict: eps, x_0 or v.

With ``x_t = alpha x_0 + sigma eps`` and ``alpha^2 + sigma^2 = 1`` (:mod:`mcm_jax.schedules`), the velocity of Salimans
& Ho 2022 (app. D) is ``v = alpha eps - sigma x_0``, and any one of the three gives the other two.

In every function x_t and the prediction have one shape ``[B, ...]``; alpha and sigma are float32 ``[B]``, the
schedule's values at each example's timestep; the result has x_t's shape. All are pure and work under ``jit``, ``grad``.
"""

import jax

from mcm_jax.schedules import PREDICTION_TYPES


def eps_to_x0(eps: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """``x_0 = (x_t - sigma eps) / alpha``. Not finite where alpha = 0, which no :meth:`Schedule.alpha` is."""
    return (x_t - _like(sigma, x_t) * eps) / _like(alpha, x_t)


def x0_to_eps(x0: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """``eps = (x_t - alpha x_0) / sigma``. Not finite where sigma = 0."""
    return (x_t - _like(alpha, x_t) * x0) / _like(sigma, x_t)


def v_to_eps(v: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """``eps = alpha v + sigma x_t``."""
    return _like(alpha, x_t) * v + _like(sigma, x_t) * x_t


def eps_to_v(eps: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """``v = (eps - sigma x_t) / alpha``. Not finite where alpha = 0."""
    return (eps - _like(sigma, x_t) * x_t) / _like(alpha, x_t)


def to_eps(
    prediction: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array, prediction_type: str
) -> jax.Array:
    """A network's prediction as eps.

    Args:
        prediction: the network's output, x_t's shape.
        x_t: noisy images or latents ``[B, ...]``.
        alpha: float32 ``[B]``.
        sigma: float32 ``[B]``.
        prediction_type: diffusers' name: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return v_to_eps(prediction, x_t, alpha, sigma)
    if prediction_type == "sample":
        return x0_to_eps(prediction, x_t, alpha, sigma)
    raise ValueError(f"prediction_type: found {prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}")


def _like(coefficient: jax.Array, x: jax.Array) -> jax.Array:
    """``[B]`` to ``[B, 1, ...]``, so that it multiplies each example of x."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1))
