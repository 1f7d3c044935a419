"""Conversion cycles, and diffusers' velocity."""

import inspect

import jax
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from mcm_jax import predictions
from mcm_jax.schedules import Schedule


@pytest.fixture(scope="module", params=[(4, 4, 2), (6,)], ids=["maps", "vectors"])
def example(request):
    """x_0, eps, x_t, alpha, sigma, t of three examples."""
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, 3, *request.param)).astype(np.float32)
    schedule, t = Schedule.from_config({"_class_name": "DDPMScheduler"}), np.array([1, 300, 800], np.int32)
    return x0, eps, schedule.add_noise(x0, eps, t), schedule.alpha(t), schedule.sigma(t), t


def velocity(x0, eps, t):
    return DDPMScheduler().get_velocity(*map(torch.tensor, (x0, eps)), torch.tensor(t, dtype=torch.long)).numpy()


@pytest.mark.parametrize("convert", ["eps_to_x0", "x0_to_eps", "eps_to_v", "v_to_eps"])
def test_each_converter_gives_the_true_value(convert, example):
    x0, eps, x_t, alpha, sigma, t = example
    truth = {"x0": x0, "eps": eps, "v": velocity(x0, eps, t)}
    source, target = convert.split("_to_")
    function = jax.jit(getattr(predictions, convert))
    # Dividing by the small one of alpha and sigma loses that factor of precision.
    np.testing.assert_allclose(function(truth[source], x_t, alpha, sigma), truth[target], atol=2e-5)


@pytest.mark.parametrize("middle", ["x0", "v"])
def test_cycles(middle, example):
    _, eps, x_t, alpha, sigma, _ = example
    there, back = getattr(predictions, f"eps_to_{middle}"), getattr(predictions, f"{middle}_to_eps")
    np.testing.assert_allclose(back(there(eps, x_t, alpha, sigma), x_t, alpha, sigma), eps, atol=2e-5)


def test_to_eps(example):
    x0, eps, x_t, alpha, sigma, t = example
    for kind, value in (("epsilon", eps), ("sample", x0), ("v_prediction", velocity(x0, eps, t))):
        np.testing.assert_allclose(predictions.to_eps(value, x_t, alpha, sigma, kind), eps, atol=2e-5)
    with pytest.raises(ValueError, match="found 'flow', expected one of epsilon, v_prediction, sample"):
        predictions.to_eps(eps, x_t, alpha, sigma, "flow")


def test_v_to_eps_is_finite_at_zero_snr():
    x, zero, one = np.ones((1, 2), np.float32), np.zeros(1, np.float32), np.ones(1, np.float32)
    np.testing.assert_array_equal(predictions.v_to_eps(x, 3 * x, zero, one), 3 * x)


def test_every_converter_is_tested():
    names = [n for n, f in inspect.getmembers(predictions, inspect.isfunction) if "_to_" in n]
    assert len(names) == 4
