"""The schedule is diffusers' own, for each of its classes and options."""

import itertools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from mcm_jax.losses import WEIGHTINGS, weight
from mcm_jax.mcm import estimate_x0
from mcm_jax.predictions import eps_to_v, eps_to_x0, v_to_eps
from mcm_jax.samplers import SAMPLERS, make_table, padded
from mcm_jax.sampling import sample
from mcm_jax.schedules import BETA_SCHEDULES, Schedule

CLASSES = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler, "PNDMScheduler": PNDMScheduler}


@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_equals_diffusers(name, beta_schedule, total, zero_snr):
    options = {"num_train_timesteps": total, "beta_schedule": beta_schedule, "beta_start": 0.0015, "beta_end": 0.0195}
    if name != "PNDMScheduler":
        options["rescale_betas_zero_snr"] = zero_snr
    theirs = CLASSES[name](**options)
    ours = Schedule.from_config({"_class_name": name, **options})
    assert ours.alphas_cumprod.dtype == np.float32 and ours.num_train_timesteps == total
    # PyTorch's float32 sqrt is one ulp off here and there, which the rescaling amplifies; without it all bits agree.
    tolerance = 2e-5 if options.get("rescale_betas_zero_snr") else 1e-7
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=tolerance)
    assert not zero_snr or name == "PNDMScheduler" or ours.alphas_cumprod[-1] == 0
    final = float(getattr(theirs, "final_alpha_cumprod", 1.0))
    assert ours.final_alpha_cumprod == pytest.approx(final, rel=1e-6)


OTHERS = {
    "EulerDiscreteScheduler": {"rescale_betas_zero_snr": False},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"variance_type": None, "thresholding": False},
    "UniPCMultistepScheduler": {"thresholding": True},
    "DEISMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"clip_sample": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_samplers_hold_the_same_diffusion(name, tmp_path):
    """Stable Diffusion's folders name any of these; their betas and parameterisation are what a base needs."""
    make = getattr(diffusers, name)
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **OTHERS[name]}
    for chosen in ({}, options | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}):
        theirs = make(**chosen)
        theirs.save_pretrained(tmp_path)
        ours = Schedule.from_config(json.loads((tmp_path / "scheduler_config.json").read_text()))
        np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)
        assert ours.prediction_type == theirs.config.prediction_type
        assert ours.timestep_spacing == theirs.config.timestep_spacing
        assert not ours.clip_sample and ours.set_alpha_to_one
        bare = Schedule.from_config({"_class_name": name})
        np.testing.assert_allclose(bare.alphas_cumprod, make().alphas_cumprod.numpy(), rtol=1e-6)


def test_a_trace_of_signal_is_left_where_the_schedule_has_none():
    zero = Schedule.from_config({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    assert zero.alphas_cumprod[-1] == 0 < zero.abar[-1] < 1e-7
    np.testing.assert_array_equal(zero.abar[:990], zero.alphas_cumprod[:990])
    t = jnp.array([999])
    assert np.isfinite(1 / zero.alpha(t)).all() and zero.sigma(t)[0] == pytest.approx(1)


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    "options, changed",
    [
        ({}, []),
        (LATENT, []),
        (LATENT | {"rescale_betas_zero_snr": True}, []),
        ({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}, []),
        ({"beta_schedule": "squaredcos_cap_v2"}, [999]),
        ({"rescale_betas_zero_snr": True}, [996, 997, 998, 999]),
    ],
    ids=str,
)
def test_signal_is_left_as_it_is(options, changed):
    """All values once stopped at 4.9e-8: caches and runs from then see the same where none was in 0..4.9e-8."""
    ours = Schedule.from_config({"_class_name": "DDIMScheduler", **options})
    before = np.maximum(ours.alphas_cumprod, np.float32(4.8973451890853435e-08))
    np.testing.assert_array_equal(np.flatnonzero(ours.abar != before), changed)
    some = ours.alphas_cumprod > 0
    np.testing.assert_array_equal(ours.abar[some], ours.alphas_cumprod[some])
    assert ours.abar.dtype == np.float32


def test_eps_of_v_equals_diffusers_where_the_least_signal_is_left():
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
    ours, theirs = Schedule.from_config({"_class_name": "DDIMScheduler", **options}), DDIMScheduler(**options)
    theirs.set_timesteps(1000)
    x, v = np.random.default_rng(0).normal(size=(2, 1, 8, 8, 3)).astype(np.float32)
    step = theirs.step(torch.from_numpy(v), 999, torch.from_numpy(x))
    bar = float(theirs.alphas_cumprod[998])  # of the step after it, which is sqrt(bar) x0 + sqrt(1 - bar) eps
    expected = (step.prev_sample.double() - bar**0.5 * step.pred_original_sample.double()) / (1 - bar) ** 0.5
    alpha, sigma = ours.alpha(jnp.array([999])), ours.sigma(jnp.array([999]))
    eps = v_to_eps(v, x, alpha, sigma)
    np.testing.assert_allclose(eps, expected.numpy(), rtol=0, atol=1e-5)
    # Rounding grows by 1 / alpha, 2e4.
    np.testing.assert_allclose(estimate_x0(x, eps, alpha, sigma, 10.0), step.pred_original_sample, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"beta_end": 0.5},  # float32 runs out of numbers half-way
        {"beta_schedule": "squaredcos_cap_v2", "trained_betas": [0.5] * 80 + [1.0, 1.0], "num_train_timesteps": 82},
    ],
    ids=["least", "none", "ever less", "less than a trace, then none"],
)
def test_whatever_divides_by_the_signal_is_finite(options):
    ours = Schedule.from_config({"_class_name": "DDIMScheduler", "clip_sample": False, **options})
    assert (ours.abar > 0).all() and (np.diff(ours.abar) <= 0).all()
    total = ours.num_train_timesteps
    t = jnp.arange(total)
    x, eps = jnp.asarray(np.random.default_rng(0).normal(size=(2, total, 2, 2, 1)), jnp.float32)
    alpha, sigma = ours.alpha(t), ours.sigma(t)
    results = [convert(eps, x, alpha, sigma) for convert in (eps_to_x0, eps_to_v)]
    results += [estimate_x0(x, eps, alpha, sigma, 1.0), *(weight(name, alpha, sigma) for name in WEIGHTINGS)]
    x, keys = x[:2], jax.random.split(jax.random.key(0), 2)
    run = jax.jit(lambda table: sample(lambda x, at: x, x, keys, table))
    results += [run(padded(make_table(ours, s, timesteps=t[::-1], eta=e))) for s in SAMPLERS for e in (0, 1)]
    assert all(np.isfinite(result).all() for result in results)


def test_trained_betas():
    betas = [0.1, 0.2, 0.4]
    ours = Schedule.from_config({"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 3})
    theirs = DDIMScheduler(trained_betas=betas, num_train_timesteps=3)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_and_saved_configs(name, tmp_path):
    """A file with no keys, and the file that diffusers writes, both mean what diffusers means by them."""
    theirs = CLASSES[name]()
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for config in (saved, {"_class_name": name}):
        ours = Schedule.from_config(config)
        assert ours.timestep_spacing == theirs.config.timestep_spacing
        assert ours.prediction_type == theirs.config.prediction_type
        assert ours.set_alpha_to_one == theirs.config.get("set_alpha_to_one", True)
        assert ours.clip_sample == theirs.config.get("clip_sample", False)
        np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("total, offset", list(itertools.product([10, 999, 1000], [0, 1])))
def test_timesteps_equal_diffusers(spacing, total, offset):
    options = {"num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": offset}
    theirs, ours = DDIMScheduler(**options), Schedule.from_config({"_class_name": "DDIMScheduler", **options})
    plain = Schedule.from_config({"_class_name": "DDIMScheduler", **options, "timestep_spacing": "leading"})
    for steps in [n for n in (*range(1, 60), 100, 250, 333, 500, 998, 999, 1000) if n <= total]:
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()
        if expected[0] >= total:
            with pytest.raises(ValueError, match="steps_offset"):
                ours.timesteps(steps)
            continue
        expected = expected[expected >= 0]  # diffusers' "trailing" can append the timestep -1
        for found in (ours.timesteps(steps), plain.timesteps(steps, spacing)):
            assert found.dtype == np.int32 and len(found) == steps
            np.testing.assert_array_equal(found, expected)


def test_add_noise_equals_diffusers_under_jit():
    ours, theirs = Schedule.from_config({"_class_name": "DDPMScheduler"}), DDPMScheduler()
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    t = np.array([0, 500, 999], np.int32)
    found = jax.jit(ours.add_noise)(x0, noise, t)
    expected = theirs.add_noise(torch.tensor(x0), torch.tensor(noise), torch.tensor(t, dtype=torch.long)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    alpha, sigma = ours.alpha(jnp.asarray(t)), ours.sigma(jnp.asarray(t))
    assert alpha.dtype == sigma.dtype == jnp.float32 and alpha.shape == (3,)
    np.testing.assert_allclose(alpha**2 + sigma**2, np.ones(3), rtol=1e-6)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["_class_name", "'FlowMatchEuler", "PNDMScheduler"]),
        ({}, ["_class_name", "None", "DDPMScheduler"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "'sigmoid'", "scaled_linear"]),
        ({"prediction_type": "flow"}, ["prediction_type", "'flow'", "v_prediction"]),
        ({"timestep_spacing": "karras"}, ["timestep_spacing", "'karras'", "linspace"]),
        ({"thresholding": True}, ["thresholding", "True", "False"]),
        ({"variance_type": "learned_range"}, ["variance_type", "'learned_range'", "fixed_small"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "[2]", "[1000]"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps", "0", "positive"]),
        ({"beta_end": 1.5}, ["betas", "1.5", "0..1"]),
    ],
)
def test_unsupported_values_are_named(config, words):
    with pytest.raises(ValueError) as error:
        Schedule.from_config({"_class_name": "DDPMScheduler", **config} if config else {})
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=r"num_steps: found .*expected 1\.\.1000"):
        Schedule.from_config({"_class_name": "DDIMScheduler"}).timesteps(steps)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="spacing: found 'log'"):
        Schedule.from_config({"_class_name": "DDIMScheduler"}).timesteps(5, "log")


@pytest.mark.parametrize(
    "config, solver, spacing",
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "plms", ""),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler with skip_prk_steps=False", ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpm++2m", "karras"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpm++2m_sde", ""),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            "DPMSolverMultistepScheduler with solver_order=3",
            "",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"},
            "UniPCMultistepScheduler with final_sigmas_type=sigma_min",
            "",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True}, "euler", "exponential"),
        ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler", ""),
    ],
    ids=str,
)
def test_a_file_names_the_bases_own_sampler(config, solver, spacing):
    """Whatever would sample otherwise than ours does not go under our name."""
    schedule = Schedule.from_config(config)
    assert (schedule.solver, schedule.solver_spacing) == (solver, spacing)
