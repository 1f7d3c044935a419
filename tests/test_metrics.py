"""Laws of the metrics, and small cases worked by hand."""

import numpy as np
import pytest

from mcm_jax.data.scenes import Scenes
from mcm_jax.evaluation.metrics import class_iou, confusion_matrix, diversity, edge_f1, edge_map, mean_iou


def _step_picture(column: int, size: int = 12) -> np.ndarray:
    """Black to the left of ``column``, white from it on."""
    images = np.full((1, size, size, 3), -1, np.float32)
    images[:, :, column:] = 1
    return images


def _line(column: int, size: int = 12) -> np.ndarray:
    sketches = np.ones((1, size, size), np.float32)
    sketches[:, :, column] = 0
    return sketches


def test_confusion_matrix_by_hand():
    matrix = confusion_matrix(np.array([0, 0, 1, 2, 1], np.uint8), np.array([0, 1, 1, 2, 2], np.int32), 4)
    assert matrix.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(class_iou(matrix), [1 / 2, 1 / 3, 1 / 2, np.nan])
    assert mean_iou(matrix) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_class_that_is_only_predicted_counts_as_zero():
    assert mean_iou(confusion_matrix(np.array([0, 1]), np.array([0, 0]), 2)) == pytest.approx((1 / 2 + 0) / 2)


def test_confusion_matrix_laws():
    rng = np.random.default_rng(0)
    predicted, target = rng.integers(0, 6, (2, 4, 8, 8), dtype=np.uint8)
    matrix = confusion_matrix(predicted, target, 6)
    assert matrix.sum() == target.size
    assert mean_iou(confusion_matrix(target, target, 6)) == 1
    np.testing.assert_array_equal(confusion_matrix(target, predicted, 6), matrix.T)
    halves = [confusion_matrix(predicted[s], target[s], 6) for s in (slice(1), slice(1, None))]
    np.testing.assert_array_equal(sum(halves), matrix)
    names = rng.permutation(6)  # renaming the classes changes nothing
    assert mean_iou(confusion_matrix(names[predicted], names[target], 6)) == pytest.approx(mean_iou(matrix))


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (np.zeros(3, int), np.zeros(4, int), "shape"),
        (np.zeros(3), np.zeros(3, int), "predicted must hold integer"),
        (np.array([0, 6]), np.array([0, 0]), "predicted has labels 0..6, expected 0..5"),
        (np.array([0, 0]), np.array([-1, 0]), "target has labels -1..0"),
    ],
)
def test_confusion_matrix_errors(predicted, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(predicted, target, 6)


def test_iou_errors():
    with pytest.raises(ValueError, match="square"):
        mean_iou(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="negative"):
        mean_iou(np.array([[1, -1], [0, 1]]))
    with pytest.raises(ValueError, match="empty"):
        mean_iou(np.zeros((3, 3), int))


def test_edge_map_marks_both_sides_of_a_step():
    edges = edge_map(_step_picture(6))
    assert edges.dtype == bool and edges.shape == (1, 12, 12)
    assert edges[0, :, 5:7].all() and edges.sum() == 2 * 12
    one_channel = np.zeros((1, 12, 12, 3), np.float32)
    one_channel[:, 6:, :, 2] = 0.5  # a step of 0.5 has a gradient of 0.25
    assert edge_map(one_channel, 0.25)[0, 5:7].all() and not edge_map(one_channel, 0.26).any()
    assert not edge_map(np.full((2, 8, 8, 3), 0.3)).any()


def test_edges_turn_with_the_picture():
    images = np.stack([Scenes("test", 2)[i]["image"] for i in range(2)])
    np.testing.assert_array_equal(edge_map(np.rot90(images, axes=(1, 2))), np.rot90(edge_map(images), axes=(1, 2)))
    np.testing.assert_array_equal(edge_map(-images), edge_map(images))


@pytest.mark.parametrize(
    ("column", "tolerance", "precision", "recall"),
    [
        (6, 1, 1.0, 1.0),
        (6, 0, 0.5, 1.0),  # the edge is two pixels wide, the line one
        (7, 0, 0.0, 0.0),
        (7, 1, 0.5, 1.0),
        (8, 1, 0.0, 0.0),
        (8, 2, 0.5, 1.0),
        (8, 3, 1.0, 1.0),
    ],
)
def test_edge_f1_by_hand(column, tolerance, precision, recall):
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    expected = {"precision": precision, "recall": recall, "f1": f1}
    assert edge_f1(_step_picture(6), _line(column), tolerance) == pytest.approx(expected)


def test_edge_f1_of_nothing():
    flat, blank = np.zeros((1, 12, 12, 3)), np.ones((1, 12, 12))
    assert edge_f1(flat, blank) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert edge_f1(flat, _line(6)) == {"precision": 1.0, "recall": 0.0, "f1": 0.0}
    assert edge_f1(_step_picture(6), blank)["f1"] == 0.0


def test_tolerance_does_not_reach_into_other_pictures():
    pictures = np.concatenate([_step_picture(6), np.zeros((1, 12, 12, 3), np.float32)])
    sketches = np.concatenate([np.ones((1, 12, 12), np.float32), _line(6)])
    assert edge_f1(pictures, sketches, 3)["f1"] == 0.0


def test_scenes_match_their_own_sketch_best():
    scenes = [Scenes("test", 64)[i] for i in range(64)]
    images, sketches = (np.stack([s[name] for s in scenes]) for name in ("image", "sketch"))
    own, other = edge_f1(images, sketches)["f1"], edge_f1(images, np.roll(sketches, 1, axis=0))["f1"]
    assert own > 0.87 and other < 0.72
    order = np.random.default_rng(0).permutation(64)
    assert edge_f1(images[order], sketches[order])["f1"] == pytest.approx(own)
    assert edge_f1(images, sketches, 2)["f1"] > own > edge_f1(images, sketches, 0)["f1"]


def test_edge_errors():
    images, sketches = _step_picture(6), _line(6)
    with pytest.raises(ValueError, match=r"\[N, H, W, 3\]"):
        edge_map(images[0])
    with pytest.raises(ValueError, match=r"images must lie in \[-1, 1\]"):
        edge_map(images * 255)
    with pytest.raises(ValueError, match="finite"):
        edge_map(images * np.nan)
    with pytest.raises(ValueError, match="need sketches"):
        edge_f1(images, sketches[:, 1:])
    with pytest.raises(ValueError, match=r"sketches must lie in \[0, 1\]"):
        edge_f1(images, sketches * 255)
    with pytest.raises(ValueError, match="tolerance"):
        edge_f1(images, sketches, -1)


def test_diversity_by_hand():
    black, white = np.full((2, 4, 4, 3), -1.0), np.full((2, 4, 4, 3), 1.0)
    assert diversity(np.stack([black, black])) == 0
    assert diversity(np.stack([black, white])) == pytest.approx(2)
    assert diversity(np.stack([black, white, white])) == pytest.approx(4 / 3)  # of three pairs, two differ by 2
    mixed = np.stack([black, np.concatenate([black[:1], white[:1]])])  # one condition of two varies
    assert diversity(mixed) == pytest.approx(1)


def test_diversity_laws():
    samples = np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 8, 3)).astype(np.float32)
    value = diversity(samples)
    assert diversity(samples[::-1, ::-1]) == pytest.approx(value)
    assert diversity(samples * 0.5) == pytest.approx(value / 2, rel=1e-5)


def test_diversity_errors():
    with pytest.raises(ValueError, match="two seeds"):
        diversity(np.zeros((1, 2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"\[K, N, H, W, 3\]"):
        diversity(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="must lie in"):
        diversity(np.full((2, 1, 4, 4, 3), 3.0))
