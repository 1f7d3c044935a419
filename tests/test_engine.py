"""Laws of the engine: MCMs together, when and where they act, pictures to begin with, sizes, what the host sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mcm_jax import engine as engine_lib
from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.control import plan
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import read_conditions, settings_of_each
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import Trained

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

N, STEPS = 2, 4
PROMPTS = ["a mountain lake at sunset", "a meadow by day"]


def _mcm(base, modalities, seed):
    """One whose every weight does something."""
    modulator = tiny.settings_of(tiny.make_config("nowhere", tiny.SMALL)).mcm.modulator(modalities, base)
    shapes = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape).astype(np.float32), shapes)
    return Trained(modulator, params, name=f"mcm{seed}")


MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))


@pytest.fixture(scope="module")
def base(base_path):
    return load_base(base_path)


@pytest.fixture(scope="module")
def mcms(base):
    """One of each modality."""
    return [_mcm(base, MODALITIES[i : i + 1], seed=i) for i in range(2)]


@pytest.fixture(scope="module")
def settings():
    return SamplingSettings(sampler="ddim", steps=STEPS, batch_size=N)


@pytest.fixture(scope="module")
def two(base, mcms, settings):
    return Pipeline(base, mcms, settings)


@pytest.fixture(scope="module")
def both(base, settings):
    """One MCM of both modalities."""
    return Pipeline(base, _mcm(base, MODALITIES, seed=2), settings)


@pytest.fixture(scope="module")
def conditions():
    return _conditions(tiny.SIZE, tiny.SIZE)


def _conditions(height, width):
    rng = np.random.default_rng(0)
    labels, sketch = rng.integers(0, 6, (N, height, width)), rng.random((N, height, width)).astype(np.float32)
    return {"segmentation": labels.astype(np.int32), "sketch": sketch}


@pytest.fixture(scope="module")
def keys():
    return sampling.sample_keys(0, N)


def _by_hand(base, mcms, conditions, keys, table, scales, noise=None):
    """The formula, step by step: ``eps + sum_i s_i (eps'_i - eps)``, s_i by row."""

    def denoise(x, at):
        level = at.alpha, at.sigma
        eps = changed = base.predict(base.params, x, at.t, level=level)
        for mcm, scale in zip(mcms, scales, strict=True):
            modulator = mcm.modulator
            present = np.ones((N, len(modulator.modalities)), bool)
            own = modulator(mcm.params, x, eps, at.t, conditions, present, level)[0]
            changed = changed + jnp.asarray(scale, jnp.float32)[at.row] * (own - eps)
        return changed

    noise = sampling.initial_noise(keys, base.latent_shape) if noise is None else noise
    return np.asarray(jax.jit(lambda noise: sampling.sample(denoise, noise, keys, table))(noise))


def _equal(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol * max(1, np.abs(expected).max()))


def test_mcms_add_up_with_weights_windows_and_schedules(two, mcms, base, conditions, keys, settings):
    """One program for all of it; an MCM that is shown nothing rests beside others."""
    table = settings.table(base.schedule)
    fall = np.array([1, 2 / 3, 1 / 3, 0])
    ways = [
        ({}, [[1, 1, 1, 1]] * 2),
        ({"weights": [0.5, 2.0], "guidance": 1.5}, [[0.75] * 4, [3.0] * 4]),
        ({"window": {"sketch": (0.5, 1.0)}}, [[1] * 4, [0, 0, 1, 1]]),
        ({"guidance_schedule": (1.0, 0.0), "end": 0.75}, [[*fall[:3], 0]] * 2),
    ]
    for how, scales in ways:
        found = two(conditions, keys, **how)
        _equal(found, _by_hand(base, mcms, conditions, keys, table, scales))
    one = two({"sketch": conditions["sketch"]}, keys)
    _equal(one, _by_hand(base, mcms[1:], conditions, keys, table, [[1] * 4]))
    np.testing.assert_array_equal(two({}, keys), two(conditions, keys, guidance=0.0))
    np.testing.assert_array_equal(one, two(conditions, keys, strength={"segmentation": 0.0}))
    assert np.abs(one - two(conditions, keys)).max() > 1e-2
    # Each sample its own.
    mixed = two(conditions, keys, weights=[np.array([1, 0]), 1.0], guidance_schedule=[(), (1.0, 0.0)])
    _equal(mixed[0], two(conditions, keys)[0])
    _equal(mixed[1], two(conditions, keys, weights=[0, 1], guidance_schedule=(1.0, 0.0))[1])
    assert two.engine.compilations == 1


def test_modalities_of_one_mcm_have_windows_of_their_own(both, base, conditions, keys):
    """Outside its window a modality is absent; where none is left the MCM does not act."""
    first = both(conditions, keys, window={"sketch": (0, 0.5)})
    calls = []

    def see(now):
        calls.append(now.look().maps[0] if now.look else None)

    found = both(conditions, keys, window={"sketch": (0, 0.5), "segmentation": np.array([[0, 0.5], [0, 1]])},
                 callback=see)  # fmt: skip
    _equal(found[1], first[1])
    assert np.abs(found[0] - first[0]).max() > 1e-3
    _equal(found[0], both(conditions, keys, end=0.5)[0])
    gammas = [maps[0] for maps in calls[:-1]]
    assert all((g[1] != 0).any() for g in gammas) and [(g[0] != 0).any() for g in gammas] == [True, False, False]
    assert calls[-1] is None and both.engine.compilations == 1


def test_a_plan_asks_for_no_more_than_is_needed(settings, base):
    """Rows without anything to do ask for nothing; partial strengths ask once more."""
    table = settings.table(base.schedule)
    each = [settings, settings.but(start=0.5)]
    strengths, windows = np.array([[1.0, 0.5], [0.0, 1.0]]), np.array([[[0, 1], [0, 0.25]], [[0, 1], [0.75, 1]]])
    control, calls = plan({}, strengths, windows, np.array([1.0, 2.0]), each, table)
    assert calls[:5].tolist() == [2, 1, 1, 1, 0] and not calls[5:].any() and len(calls) == len(table.t)
    np.testing.assert_array_equal(control.scale[:, :5], [[1, 1, 1, 1, 0], [0, 0, 0, 2, 0]])
    np.testing.assert_allclose(control.weights[0, 0], [0.5, 0.5, 0])
    assert control.subsets[0, 0, :2].tolist() in ([[True, False], [True, True]], [[True, True], [True, False]])
    unasked, calls = plan({}, 0 * strengths, windows, np.ones(2), each, table)
    assert (unasked.scale[0, :4] == 1).all() and calls[0] == 1
    assert not plan({}, 0 * strengths, windows, np.ones(2), each, table, rests_unasked=True)[0].scale.any()


def test_a_picture_to_begin_with_and_a_region_to_paint(both, base, conditions, keys, settings):
    """Known pixels come out exactly; what is begun with is the picture with noise of its step."""
    image = np.tanh(np.random.default_rng(1).normal(size=(N, tiny.SIZE, tiny.SIZE, 3))).astype(np.float32)
    noise, mcm = sampling.initial_noise(keys, base.latent_shape), both.mcms[0]
    table = settings.but(image_strength=0.5).table(base.schedule, from_picture=True)
    assert int(table.count) == 2

    def denoise(x, at):
        level, present = (at.alpha, at.sigma), np.ones((N, 2), bool)
        eps = base.predict(base.params, x, at.t, level=level)
        return mcm.modulator(mcm.params, x, eps, at.t, conditions, present, level)[0]

    def by_hand(known):
        hold = lambda x, alpha, sigma: jnp.where(known, alpha * image + sigma * noise, x)  # noqa: E731
        state = sampling.begin(noise, table, image)
        return np.asarray(sampling.advance(denoise, state, keys, table, 0, table.count, hold).x)

    found = both(conditions, keys, image=image, image_strength=0.5)
    _equal(found, by_hand(np.zeros((N, 1, 1, 1), bool)))
    anew = np.zeros((N, tiny.SIZE, tiny.SIZE), bool)
    anew[0, 4:9, 3:12], anew[1] = True, True
    painted = both(conditions, keys, image=image, inpaint=anew, image_strength=0.5)
    np.testing.assert_array_equal(painted[0][~anew[0]], image[0][~anew[0]])
    expected = by_hand(~anew[..., None])
    _equal(painted[anew], expected[anew])
    _equal(painted[1], found[1])
    assert np.abs(painted[0] - found[0])[anew[0]].max() > 1e-2
    # More of the steps leave less of the picture; another number of them is another table of the same program.
    far = [np.abs(both(conditions, keys, image=image, image_strength=s, steps=10) - image).mean() for s in (0.1, 1.0)]
    assert far[0] < far[1] and both.engine.compilations == 1


def test_known_pixels_are_kept_by_solvers_with_a_memory(two, conditions, keys):
    """And by several MCMs."""
    image = np.tanh(np.random.default_rng(1).normal(size=(N, tiny.SIZE, tiny.SIZE, 3))).astype(np.float32)
    anew = np.zeros((N, tiny.SIZE, tiny.SIZE), bool)
    anew[:, 4:9, 3:12] = True
    for sampler in ("heun", "plms", "unipc"):
        how = {"image": image, "inpaint": anew, "image_strength": 1.0, "sampler": sampler}
        painted = two(conditions, keys, **how)
        np.testing.assert_array_equal(painted[~anew], image[~anew])
        assert np.isfinite(painted).all() and np.abs(painted - image)[anew].max() > 1e-2
        assert np.abs(painted - two(conditions, keys, guidance=0.0, **how))[anew].max() > 1e-3
    assert two.engine.compilations == 1


def test_maps_of_integers_are_what_they_say(conditions):
    """Also to what brings them to another grid, where uint8 is value * 255."""
    ink = np.asarray(conditions["sketch"] > 0.5)
    for dtype in (np.uint8, bool, np.float64):
        given = {"sketch": ink.astype(dtype)}
        read = read_conditions(N, (tiny.SIZE, tiny.SIZE), MODALITIES, ["mcm"], given, None, None, None, None)
        found = MODALITIES[1].resize_all(read.values["sketch"], 8, 8)
        np.testing.assert_array_equal(found, MODALITIES[1].resize_all(ink.astype(np.float32), 8, 8))
        assert found.dtype == np.float32


def test_given_noise_is_that_of_the_keys(both, base, conditions, keys):
    noise = sampling.initial_noise(keys, base.latent_shape)
    np.testing.assert_array_equal(both(conditions, keys, latents=noise), both(conditions, keys))
    other = both(conditions, keys, latents=sampling.slerp(noise, noise[::-1], jnp.array([0.0, 0.3])))
    _equal(other[0], both(conditions, keys)[0])
    assert np.abs(other[1] - both(conditions, keys)[1]).max() > 1e-2


def test_other_sizes_are_other_buckets(both, base, keys):
    """As a base and an MCM of that size would do it; what does not fit is refused with the nearest that does."""
    large = _conditions(24, 40)
    sized = dataclasses.replace(base, latent_shape=(24, 40, 3), image_shape=(24, 40, 3))
    before = both.engine.compilations
    found = both(large, keys, height=24, width=40)
    assert found.shape == (N, 24, 40, 3) and both.engine.compilations == before + 1
    settings = both.settings
    _equal(found, _by_hand(sized, both.mcms, large, keys, settings.table(base.schedule), [[1] * 4]))
    both(large, keys, height=24, width=40, guidance=0.0, steps=6)
    assert both.engine.compilations == before + 1
    for change, words in (({"height": 23}, "height must be a multiple of 2"), ({"width": 41}, "such as 40")):
        with pytest.raises(UserError, match=words):
            both(large, keys, **change)


def test_the_host_sees_every_few_steps(both, conditions, keys):
    """In as many programs as without; previews end at the picture, and what is looked at is what acts."""
    told, plain = [], both(conditions, keys)
    before, decoders = both.engine.compilations, both.engine.finish._cache_size()

    def see(now):
        told.append((now.step, now.steps, now.samples, now.preview(), now.look and now.look()))

    found = both(conditions, keys, callback=see, every=3, batch_size=N)
    np.testing.assert_array_equal(found, plain)
    assert [(step, steps) for step, steps, *_ in told] == [(3, 4), (4, 4)]
    assert all(samples == range(N) and preview.shape == found.shape for *_, samples, preview, _ in told)
    np.testing.assert_allclose(told[-1][3], found, atol=1e-4)  # DDIM's last step ends at its estimate
    view = told[0][4]
    assert np.abs(view.x0 - found).mean() < np.abs(view.base - found).mean()
    assert (view.maps[0][0] != 0).all() and told[-1][4] is None
    # What is looked at is what the next call estimates, whatever is asked of an MCM: one more preview says the same.
    previews, looks = [], []

    def compare(now):
        previews.append(now.preview())
        looks.append(now.look and now.look())

    both(conditions, keys, callback=compare, strength={"sketch": [0.5, 1.5]}, weights=[0.7])
    for view, after in zip(looks[:-1], previews[1:], strict=True):
        _equal(np.clip(view.x0, -1, 1), after)
        assert (view.maps[0][0] != 0).all()
    assert both.engine.finish._cache_size() == decoders
    one = []
    both({k: v[:1] for k, v in conditions.items()}, keys[:1], callback=one.append, every=2)
    assert [now.samples for now in one] == [range(1)] * 2 and both.engine.compilations == before


def test_large_pictures_are_decoded_in_slices(sd_path, monkeypatch):
    """To the same pictures, and encoded; other text branches of one batch do not matter."""
    base = load_base(sd_path)
    settings = SamplingSettings(steps=2, batch_size=4, text_guidance=3.0)
    keys, prompts = sampling.sample_keys(0, 4), PROMPTS * 2
    at_once = Pipeline(base, (), settings)
    whole = at_once({}, keys, prompts=prompts)
    image, anew = np.clip(whole, -1, 1), np.zeros((4, 32, 32), bool)
    anew[:, 5:20, 8:] = True
    begun = at_once({}, keys, prompts=prompts[::-1], image=image)
    monkeypatch.setattr(engine_lib, "_PIXELS", 32 * 32)
    sliced = Pipeline(base, (), settings)
    np.testing.assert_allclose(sliced({}, keys, prompts=prompts), whole, atol=1e-4)
    context = np.asarray(base.embed_text(base.params, prompts))
    negative = np.repeat(np.asarray(base.embed_text(base.params, [""])), 4, axis=0)
    found = sliced({}, keys, context=context, negative_context=negative)
    np.testing.assert_allclose(found, whole, atol=1e-4)
    mixed = sliced({}, keys, prompts=prompts, text_rescale=[0.0, 0.7, 0.0, 1.0])
    np.testing.assert_allclose(mixed[::2], whole[::2], atol=1e-4)
    assert np.abs(mixed - whole)[1::2].max() > 1e-3
    # A picture of a latent base, painted anew in part: the rest is exact.
    np.testing.assert_allclose(sliced({}, keys, prompts=prompts[::-1], image=image), begun, atol=1e-4)
    painted = sliced({}, keys, prompts=prompts[::-1], image=image, inpaint=anew)
    np.testing.assert_array_equal(painted[~anew], image[~anew])
    assert np.abs(painted - image).max() > 1e-2
    for odd, words in (({"negative_context": negative, "text_guidance": 1}, "negative_context: does nothing at text_"),
                       ({"negative_context": negative, "negative_prompt": "night"}, "the same thing twice"),
                       ({"context": context[..., 1:]}, "context must be of shape"),
                       ({"context": context[:, 1:]}, "of one length")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            sliced({}, keys, **odd)


@pytest.mark.parametrize(
    "how, words",
    [
        ({"weights": [1.0]}, ["weights", "2, one an MCM (mcm0, mcm1)", "got 1"]),
        ({"weights": [1.0, -1]}, ["weights", "at least 0"]),
        ({"weights": [[1.0, 1.0, 1.0], 1.0]}, ["weights", "one value, or 2"]),
        ({"strength": {"sketch": [1.0] * 3}}, ["strength of sketch", "one value, or 2"]),
        ({"present": {"sketch": [True] * 3}}, ["presence of sketch", "one value, or 2"]),
        ({"present": {"depth": True}}, ["segmentation, sketch", "depth"]),
        ({"every": 0}, ["every", "at least 1"]),
        ({"height": -16}, ["height", "pixels"]),
        ({"window": {"sketch": (0.5, 0.2)}}, ["window of sketch", "rising"]),
        ({"window": {"depth": (0, 1)}}, ["segmentation, sketch", "depth"]),
        ({"inpaint": np.zeros((N, 16, 16), bool)}, ["image", "painted anew"]),
        ({"image": np.zeros((N, 16, 8, 3))}, ["image", "[2, 16, 16, 3]", "[2, 16, 8, 3]"]),
        ({"image": np.full((N, 16, 16, 3), 9.0)}, ["image", "[-1, 1]", "9..9"]),
        ({"latents": np.zeros((N, 16, 16, 1))}, ["latents", "[2, 16, 16, 3]"]),
        ({"context": np.zeros((N, 20, 24))}, ["context", "unconditional"]),
        ({"image_strength": 0.0}, ["image_strength", "(0, 1]"]),
        ({"guidance_schedule": (1.0, -1.0)}, ["guidance_schedule", "at least 0"]),
        ({"text_rescale": 1.5}, ["text_rescale", "[0, 1]"]),
    ],
)
def test_what_cannot_be_is_named(two, conditions, keys, how, words):
    with pytest.raises(UserError) as error:
        two(conditions, keys, **how)
    assert all(word in str(error.value) for word in words), error.value


def test_settings_of_each_sample_may_be_arrays(settings):
    one, each = np.array(2.0), jnp.array([1.0, 2.0])
    found = settings_of_each(settings, N, {"guidance": each, "end": one / 4, "guidance_schedule": np.array([1.0, 0.0])})
    assert [(s.guidance, s.end, list(s.guidance_schedule)) for s in found] == [(g, 0.5, [1, 0]) for g in (1, 2)]


def test_mcms_that_do_not_belong_together(base, mcms):
    other = _mcm(base, (Modality("sketch", "map", 3),), seed=3)
    with pytest.raises(UserError, match=r"'sketch': lines of 1 channel.s. and map of 3"):
        Pipeline(base, [*mcms, other])


def test_one_batch_size_after_the_other_is_remarked(both, conditions, keys, recwarn):
    for size in (N, 4):
        both(conditions, keys, batch_size=size, guidance=0.0)
    assert not [w for w in recwarn if "compiled anew" in str(w.message)]
    with pytest.warns(UserWarning, match=r"a batch of 6 is compiled anew \(before: 2, 4\)"):
        both(conditions, keys, batch_size=6, guidance=0.0)
