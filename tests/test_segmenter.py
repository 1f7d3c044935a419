"""The shipped segmenter: its score, its interface, its errors."""

import numpy as np
import pytest

from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation.metrics import class_iou, confusion_matrix, mean_iou
from mcm_jax.evaluation.segmenter import ASSET, load_segmenter


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter()


@pytest.fixture(scope="module")
def fresh():
    """Pictures and labels that neither the training nor the recorded score has seen."""
    scenes = [Scenes("test", 160, seed=2)[i] for i in range(160)]
    return np.stack([s["image"] for s in scenes]), np.stack([s["segmentation"] for s in scenes])


@pytest.fixture(scope="module")
def predicted(segmenter, fresh):
    return segmenter.predict(fresh[0])


def test_asset_is_small_and_documented(segmenter):
    assert segmenter.classes == CLASSES
    assert sum(f.stat().st_size for f in ASSET.iterdir()) < 1_000_000
    assert segmenter.config["recipe"]["data_seed"] != 0  # the base model's scenes have seed 0
    assert segmenter.config["held_out"]["mean_iou"] >= 0.93
    assert (ASSET / "training_log.jsonl").read_text().startswith("{")


def test_predicts_labels(predicted, fresh):
    assert predicted.dtype == np.uint8 and predicted.shape == fresh[1].shape


def test_score_of_64_scenes(predicted, fresh):
    assert mean_iou(confusion_matrix(predicted[:64], fresh[1][:64], len(CLASSES))) >= 0.9


def test_recorded_score_is_reproduced_on_fresh_scenes(segmenter, predicted, fresh):
    matrix = confusion_matrix(predicted, fresh[1], len(CLASSES))
    assert mean_iou(matrix) == pytest.approx(segmenter.config["held_out"]["mean_iou"], abs=0.02)
    assert class_iou(matrix).min() > 0.8


def test_a_little_noise_does_little_harm(segmenter, fresh):
    images = fresh[0][:64] + 0.05 * np.random.default_rng(0).standard_normal(fresh[0][:64].shape)
    labels = segmenter.predict(np.clip(images, -1, 1))
    assert mean_iou(confusion_matrix(labels, fresh[1][:64], len(CLASSES))) >= 0.85


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65])
def test_batch_size_changes_nothing(segmenter, fresh, predicted, size):
    np.testing.assert_array_equal(segmenter.predict(fresh[0][:size]), predicted[:size])
