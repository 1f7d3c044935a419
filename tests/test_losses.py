"""The weight of a loss says in which space the error is measured, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax.losses import WEIGHTINGS, modulation_size, prediction_error, weight
from mcm_jax.predictions import eps_to_v, eps_to_x0

# abar of four examples: nearly clean, balanced, noisy, nearly noise
ABAR = np.array([0.99, 0.5, 0.1, 0.001])


def _coefficients(abar=ABAR):
    abar = np.asarray(abar, np.float64)
    return jnp.asarray(np.sqrt(abar), jnp.float32), jnp.asarray(np.sqrt(1 - abar), jnp.float32)


@pytest.mark.parametrize(
    "weighting, expected",
    [
        ("eps", [1, 1, 1, 1]),
        ("x0", [1 / 99, 1, 5, 5]),  # noise over signal, (1 - abar) / abar, is 9 and 999 in the last two
        ("v", [1 / 0.99, 2, 10, 20]),
        ("min_snr", [5 / 99, 1, 1, 1]),  # the signal-to-noise ratio is 99 in the first
    ],
)
def test_weights_by_hand(weighting, expected):
    w = weight(weighting, *_coefficients())
    assert w.shape == (4,) and w.dtype == jnp.float32
    np.testing.assert_allclose(w, expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_finite_and_bounded_on_the_whole_schedule(weighting):
    """Also at its ends: at zero SNR alpha is 0, and a schedule may start without noise."""
    w = np.asarray(weight(weighting, *_coefficients([1.0, 1 - 1e-6, 0.5, 1e-6, 0.0])))
    assert np.isfinite(w).all() and w.min() >= 0 and w.max() <= 20


@pytest.mark.parametrize("weighting, convert", [("v", eps_to_v), ("x0", eps_to_x0)])
def test_a_weighted_eps_error_is_the_error_in_that_space(weighting, convert):
    alpha, sigma = _coefficients(np.linspace(0.2, 0.99, 8))  # where no bound is active
    x_t, noise, modulated = (jax.random.normal(jax.random.key(i), (8, 4, 6, 3)) for i in range(3))
    there = jnp.square(convert(modulated, x_t, alpha, sigma) - convert(noise, x_t, alpha, sigma)).mean((1, 2, 3))
    np.testing.assert_allclose(weight(weighting, alpha, sigma) * prediction_error(modulated, noise), there, rtol=1e-4)


def test_min_snr_is_the_x0_error_with_a_bounded_weight():
    """Hang et al. weigh the x0 error by min(snr, 5); an x0 error is an eps error times 1 / snr."""
    alpha, sigma = _coefficients(np.linspace(0.05, 0.99, 8))
    snr = jnp.square(alpha / sigma)
    np.testing.assert_allclose(weight("min_snr", alpha, sigma), jnp.minimum(snr, 5.0) / snr, rtol=1e-5)


@pytest.mark.parametrize(
    "gamma, expected", [(1.0, [1 / 99, 1, 1, 1]), (5.0, [5 / 99, 1, 1, 1]), (0.05, [0.05 / 99, 0.05, 0.45, 1])]
)
def test_gamma_bounds_min_snr_alone(gamma, expected):
    np.testing.assert_allclose(weight("min_snr", *_coefficients(), gamma), expected, rtol=1e-4)
    for weighting in set(WEIGHTINGS) - {"min_snr"}:
        np.testing.assert_array_equal(weight(weighting, *_coefficients(), gamma), weight(weighting, *_coefficients()))


def test_an_unknown_weighting_is_named():
    with pytest.raises(ValueError, match="weighting must be one of .*'eps', 'x0', 'v', 'min_snr'.*, got 'snr'"):
        weight("snr", *_coefficients())


def test_errors_are_of_one_example_each():
    a, b = (np.random.default_rng(i).standard_normal((3, 4, 6, 2)).astype(np.float32) for i in range(2))
    np.testing.assert_allclose(prediction_error(a, b), ((a - b) ** 2).reshape(3, -1).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(prediction_error(a, a), np.zeros(3))
    expected = np.abs(a).reshape(3, -1).mean(1) + np.abs(b).reshape(3, -1).mean(1)
    np.testing.assert_allclose(modulation_size(a, b), expected, rtol=1e-5)
    np.testing.assert_array_equal(modulation_size(0 * a, 0 * b), np.zeros(3))
