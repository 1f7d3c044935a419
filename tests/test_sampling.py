"""The samplers are diffusers', step by step, and sample i is its own whatever else is in the batch."""

import diffusers.schedulers.scheduling_ddpm as their_ddpm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from mcm_jax.predictions import v_to_eps
from mcm_jax.sampling import guide, initial_noise, modulate_guided, sample, sample_keys
from mcm_jax.schedules import Schedule

SHAPE = (4, 6, 2)
COUNT = 3


def _schedule(**options):
    return Schedule.from_config({"_class_name": "DDIMScheduler", **options})


def _denoise(x, t):
    """Stands for a network: nonlinear in x, and different at each t."""
    assert t.dtype == jnp.int32 and t.shape == x.shape[:1]
    return 0.7 * jnp.tanh(x) + 0.1 * jnp.sin(t.astype(jnp.float32))[:, None, None, None]


def _denoise_torch(x, t):
    return 0.7 * torch.tanh(x) + 0.1 * torch.sin(t.to(torch.float32))


def _start(count=COUNT, seed=0, shape=SHAPE):
    keys = sample_keys(seed, count)
    return keys, initial_noise(keys, shape)


def _fresh_noise(keys, steps, shape=SHAPE):
    """The noise of steps 1..N, ``[N, B, H, W, C]``: of each sample's key, folded with the step's number."""
    of_step = jax.vmap(lambda k, n: jax.random.normal(jax.random.fold_in(k, n), shape), in_axes=(0, None))
    return np.array(jax.vmap(of_step, in_axes=(None, 0))(keys, jnp.arange(1, steps + 1)))


def _close(ours, theirs):
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize(
    "clip, alpha_to_one, spacing, eta",
    [  # every pair of values occurs together
        (True, True, "leading", 0.0),
        (True, False, "trailing", 0.0),
        (False, True, "trailing", 0.0),
        (False, False, "leading", 0.0),
        (True, True, "trailing", 0.6),
        (True, False, "leading", 0.6),
        (False, True, "leading", 0.6),
        (False, False, "trailing", 0.6),
    ],
)
def test_ddim_equals_diffusers(clip, alpha_to_one, spacing, eta):
    options = {"clip_sample": clip, "set_alpha_to_one": alpha_to_one, "timestep_spacing": spacing}
    keys, x = _start()
    ours = sample(_denoise, x, keys, _schedule(**options), steps=20, eta=eta)
    scheduler, y = DDIMScheduler(**options), torch.from_numpy(np.array(x))
    scheduler.set_timesteps(20)
    for t, z in zip(scheduler.timesteps, _fresh_noise(keys, 20), strict=True):
        # NaN where it must not be looked at
        noise = torch.from_numpy(z if eta else np.full_like(z, np.nan))
        y = scheduler.step(_denoise_torch(y, t), int(t), y, eta=eta, variance_noise=noise).prev_sample
    assert ours.dtype == jnp.float32
    _close(ours, y)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "beta_schedule": "scaled_linear"},
        {"clip_sample_range": 2.5, "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=["as latent diffusion", "as improved DDPM"],
)
def test_ddim_equals_diffusers_on_other_schedules(options):
    options = options | {"beta_start": 0.0015, "beta_end": 0.0195}
    keys, x = _start()
    ours = sample(_denoise, x, keys, _schedule(**options), steps=10, eta=1.0)
    scheduler, y = DDIMScheduler(**options), torch.from_numpy(np.array(x))
    scheduler.set_timesteps(10)
    for t, z in zip(scheduler.timesteps, _fresh_noise(keys, 10), strict=True):
        noise = torch.from_numpy(z)
        y = scheduler.step(_denoise_torch(y, t), int(t), y, eta=1.0, variance_noise=noise).prev_sample
    _close(ours, y)


@pytest.mark.parametrize(
    "grid, options",
    [
        (1000, {"clip_sample": False}),
        (20, {}),
        (20, {"timestep_spacing": "trailing", "clip_sample": False}),
        ([980, 700, 333, 120, 33, 2], {}),
    ],
    ids=str,
)
def test_ddpm_equals_diffusers(grid, options, monkeypatch):
    keys, x = _start()
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler", **options})
    scheduler, y = DDPMScheduler(**options), torch.from_numpy(np.array(x))
    if isinstance(grid, int):
        ours = sample(_denoise, x, keys, schedule, sampler="ddpm", steps=grid)
        scheduler.set_timesteps(grid)
    else:
        ours = sample(_denoise, x, keys, schedule, sampler="ddpm", timesteps=np.array(grid))
        scheduler.set_timesteps(timesteps=grid)
    fresh = iter(_fresh_noise(keys, len(scheduler.timesteps)))
    monkeypatch.setattr(their_ddpm, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(fresh)))
    for t in scheduler.timesteps:
        y = scheduler.step(_denoise_torch(y, t), t, y).prev_sample
    _close(ours, y)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_own_grid_is_taken_as_it_is(sampler):
    schedule, (keys, x) = _schedule(), _start()
    by_steps = sample(_denoise, x, keys, schedule, sampler=sampler, steps=10)
    by_grid = sample(_denoise, x, keys, schedule, sampler=sampler, timesteps=schedule.timesteps(10))
    np.testing.assert_array_equal(by_steps, by_grid)
    other = sample(_denoise, x, keys, schedule, sampler=sampler, timesteps=schedule.timesteps(10, "trailing"))
    assert not np.allclose(by_steps, other, atol=1e-3)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_a_sample_does_not_depend_on_its_batch(sampler, eta):
    results = []
    for count in (2, 5):
        keys, x = _start(count)
        results.append(np.asarray(sample(_denoise, x, keys, _schedule(), sampler=sampler, steps=6, eta=eta)))
    few, many = results
    np.testing.assert_array_equal(few, many[:2])
    keys, x = _start(5)
    shuffled = np.array([3, 0, 4])
    again = sample(_denoise, x[shuffled], keys[shuffled], _schedule(), sampler=sampler, steps=6, eta=eta)
    np.testing.assert_array_equal(again, many[shuffled])


def test_keys_name_samples():
    few, many = (jax.random.key_data(sample_keys(3, n)) for n in (4, 9))
    np.testing.assert_array_equal(few, many[:4])
    others = jax.random.key_data(sample_keys(4, 9))
    assert len(np.unique(np.concatenate([many, others]), axis=0)) == 18


def test_noise_is_standard_normal_and_never_used_twice():
    keys, x = _start(64)
    everything = np.concatenate([np.asarray(x)[None], _fresh_noise(keys, 3)]).reshape(4 * 64, -1)
    assert everything.mean() == pytest.approx(0, abs=0.04) and everything.std() == pytest.approx(1, abs=0.03)
    correlation = np.corrcoef(everything)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.75  # 48 numbers each; the same noise gives 1


@pytest.mark.parametrize("sampler, eta", [("ddim", 1.0), ("ddpm", 0.0)])
def test_fresh_noise_comes_from_the_keys(sampler, eta):
    (keys, x), (other, _) = _start(), _start(seed=1)
    a, b, c = (sample(_denoise, x, k, _schedule(), sampler=sampler, steps=5, eta=eta) for k in (keys, keys, other))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c, atol=1e-2)


def test_without_eta_ddim_draws_nothing():
    (keys, x), (other, _) = _start(), _start(seed=1)
    a, b = (sample(_denoise, x, k, _schedule(), steps=5) for k in (keys, other))
    np.testing.assert_array_equal(a, b)


# Exact denoisers


@pytest.mark.parametrize(
    "sampler, eta, steps, spacing",
    [
        ("ddim", 0.0, 1, "trailing"),
        ("ddim", 0.0, 7, "linspace"),
        ("ddim", 1.0, 7, "trailing"),
        ("ddpm", 0.0, 1, "trailing"),
        ("ddpm", 0.0, 7, "leading"),
        ("ddpm", 0.0, 7, "linspace"),
    ],
)
def test_data_of_one_point_are_sampled_exactly(sampler, eta, steps, spacing):
    schedule = _schedule(timestep_spacing=spacing, steps_offset=1)
    keys, x = _start()
    point = jax.random.uniform(jax.random.key(9), SHAPE, minval=-1.0)

    def denoise(x, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        return (x - alpha * point[None]) / sigma

    found = sample(denoise, x, keys, schedule, sampler=sampler, steps=steps, eta=eta)
    tolerance = 1e-5 if steps > 1 else 5e-4  # one step divides by alpha_T = 0.006
    np.testing.assert_allclose(found, np.broadcast_to(point, found.shape), atol=tolerance)


def test_without_alpha_to_one_ddim_ends_at_the_first_timestep():
    """On data of one point the path is straight: eps stays what it was at the start."""
    schedule = _schedule(set_alpha_to_one=False, clip_sample=False)
    keys, x = _start()
    grid = schedule.timesteps(7)
    alpha, sigma = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)

    def denoise(x, t):
        return (x - 0.5 * schedule.alpha(t)[:, None, None, None]) / schedule.sigma(t)[:, None, None, None]

    eps = (np.asarray(x) - 0.5 * alpha[grid[0]]) / sigma[grid[0]]
    np.testing.assert_allclose(sample(denoise, x, keys, schedule, steps=7), 0.5 * alpha[0] + sigma[0] * eps, atol=1e-5)


@pytest.mark.parametrize("sampler, eta, steps", [("ddpm", 0.0, 500), ("ddim", 1.0, 200), ("ddim", 0.0, 200)])
def test_normal_data_keep_their_spread(sampler, eta, steps):
    """For x_0 ~ N(m, s^2) the best eps is known, and its samples are N(m, s^2) again."""
    mean, spread, schedule = 0.4, 0.5, _schedule(clip_sample=False)
    keys, x = _start(32, shape=(8, 8, 1))

    def denoise(x, t):
        alpha, sigma = (f(t)[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        return sigma * (x - alpha * mean) / (alpha**2 * spread**2 + sigma**2)

    found = np.asarray(sample(denoise, x, keys, schedule, sampler=sampler, steps=steps, eta=eta))
    assert found.mean() == pytest.approx(mean, abs=4 * spread / 2048**0.5)
    assert found.std() == pytest.approx(spread, rel=0.08)


# guide


def test_guidance_goes_through_base_and_mcm():
    eps, modulated = (jax.random.normal(jax.random.key(i), (2, *SHAPE)) for i in range(2))
    np.testing.assert_array_equal(guide(eps, modulated, 0.0), eps)
    np.testing.assert_allclose(guide(eps, modulated, 1.0), modulated, atol=1e-6)
    np.testing.assert_allclose(guide(eps, modulated, 1.5), 1.5 * modulated - 0.5 * eps, atol=1e-5)
    np.testing.assert_array_equal(guide(eps, eps, 3.0), eps)
    np.testing.assert_array_equal(jax.jit(guide)(eps, modulated, jnp.float32(0)), eps)


def test_the_sampler_stays_float32_around_a_network_in_16_bits():
    keys, x = _start()
    small = sample(lambda x, t: _denoise(x, t).astype(jnp.bfloat16), x, keys, _schedule(), steps=5, eta=1.0)
    assert small.dtype == jnp.float32
    np.testing.assert_allclose(small, sample(_denoise, x, keys, _schedule(), steps=5, eta=1.0), atol=0.1)


# What is refused


def test_an_unknown_sampler_is_named():
    keys, x = _start()
    with pytest.raises(ValueError, match="sampler must be one of .*'ddim', 'ddpm'.*, got 'euler'"):
        sample(_denoise, x, keys, _schedule(), sampler="euler")


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range(steps):
    keys, x = _start()
    with pytest.raises(ValueError, match=rf"num_steps: found {steps}, expected 1\.\.1000"):
        sample(_denoise, x, keys, _schedule(), steps=steps)


@pytest.mark.parametrize("steps", [4, 20])
def test_zero_terminal_snr_equals_diffusers(steps):
    """The first step starts where nothing is left of x0; a network that predicts v knows it all the same."""
    options = {
        **{"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False},
        **{"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    }
    keys, x = _start()
    schedule = _schedule(**options)
    assert schedule.timesteps(steps)[0] == 999 and schedule.alphas_cumprod[999] == 0

    def denoise(x, t):
        return v_to_eps(_denoise(x, t), x, schedule.alpha(t), schedule.sigma(t))

    ours = sample(denoise, x, keys, schedule, steps=steps)
    scheduler, y = DDIMScheduler(**options), torch.from_numpy(np.array(x))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        y = scheduler.step(_denoise_torch(y, t), int(t), y).prev_sample
    # The trace of signal that we leave there: alpha = 2.2e-4.
    np.testing.assert_allclose(ours, y.numpy(), atol=2e-3)


def test_both_guidances_together():
    """Where the MCM sees the guided prediction and where it sees each branch, against the formulas by hand."""
    rng = np.random.default_rng(0)
    negative, positive = (jnp.asarray(rng.normal(size=(2, 3, 4, 1)), jnp.float32) for _ in range(2))
    mcm, g, s = (lambda eps: eps**2 + 0.5), 1.5, 4.0  # not linear: the order matters

    def run(where, guidance=g, text_guidance=s):
        scales = {"guidance": guidance, "text_guidance": text_guidance}
        return np.asarray(modulate_guided(mcm, negative, positive, **scales, where=where))

    n, p = np.asarray(negative), np.asarray(positive)
    guided = n + s * (p - n)
    np.testing.assert_allclose(run("after_cfg"), guided + g * (guided**2 + 0.5 - guided), rtol=1e-5)
    n2, p2 = n + g * (n**2 + 0.5 - n), p + g * (p**2 + 0.5 - p)
    np.testing.assert_allclose(run("before_cfg"), n2 + s * (p2 - n2), rtol=1e-4, atol=1e-5)
    for where in ("after_cfg", "before_cfg"):
        np.testing.assert_allclose(run(where, guidance=0.0), guided, rtol=1e-5)  # no MCM
        np.testing.assert_allclose(run(where, text_guidance=1.0), p2, rtol=1e-4, atol=1e-5)  # no negative prompt
    with pytest.raises(ValueError, match="'never'"):
        run("never")
