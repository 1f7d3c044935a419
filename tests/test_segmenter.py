"""The shipped segmenter: its score, its interface, its errors."""

import json
import shutil

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


def test_wrong_pictures_are_refused(segmenter, fresh):
    images = fresh[0][:2]
    with pytest.raises(ValueError, match=r"trained on images \[B, 32, 32, 3\], got \[2, 16, 32, 3\]"):
        segmenter.predict(images[:, :16])
    with pytest.raises(ValueError, match="trained on"):
        segmenter.predict(images[0])
    with pytest.raises(ValueError, match="floats"):
        segmenter.predict(np.zeros((1, 32, 32, 3), np.uint8))
    for wrong in (images + 1, images * np.nan):
        with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
            segmenter.predict(wrong)


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_segmenter(tmp_path)
    shutil.copytree(ASSET, tmp_path / "wider")
    config = json.loads((ASSET / "config.json").read_text())
    config["net"]["widths"][0] *= 2
    (tmp_path / "wider" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing .* unexpected "):
        load_segmenter(tmp_path / "wider")
