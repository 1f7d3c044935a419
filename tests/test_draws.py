"""Laws of what is drawn: timesteps cover T, whatever the density; a draw is a function of (seed, example, draw)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcm_jax import draws as module
from mcm_jax.draws import Draws, check_density, example_keys
from mcm_jax.schedules import Schedule

pytestmark = pytest.mark.usefixtures("quick")

EXAMPLES = 300
DENSITIES = {"uniform": (1,), "noisy": (1, 3), "gap": (2, 0, 1), "ramp": tuple(range(1, 41))}


def grid(count, groups=2):
    """(index, draw) of all draws of all examples."""
    index, draw = np.divmod(np.arange(EXAMPLES * count * groups, dtype=np.int32), np.int32(count * groups))
    return index, draw


@pytest.mark.parametrize(
    "count, total, density", [(1, 1000, "noisy"), (3, 1000, "gap"), (5, 1000, "uniform"), (7, 100, "ramp")]
)
def test_each_group_covers_the_density(count, total, density):
    """Of K draws one falls into each K-th of the density's mass, to the timestep that lies across a border."""
    draws = Draws(0, count, DENSITIES[density], total)
    t = np.asarray(jax.jit(draws.timesteps)(*grid(count)))
    assert t.dtype == np.int32 and t.min() >= 0 and t.max() < total and (draws.probabilities[t] > 0).all()
    after = np.cumsum(draws.probabilities)
    groups = np.sort(t.reshape(-1, count), axis=1)
    borders = np.arange(count) / count
    assert (after[groups] > borders - 1e-6).all()
    assert (after[groups] - draws.probabilities[groups] < borders + 1 / count + 1e-6).all()
    if count > 1:  # and which draw has which is by chance
        order = t.reshape(-1, count).argsort(axis=1)
        assert len(np.unique(order, axis=0)) > 1
        firsts = np.bincount(order[:, 0], minlength=count) / len(order)
        assert np.abs(firsts - 1 / count).max() < 0.1


@pytest.mark.parametrize("density", DENSITIES)
def test_timesteps_follow_the_density(density):
    draws = Draws(3, 4, DENSITIES[density], 40)
    t = np.asarray(jax.jit(draws.timesteps)(*grid(4, groups=8)))
    found = np.bincount(t, minlength=40) / len(t)
    # Strata make the counts more regular than independent draws: four standard errors are ample.
    np.testing.assert_allclose(found, draws.probabilities, atol=4 * np.sqrt(0.03 / len(t)))


def test_importance_undoes_the_density():
    uniform = Draws(0, 5, (1, 1, 1), 1000)
    np.testing.assert_array_equal(uniform.importance(jnp.arange(1000)), np.ones(1000, np.float32))
    for density in ((1, 3), DENSITIES["ramp"]):
        draws = Draws(0, 5, density, 1000)
        weights = np.asarray(draws.importance(jnp.arange(1000)))
        value = np.sin(np.arange(1000))
        np.testing.assert_allclose((draws.probabilities * weights * value).sum(), value.mean(), atol=1e-6)
    assert weights.dtype == np.float32


def test_a_draw_does_not_depend_on_its_batch():
    draws, (index, draw) = Draws(1, 3, (1, 2), 1000, prompt_drop_rate=0.5), grid(3, 1)
    order = np.random.default_rng(0).permutation(len(index))[:50]
    for function in (draws.timesteps, draws.prompt_is_dropped, lambda i, d: draws.noise(i, d, (4, 3, 2))):
        whole, some = jax.jit(function)(index, draw), jax.jit(function)(index[order], draw[order])
        np.testing.assert_array_equal(np.asarray(whole)[order], some)


def test_offset_noise_is_smooth_and_fades_with_the_noise():
    """A change of x0 that large areas share, at high noise; the target holds it, so the picture stays what it is."""
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler"})
    (index, draw), shape = grid(2), (8, 12, 3)
    draws = Draws(0, 2, (1,), 1000, offset=0.6)
    n = np.asarray(jax.jit(lambda i, d: draws.smooth_noise(i, d, shape))(index, draw))
    assert n.shape == (len(index), *shape) and abs(n.mean()) < 0.05
    assert abs(n[:, 0, 0].var() - 1 / 3) < 0.05  # the mean of the square of u ~ U[0, 1)
    assert np.abs(np.diff(n, axis=1)).mean() < 0.4 * np.abs(n).mean()
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (len(index), *shape)), jnp.float32)
    noised = jax.jit(lambda d: d.noised(schedule, x0, index, draw), static_argnums=0)
    x_t, noise, t = noised(draws)
    plain = noised(Draws(0, 2, (1,), 1000))
    np.testing.assert_array_equal(t, plain[2])
    alpha, sigma = (np.asarray(f(t))[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
    np.testing.assert_allclose(noise - plain[1], 0.6 * np.minimum(1, alpha / sigma) * n, atol=1e-5)
    np.testing.assert_allclose(alpha * x0 + sigma * noise, x_t, atol=1e-5)


def test_seeds_examples_and_draws_differ():
    index, draw = grid(3, 1)
    noises = [np.asarray(Draws(seed, 3, (1,), 1000).noise(index, draw, (8,))) for seed in (0, 1)]
    every = np.concatenate(noises)
    assert len(np.unique(every, axis=0)) == len(every)
    assert abs(every.mean()) < 0.05 and abs(every.std() - 1) < 0.05
    times = [np.asarray(Draws(seed, 3, (1,), 1000).timesteps(index, draw)) for seed in (0, 1)]
    assert (times[0] != times[1]).mean() > 0.9


def test_streams_share_no_key():
    """`fold_in(k, 1)` is `split(k)[1]`: what one stream draws must not tell what another one does."""
    index = np.arange(2000, dtype=np.int32)
    draw = np.zeros_like(index)
    draws = Draws(0, 1, (1,), 1000, prompt_drop_rate=0.5)
    hidden = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5))(example_keys(0, module.MODALITY_DROP, index, draw))
    drawn = [
        draws.noise(index, draw, (2,))[:, 0],
        draws.timesteps(index, draw),
        draws.prompt_is_dropped(index, draw),
        hidden,
    ]
    correlation = np.abs(np.corrcoef(np.array([np.asarray(d, np.float64) for d in drawn])) - np.eye(4))
    assert correlation.max() < 0.1


def test_prompts_are_dropped_at_the_rate():
    index, draw = grid(5)
    for rate in (0.0, 0.1, 1.0):
        dropped = np.asarray(Draws(0, 5, (1,), 1000, rate).prompt_is_dropped(index, draw))
        assert abs(dropped.mean() - rate) < 0.03


def test_noise_does_not_depend_on_jaxs_default_generator():
    """Or a cache would be read with other noise than it was made with."""
    index, draw = grid(2, 1)
    before = Draws(0, 2, (1,), 1000).noise(index, draw, (4,))
    default = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        np.testing.assert_array_equal(Draws(0, 2, (1,), 1000).noise(index, draw, (4,)), before)
    finally:
        jax.config.update("jax_default_prng_impl", default)


@pytest.mark.parametrize("density", [(), (0, 0), (1, -1), (float("nan"),), ("1",), (True,), (1,) * 11])
def test_what_is_no_density(density):
    with pytest.raises(ValueError, match="relative densities"):
        check_density(density, 10)
    with pytest.raises(ValueError, match="at least 1"):
        Draws(0, 0, (1,), 10)
