"""The shipped net that judges facts: its score, its interface, its errors."""

import numpy as np
import pytest

from mcm_jax.data.scenes import TIMES, Scenes
from mcm_jax.evaluation.facts import ASSET, FACTS, facts_of, load_facts_net


@pytest.fixture(scope="module")
def judge():
    return load_facts_net()


@pytest.fixture(scope="module")
def fresh():
    """Pictures as samples are judged (64x64 averaged to 32x32) that neither the training nor the score has seen."""
    scenes = [Scenes("test", 160, 64, 64, seed=2)[i] for i in range(160)]
    images = np.stack([s["image"] for s in scenes]).reshape(160, 32, 2, 32, 2, 3).mean((2, 4))
    return images, facts_of([s["facts"] for s in scenes])


@pytest.fixture(scope="module")
def predicted(judge, fresh):
    return judge.predict(fresh[0])


def right(predicted, facts, count=None):
    return {name: float((predicted[name] == facts[name][:count]).mean()) for name in FACTS}


def test_asset_is_small_and_documented(judge):
    assert sum(f.stat().st_size for f in ASSET.iterdir()) < 1_000_000
    assert judge.config["recipe"]["data_seed"] != 0  # the base models' scenes have seed 0
    assert set(judge.config["held_out"]["accuracy"]) == set(FACTS)
    assert min(judge.config["held_out"]["accuracy"].values()) >= 0.95
    assert (ASSET / "training_log.jsonl").read_text().startswith("{")


def test_facts_of_a_scene():
    night = {"time": "night", "water": True, "trees": 0, "sun": True, "ranges": 1}
    dawn = {"time": "dawn", "water": False, "trees": 5, "sun": False, "ranges": 3}
    found = facts_of([night, dawn])
    assert {k: v.tolist() for k, v in found.items()} == {
        "time": [TIMES.index("night"), TIMES.index("dawn")],
        "water": [1, 0],
        "trees": [0, 1],
        "disc": [1, 0],
    }


def test_predicts_every_fact(predicted):
    assert set(predicted) == set(FACTS)
    for name, values in FACTS.items():
        assert predicted[name].dtype == np.int32 and predicted[name].shape == (160,)
        assert set(predicted[name].tolist()) == set(range(values))


def test_recorded_score_is_reproduced_on_fresh_scenes(judge, predicted, fresh):
    for name, share in right(predicted, fresh[1]).items():
        assert share >= 0.93, name
        assert share == pytest.approx(judge.config["held_out"]["accuracy"][name], abs=0.04), name


def test_scenes_drawn_at_32x32_will_do(judge):
    scenes = [Scenes("test", 64, seed=2)[i] for i in range(64)]
    found = judge.predict(np.stack([s["image"] for s in scenes]))
    assert min(right(found, facts_of([s["facts"] for s in scenes])).values()) >= 0.85


def test_a_little_noise_does_little_harm(judge, fresh):
    images = fresh[0][:64] + 0.05 * np.random.default_rng(0).standard_normal(fresh[0][:64].shape)
    assert min(right(judge.predict(np.clip(images, -1, 1)), fresh[1], 64).values()) >= 0.85


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65])
def test_batch_size_changes_nothing(judge, fresh, predicted, size):
    found = judge.predict(fresh[0][:size])
    for name in FACTS:
        np.testing.assert_array_equal(found[name], predicted[name][:size])
