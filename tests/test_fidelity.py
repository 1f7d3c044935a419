"""Distances between sets of features: clean-fid's numbers, and what they must do on sets that are known."""

import numpy as np
import pytest
from scipy import ndimage

from mcm_jax.data.scenes import Scenes
from mcm_jax.evaluation.fidelity import fid, interval, kid, nearest
from mcm_jax.evaluation.segmenter import load_segmenter


def test_numbers_are_those_of_clean_fid():
    """clean-fid 0.1.35's frechet_distance and kernel_distance (one subset, of all 200) on the same features."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12))
    a, b = rng.normal(size=(300, 12)) @ mix, rng.normal(size=(200, 12)) @ mix * 1.1 + 0.3
    assert fid(a, b) == pytest.approx(6.117545460182782, rel=1e-8)
    assert kid(a[:200] / 5, b / 5) == pytest.approx(0.023120409325972844, rel=1e-8)


@pytest.fixture(scope="module")
def features():
    """Of 400 real scenes; of the first half blurred, and recoloured; of the second with noise of 4 in 255."""
    images = np.stack([scene["image"] for scene in Scenes("test", 400, seed=9)]).astype(np.float32)
    net, half = load_segmenter(), images[:200]
    blurred = [ndimage.gaussian_filter(half, (0, sigma, sigma, 0)) for sigma in (0.7, 2.0)]
    changed = {"blurred": blurred[0], "very blurred": blurred[1], "recoloured": half[..., ::-1]}
    noise = np.random.default_rng(0).normal(0, 4 / 127.5, images[200:].shape)
    changed["copied"] = np.clip(images[200:] + noise, -1, 1).astype(np.float32)
    return {name: net.features(value) for name, value in {"real": images, **changed}.items()}


@pytest.mark.parametrize(("distance", "stated"), [(fid, 1.15), (kid, -0.010)])
def test_sets_order_as_they_should(features, distance, stated):
    """Values of docs/evaluation.md; FID of two halves is above 0 by its bias of few pictures."""
    real = features["real"]
    first, second = real[:200], real[200:]
    assert distance(real, real) == pytest.approx(0, abs=1e-6)
    halves, around = distance(first, second), interval(distance, first, second)
    blurred, more, recoloured = (distance(features[name], second) for name in ("blurred", "very blurred", "recoloured"))
    assert halves == pytest.approx(stated, abs=0.05 if distance is fid else 0.005)
    assert halves < blurred < more and halves < recoloured
    assert around > 0 and more - interval(distance, features["very blurred"], second) > halves + around
    if distance is kid:
        assert abs(halves) <= around


def test_copies_are_nearer_than_real_pictures(features):
    real = features["real"]
    held_out, copied = (np.median(nearest(found, real[200:])) for found in (real[:200], features["copied"]))
    assert copied < 0.5 * held_out


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(1)
    found, real = rng.normal(size=(300, 5)), rng.normal(size=(70, 5))
    wanted = np.sqrt(((found[:, None] - real) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(nearest(found, real), wanted, atol=1e-9)
    np.testing.assert_allclose(nearest(real[:3], real), 0, atol=1e-6)


def test_one_feature_and_one_point_have_distances():
    """The Frechet distance of two Gaussians on a line is (m - n)^2 + (s - t)^2; two heaps of one point are at 0."""
    a, b = np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])
    assert fid(a, b) == pytest.approx((5 - 1) ** 2 + (np.sqrt(8) - np.sqrt(2)) ** 2)
    assert kid(np.ones((4, 3)), np.ones((5, 3))) == 0


def test_few_pictures_have_no_interval():
    """Three quarters of two pictures are no subset to vary over."""
    with pytest.raises(ValueError, match="at least 2 pictures"):
        interval(kid, np.eye(2), np.eye(2))


@pytest.mark.parametrize(
    ("distance", "found", "real", "message"),
    [
        (fid, np.zeros((8, 12)), np.zeros((20, 12)), "needs at least 13 pictures on either side, got 8 and 20"),
        (kid, np.zeros((1, 12)), np.zeros((20, 12)), "at least 2 pictures"),
        (kid, np.zeros((8, 12)), np.zeros((20, 11)), r"\[8, 12\] and \[20, 11\]"),
        (nearest, np.full((8, 12), np.nan), np.zeros((20, 12)), "must be finite"),
    ],
)
def test_what_has_no_distance_is_refused(distance, found, real, message):
    with pytest.raises(ValueError, match=message):
        distance(found, real)
