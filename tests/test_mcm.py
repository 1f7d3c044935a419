"""An untrained MCM changes nothing, a trained one does what the formula says, and it has the size that it claims."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import default
from mcm_jax.base import BaseCard
from mcm_jax.errors import UserError
from mcm_jax.mcm import MCM, SHIFT_SPACES, MCMSettings, Modulator, Size, estimate_x0, modulate
from mcm_jax.modalities import Modality, stack, total_channels
from mcm_jax.schedules import Schedule

SCHEDULE = Schedule.from_config({"_class_name": "DDPMScheduler"})
MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "map", 1))
TINY = Size(channels=8, multipliers=(1,), blocks=1, attention=(True,), head_dim=4, groups=4)
SHAPE = (8, 16, 3)
BASE_PARAMS = 5_547_667  # of the shipped base, scenes-ddpm
FORMS = {
    "paper": Modulator(MCM(TINY), MODALITIES, SCHEDULE),
    "ours": Modulator(MCM(TINY, ("x_t", "eps", "x0")), MODALITIES, SCHEDULE, shift_space="x0"),
}
RUN = {name: jax.jit(modulator.__call__) for name, modulator in FORMS.items()}


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x_t": rng.standard_normal((2, *SHAPE)).astype(np.float32),
        "eps": rng.standard_normal((2, *SHAPE)).astype(np.float32),
        "t": np.array([3, 700], np.int32),
        "conditions": {
            "segmentation": rng.integers(0, 6, (2, *SHAPE[:2])).astype(np.uint8),
            "sketch": rng.random((2, *SHAPE[:2]), np.float32),
        },
        "present": np.ones((2, 2), bool),
    }


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def untrained(form):
    key = jax.random.key(0, impl="rbg")  # compiles in a third of the time of the default
    return jax.jit(lambda key: FORMS[form].init(key, SHAPE))(key)


@pytest.fixture(scope="module")
def run(form):
    """The form with every weight random: ``run(**inputs) -> (eps', gamma, nu)``."""
    shapes = jax.eval_shape(lambda: FORMS[form].init(jax.random.key(0), SHAPE))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)
    return lambda **inputs: [np.asarray(a) for a in RUN[form](params, **inputs)]


# The untrained MCM


def test_untrained_it_leaves_the_base_as_it_is(form, untrained):
    inputs = _inputs()
    modulated, gamma, nu = RUN[form](untrained, **inputs)
    np.testing.assert_array_equal(modulated, inputs["eps"])
    assert modulated.dtype == gamma.dtype == nu.dtype == jnp.float32
    assert gamma.shape == nu.shape == inputs["eps"].shape and not gamma.any() and not nu.any()
    coefficients = {"alpha": SCHEDULE.alpha(inputs["t"]), "sigma": SCHEDULE.sigma(inputs["t"])}
    for space in SHIFT_SPACES:  # whichever way its maps are applied
        same = modulate(inputs["eps"], gamma, nu, shift_space=space, **coefficients)
        np.testing.assert_array_equal(same, inputs["eps"])
        zero = modulate(inputs["eps"], gamma, nu, shift_space=space, residual_scale=False, **coefficients)
        np.testing.assert_array_equal(zero, np.zeros_like(inputs["eps"]))


def test_only_the_output_layer_is_zero(untrained):
    kernels = {
        jax.tree_util.keystr(path): bool(np.any(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(untrained)
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert [name for name, nonzero in kernels.items() if not nonzero] == ["['unet']['conv_out']['kernel']"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_maps_are_float32_whatever_the_network_computes_in(dtype):
    modulator = Modulator(MCM(TINY, dtype=jnp.dtype(dtype)), MODALITIES, SCHEDULE)
    params = jax.eval_shape(lambda: modulator.init(jax.random.key(0), SHAPE))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    inputs = _inputs()
    out = jax.eval_shape(lambda p: modulator(p, **inputs), params)
    assert [(o.shape, o.dtype) for o in out] == [((2, *SHAPE), jnp.float32)] * 3


# What a trained one sees and does


def test_the_maps_depend_on_everything_it_sees(run):
    inputs, other = _inputs(0), _inputs(1)
    _, gamma, nu = run(**inputs)
    changes = {name: {name: other[name]} for name in ("x_t", "eps")}
    changes["t"] = {"t": np.array([4, 650], np.int32)}
    changes["present"] = {"present": np.array([[True, False], [False, True]])}
    for m in MODALITIES:
        changes[m.name] = {"conditions": inputs["conditions"] | {m.name: other["conditions"][m.name]}}
    for name, change in changes.items():
        _, gamma2, nu2 = run(**(inputs | change))
        for i in range(2):
            assert np.abs(gamma2[i] - gamma[i]).max() > 1e-4 and np.abs(nu2[i] - nu[i]).max() > 1e-4, name


def test_an_absent_modality_changes_nothing(run):
    inputs, other = _inputs(0), _inputs(1)
    for i, m in enumerate(MODALITIES):
        inputs["present"] = np.arange(2)[None].repeat(2, 0) != i
        changed = inputs | {"conditions": inputs["conditions"] | {m.name: other["conditions"][m.name]}}
        for a, b in zip(run(**inputs), run(**changed), strict=True):
            np.testing.assert_array_equal(a, b)


def test_examples_do_not_see_each_other(run):
    inputs, other = _inputs(0), _inputs(1)
    mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), inputs, other)
    for a, b in zip(run(**inputs), run(**mixed), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)


def test_modulation_follows_the_formula(form, run):
    inputs = _inputs()
    modulated, gamma, nu = run(**inputs)
    assert np.abs(gamma).max() > 0.1 and np.abs(nu).max() > 0.1
    shift = nu
    if form == "ours":
        abar = SCHEDULE.alphas_cumprod[inputs["t"]].astype(np.float64)
        shift = -nu * np.minimum(1, np.sqrt(abar / (1 - abar)))[:, None, None, None]
    np.testing.assert_allclose(modulated, inputs["eps"] * (1 + gamma) + shift, atol=1e-5)


class _Stub:
    """In place of the network: notes what it is given and returns fixed maps."""

    def __init__(self, inputs):
        self.inputs = inputs

    def apply(self, variables, x_t, eps, t, conditions, x0):
        self.given = {"x_t": x_t, "eps": eps, "t": t, "conditions": conditions, "x0": x0}
        return jnp.full_like(eps, 0.5), jnp.full_like(eps, 2.0)


@pytest.mark.parametrize("residual_scale", [True, False])
@pytest.mark.parametrize("shift_space", SHIFT_SPACES)
def test_the_modulator_hands_its_settings_on(shift_space, residual_scale):
    stub, inputs = _Stub(("x_t", "eps", "x0")), _inputs()
    modulator = Modulator(stub, MODALITIES, SCHEDULE, shift_space, residual_scale, x0_clip=1.5)
    modulated, _, _ = modulator({}, **inputs)
    alpha, sigma = (np.asarray(f(inputs["t"]))[:, None, None, None] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    shift = 2.0 if shift_space == "eps" else -2.0 * np.minimum(1, alpha / sigma)
    np.testing.assert_allclose(modulated, inputs["eps"] * (1.5 if residual_scale else 0.5) + shift, rtol=1e-5)
    estimate = (inputs["x_t"] - sigma * inputs["eps"]) / alpha
    assert np.abs(estimate).max() > 1.5  # else the bound is not seen
    np.testing.assert_allclose(stub.given["x0"], np.clip(estimate, -1.5, 1.5), atol=1e-5)
    expected = stack(MODALITIES, inputs["conditions"], inputs["present"])
    np.testing.assert_array_equal(stub.given["conditions"], expected)
    for name in ("x_t", "eps", "t"):
        np.testing.assert_array_equal(stub.given[name], inputs[name])


def test_no_estimate_of_x0_where_none_is_seen():
    stub = _Stub(("x_t", "eps"))
    Modulator(stub, MODALITIES, SCHEDULE)({}, **_inputs())
    assert stub.given["x0"] is None


# modulate and estimate_x0


def test_modulate_by_hand():
    eps, gamma, nu = (jnp.full((2, 1, 1, 1), v) for v in (2.0, 0.5, 3.0))
    noisy_then_clean = {"alpha": jnp.array([0.6, 0.8]), "sigma": jnp.array([0.8, 0.6])}

    def values(**options):
        return modulate(eps, gamma, nu, **options).ravel().tolist()

    assert values() == [6, 6]
    assert values(residual_scale=False) == [4, 4]
    assert values(shift_space="x0", **noisy_then_clean) == pytest.approx([3 - 3 * 0.75, 0])  # alpha / sigma, then 1
    assert values(shift_space="x0", residual_scale=False, **noisy_then_clean) == pytest.approx([1 - 3 * 0.75, -2])
    with pytest.raises(ValueError, match="shift_space must be one of .*'eps', 'x0'.*, got 'v'"):
        values(shift_space="v")


def test_a_shift_in_x0_space_moves_the_estimate_of_x0_by_nu():
    """Where there is more noise than signal; elsewhere by less."""
    t = jnp.array([20, 400, 990])
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    assert alpha[0] > sigma[0] and alpha[1] < sigma[1]
    x_t, eps, nu = (0.1 * jax.random.normal(jax.random.key(i), (3, 4, 4, 1)) for i in range(3))
    moved = modulate(eps, jnp.zeros_like(eps), nu, shift_space="x0", alpha=alpha, sigma=sigma)
    change = estimate_x0(x_t, moved, alpha, sigma, 1e6) - estimate_x0(x_t, eps, alpha, sigma, 1e6)
    np.testing.assert_allclose(change[1:], nu[1:], atol=1e-4)
    np.testing.assert_allclose(change[0], nu[0] * sigma[0] / alpha[0], atol=1e-4)


def test_the_true_noise_gives_x0_back():
    x0 = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3), minval=-1.0)
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    t = jnp.array([0, 100, 500, 999])
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    estimate = estimate_x0(SCHEDULE.add_noise(x0, noise, t), noise, alpha, sigma, 1.0)
    np.testing.assert_allclose(estimate[:3], x0[:3], atol=1e-5)
    np.testing.assert_allclose(estimate[3], x0[3], atol=5e-4)  # alpha = 0.006 there, and rounding grows by its inverse


def test_the_estimate_of_x0_is_bounded_even_at_pure_noise():
    x_t, eps = (jax.random.normal(jax.random.key(i), (2, 4, 4, 3)) for i in range(2))
    estimate = estimate_x0(x_t, eps, jnp.array([0.0, 0.006]), jnp.array([1.0, 1.0]), 0.7)
    assert np.isfinite(estimate).all() and np.abs(estimate).max() == np.float32(0.7)


# Sizes and what is refused


def _count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_the_papers_network_has_3_9_million_parameters():
    """8 channels in (x_t, eps, two conditions) and 6 out, at 64x64x3, attention where the map is 16x16."""
    size = Size(32, (1, 1, 2, 4), 2, (False, False, True, False))
    x, y, t = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 64, 64, 2)), jnp.zeros(1, jnp.int32)
    params = jax.eval_shape(lambda: MCM(size).init(jax.random.key(0), x, x, t, y))["params"]
    assert params["unet"]["conv_in"]["kernel"].shape == (3, 3, 8, 32)
    assert params["unet"]["conv_out"]["kernel"].shape == (3, 3, 32, 6)
    assert _count(params) == 3_861_510 and f"{_count(params) / 1e6:.3f}M" == "3.862M"


def _configured(name):
    config = default.get_config()
    config.mcm.update(default.SIZES[name])
    tiny.settings_of(config)
    card = BaseCard("pixels", "", SCHEDULE, (32, 32, 3), (32, 32, 3), False, BASE_PARAMS, 4 * BASE_PARAMS)
    modulator = tiny.modulator_of(config, card)
    assert total_channels(modulator.modalities) == 9 and modulator.module.inputs == ("x_t", "eps", "x0")
    return jax.eval_shape(lambda: modulator.init(jax.random.key(0), (32, 32, 3)))


@pytest.mark.parametrize("name, percent", [("tiny", 0.9), ("small", 2.9), ("medium", 8.5), ("large", 33)])
def test_the_sizes_are_the_shares_of_the_base_that_they_claim(name, percent):
    assert 100 * _count(_configured(name)) / BASE_PARAMS == pytest.approx(percent, rel=0.1)


def test_the_paper_preset_is_the_papers_network_with_the_real_channels():
    """It sees 10 channels more than the paper's 8: three of the estimate of x0, and nine for its two of conditions."""
    params = _configured("paper")
    assert params["unet"]["conv_in"]["kernel"].shape == (3, 3, 18, 32)
    assert _count(params) == 3_861_510 + 10 * 9 * 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention": (False,)}, "attention needs one entry for each of the 2 levels of multipliers, got 1"),
        ({"groups": 3}, "a level of 8 channels cannot be split into 3 groups"),
        ({"groups": 16}, "a level of 8 channels cannot be split into 16 groups"),
        ({"head_dim": 5}, "a level of 16 channels has no whole heads of 5"),
        ({"channels": 0}, "must be at least 1"),
        ({"blocks": 0}, "must be at least 1"),
        ({"groups": 0}, "must be at least 1"),
        ({"multipliers": (1, 0)}, "each at least 1"),
    ],
)
def test_sizes_that_make_no_network_are_refused(change, message):
    fields = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (False, True), "groups": 4}
    with pytest.raises(UserError, match=re.escape(message)):
        Size(**fields | change)


def test_attention_is_there_or_not():
    old = MCMSettings(attention=(0, 0, 7, 1))  # as it was read before new ones were refused
    assert old.size().attention == (False, False, True, True)
    with pytest.raises(UserError, match=r"config.mcm.attention must be 1 or 0 at each level.*got \(0, 0, 7, 1\)"):
        old.check_new()


def test_heads_need_to_fit_only_where_there_is_attention():
    Size(8, (1, 2, 4), 1, (False, False, True), head_dim=32, groups=8)


def _apply(size, height, width, inputs=("x_t", "eps"), x0=None):
    x, y = jnp.zeros((1, height, width, 3)), jnp.zeros((1, height, width, 2))
    return jax.eval_shape(lambda: MCM(size, inputs).init(jax.random.key(0), x, x, jnp.zeros(1, jnp.int32), y, x0))


def test_a_grid_that_cannot_be_halved_is_refused():
    size = Size(8, (1, 1, 1), 1, (False, False, False), groups=8)
    with pytest.raises(UserError, match="an MCM of 3 levels needs a grid divisible by 4, got 8x6"):
        _apply(size, 8, 6)
    with pytest.raises(UserError, match="divisible by 4, got 10x8"):
        _apply(size, 10, 8)


def test_a_missing_estimate_of_x0_is_named():
    with pytest.raises(ValueError, match=r"pass x0=estimate_x0\(\.\.\.\)"):
        _apply(TINY, 8, 8, ("x_t", "eps", "x0"))
