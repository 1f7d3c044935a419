"""Laws of examples that lack modalities: what is missing is never shown or judged (together: test_together.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_cache import feeds_of

from mcm_jax.base import BaseCard
from mcm_jax.cache import Cache
from mcm_jax.data import DataSettings
from mcm_jax.draws import Draws
from mcm_jax.errors import UserError
from mcm_jax.evaluation.evaluate import _chosen
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import flatten, judges_of
from mcm_jax.modalities import Modality
from mcm_jax.pictures import show
from mcm_jax.training import step

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))


@pytest.fixture(autouse=True)
def gaps(monkeypatch):
    tiny.leave_gaps(monkeypatch)


@pytest.fixture(scope="module")
def modulator(small_path):
    settings = tiny.settings_of(tiny.make_config(small_path, tiny.SMALL))
    return settings.mcm.modulator(MODALITIES, settings.base.outline().card)


def test_what_is_missing_trains_as_what_is_dropped(modulator):
    """The same loss and gradient, whatever stands in a missing condition's place."""
    rng = np.random.default_rng(0)
    index, shape = np.arange(6, dtype=np.int32), (6, 8, 8)
    batch = {"index": index, "draw": index, "seen": index, "image": rng.integers(0, 256, (*shape, 3)).astype(np.uint8)}
    batch |= {
        "segmentation": rng.integers(0, 6, shape).astype(np.uint8),
        "sketch": rng.integers(0, 256, shape).astype(np.uint8),
    }
    has = rng.integers(0, 2, (6, 2)).astype(np.uint8)
    other = {m.name: np.where(has[:, i, None, None], batch[m.name], 0) for i, m in enumerate(MODALITIES)}
    draws = Draws(seed=0, count=5, density=(1,), total=1000)
    make = lambda rate: step.make_noise_step(modulator, draws, seed=0, drop_rate=rate)  # noqa: E731
    found = make(0.0)(batch | {"present": has})
    np.testing.assert_array_equal(found["present"], has > 0)
    dropped = make(0.0)(batch | other) | {"present": jnp.asarray(has > 0)}
    params = jax.jit(lambda key: modulator.init(key, (8, 8, 3)))(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), params)
    gradient = jax.jit(jax.value_and_grad(step.make_loss(modulator, weighting="v", l1=0.01), has_aux=True))
    one, two = (gradient(params, record | {"eps": record["x_t"]}) for record in (found, dropped))
    tiny.assert_same_bits(one, two)
    whole = gradient(params, dropped | {"eps": dropped["x_t"], "present": jnp.ones((6, 2), bool)})
    assert abs(float(whole[0][0] - one[0][0])) > 1e-5
    # The drop goes on as it was, beside it, for one rate and for several.
    shown = np.asarray(make(0.3)(batch)["present"])
    assert not shown.all() and shown.any()
    np.testing.assert_array_equal(make(0.3)(batch | {"present": has})["present"], shown & (has > 0))
    np.testing.assert_array_equal(make([0.0, 0.3])(batch | {"present": has})["present"][1], shown & (has > 0))


SAME = tiny.SMALL | {"data.size": 12, "draws.count": 2, "cache.shard_draws": 8, "train.validate_every": 0}


def test_cached_and_online_know_what_is_missing(small_path, tmp_path):
    config = tiny.make_config(small_path, SAME | {"data.views": 2, "data.flip": True, "cache.dtype": "float32"})
    online, cached = feeds_of(config, tmp_path)
    for a, b in zip(online, cached, strict=True):
        np.testing.assert_allclose(a.pop("eps"), b.pop("eps"), atol=1e-5)
        tiny.assert_same_bits(a, b)
    rows = np.arange(12, dtype=np.int32)
    cache = Cache(tmp_path / "cache")
    for draw in (0, 1):  # both views
        np.testing.assert_array_equal(
            cache.read(rows, rows * 0 + draw)["present"], np.stack([rows % 3, rows % 4], 1) > 0
        )


@pytest.fixture
def held_out():
    return HeldOut(DataSettings(), BaseCard("", "", None, (32, 32, 3), (32, 32, 3), False, 1, 1), MODALITIES, 9)


def test_judges_judge_by_what_is_there(held_out):
    i = np.arange(9)
    has = {"segmentation": i % 3 != 0, "sketch": i % 4 != 0}
    assert all(np.array_equal(held_out.present[name], has[name]) for name in has)
    images = np.random.default_rng(0).uniform(-1, 1, (9, 32, 32, 3)).astype(np.float32)
    for judge in judges_of(held_out, {}):
        own = has[judge.name]
        found, alone = judge(images, i), judge.judge(images[own], i[own])
        assert found.numbers == alone.numbers and np.isfinite(found.scores[own]).all()
        assert flatten(found.numbers) != flatten(judge.judge(images, i).numbers)
        np.testing.assert_array_equal(np.isnan(found.scores), ~own)
        assert f"of the {own.sum()} of 9 held-out examples that have one" in judge.how
        chosen = _chosen(found.scores, judge.of)
        assert own[chosen].all() and found.scores[chosen[-1]] == np.nanmax(found.scores)
        turned = np.roll(i, 1)  # judged by another example's condition, where that has one
        assert np.array_equal(np.isnan(judge(images, turned).scores), ~own[turned])


def test_what_no_example_has_is_refused(held_out):
    vars(held_out)["present"] = held_out.present | {"sketch": np.zeros(9, bool)}
    with pytest.raises(UserError, match="none of the 9 held-out examples has a sketch.*--judge=sketch=none"):
        judges_of(held_out, {})


def test_a_missing_condition_is_drawn_as_none(held_out):
    drawn = show(MODALITIES[1], held_out.conditions["sketch"], present=held_out.present["sketch"])
    assert all(np.ptp(picture) == 0 for picture in drawn[[0, 4, 8]]) and np.ptp(drawn[1]) > 0
