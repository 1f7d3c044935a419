"""Laws of the embedded data: what a scene is, that every resolution shows the same, and that its labels are true."""

import hashlib

import numpy as np
import pytest
from scipy import ndimage

from mcm_jax.data import render as rendering
from mcm_jax.data.render import render
from mcm_jax.data.scene import draw_scene
from mcm_jax.data.scenes import CLASSES, PALETTE, SPLITS, TIMES, Scenes, scene_at

SKY, SUN, MOUNTAIN, WATER, MEADOW, TREE = range(6)
SIZES = [(8, 8), (16, 24), (32, 32), (64, 48), (128, 128)]


@pytest.fixture(scope="module")
def hundred():
    """A hundred test examples at 32x32 with their scenes."""
    source = Scenes("test", 100)
    return [(scene_at(0, "test", i), source[i]) for i in range(100)]


@pytest.fixture(scope="module")
def large():
    """Thirty scenes, each rendered at 128x128 and, taller than wide, at 96x64."""
    drawn = [scene_at(1, "train", i) for i in range(30)]
    return [(scene, render(scene, h, w)) for scene in drawn for h, w in ((128, 128), (96, 64))]


def _same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], np.ndarray):
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        else:
            assert a[key] == b[key], key


def _borders(labels):
    """Pixels beside one of another class."""
    out = np.zeros(labels.shape, bool)
    step = labels[:, 1:] != labels[:, :-1]
    out[:, 1:] |= step
    out[:, :-1] |= step
    step = labels[1:] != labels[:-1]
    out[1:] |= step
    out[:-1] |= step
    return out


def _near(mask, pixels):
    return ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=pixels)


def _distance_to_disc(scene, height, width):
    """Pixels from each pixel's centre to the disc's edge, negative inside. A disc is round in pixels at any aspect."""
    x, y, radius = scene.disc
    rows, cols = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    return np.hypot(cols - x * width, rows - y * height) - radius * height


# An example is a function of (seed, split, index) alone.


def test_same_index_gives_same_example_in_any_order():
    source, again = Scenes("train", 12, 16, 16, seed=5), Scenes("train", 12, 16, 16, seed=5)
    forwards = [source[i] for i in range(12)]
    backwards = {i: again[i] for i in reversed(range(12))}
    for i in range(12):
        _same(forwards[i], backwards[i])
        _same(forwards[i], again[np.int64(i)])


def test_example_does_not_depend_on_size_of_data_set_or_global_random_state():
    np.random.seed(0)
    a = Scenes("test", 3, 16, 24)[2]
    np.random.seed(1)
    _same(a, Scenes("test", 3000, 16, 24)[2])


def test_iterating_equals_indexing():
    source = Scenes("test", 5, 8, 8, seed=2)
    assert len(source) == len(list(source)) == 5
    for i, example in enumerate(source):
        _same(example, source[i])


def test_example_holds_its_scenes_rendering_caption_and_facts():
    scene, example = scene_at(3, "train", 7), Scenes("train", 8, 16, 24, seed=3)[7]
    _same(example, render(scene, 16, 24) | {"caption": scene.caption, "facts": scene.facts})


def test_rendering_changes_neither_scene_nor_next_rendering():
    scene = scene_at(0, "train", 1)
    first = render(scene, 16, 24)
    render(scene, 32, 32)
    _same(first, render(scene, 16, 24))


def test_splits_and_seeds_share_no_picture():
    """500 pictures each of two splits and two seeds: 1500 different ones."""
    hashes = [
        hashlib.sha256(example["image"].tobytes()).hexdigest()
        for split, seed in (("train", 0), ("test", 0), ("train", 1))
        for example in Scenes(split, 500, 8, 8, seed=seed)
    ]
    assert len(set(hashes)) == len(hashes) == 1500


def test_numpys_stream_is_still_the_one_that_the_shipped_base_was_trained_on():
    """NumPy may change its generators' streams between versions: then every scene would be another, in silence."""
    expected = {
        ("train", 0): "a mountain lake at night with a moon",
        ("train", 1): "a mountain lake at night",
        ("train", 2): "a mountain meadow at night with three trees and a moon",
        ("test", 0): "a mountain meadow at sunset with a sun",
        ("test", 1): "a mountain meadow at night with four trees and a moon",
        ("test", 2): "a mountain lake at dawn with three trees and a sun",
    }
    assert {(split, i): scene_at(0, split, i).caption for split, i in expected} == expected


# Shapes, dtypes, ranges.


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_shapes_dtypes_and_ranges(height, width):
    for example in Scenes("train", 6, height, width):
        image, labels, sketch = example["image"], example["segmentation"], example["sketch"]
        assert image.shape == (height, width, 3) and image.dtype == np.float32
        assert labels.shape == (height, width) and labels.dtype == np.uint8
        assert sketch.shape == (height, width) and sketch.dtype == np.float32
        assert np.isfinite(image).all() and image.min() >= -1 and image.max() <= 1
        assert labels.max() < len(CLASSES)
        assert np.isfinite(sketch).all() and sketch.min() >= 0 and sketch.max() <= 1


def test_pictures_use_their_range(hundred):
    assert all(e["image"].std() > 0.1 for _, e in hundred)
    images = np.stack([e["image"] for _, e in hundred])
    assert images.min() < -0.9 and images.max() > 0.9
    assert all(e["sketch"].max() == 1 and e["sketch"].min() == 0 for _, e in hundred)


def test_classes_have_a_name_and_a_colour_each():
    assert len(set(CLASSES)) == len(CLASSES) == 6
    assert PALETTE.shape == (6, 3) and PALETTE.dtype == np.uint8
    assert len({tuple(c) for c in PALETTE.tolist()}) == 6


# Every resolution shows the same scene.


def test_segmentation_at_128_reduces_to_segmentation_at_32(hundred):
    agreement = []
    for scene, example in hundred[:20]:
        blocks = render(scene, 128, 128)["segmentation"].reshape(32, 4, 32, 4)
        votes = np.stack([(blocks == c).sum((1, 3)) for c in range(len(CLASSES))], -1)
        agreement.append((votes.argmax(-1) == example["segmentation"]).mean())
    assert min(agreement) >= 0.95, agreement
    assert np.mean(agreement) >= 0.985, agreement


def test_image_at_128_reduces_to_image_at_32(hundred):
    for scene, example in hundred[:20]:
        reduced = render(scene, 128, 128)["image"].reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(reduced - example["image"]).mean() < 0.03, scene.caption


# The segmentation is exact.


def test_all_classes_occur_in_a_hundred_scenes(hundred):
    present = np.stack([np.bincount(e["segmentation"].ravel(), minlength=6) > 0 for _, e in hundred])
    assert present[:, [SKY, MOUNTAIN]].all()
    assert (present.sum(0) >= 10).all(), dict(zip(CLASSES, present.sum(0), strict=True))


def test_horizon_parts_sky_from_ground(large):
    for scene, example in large:
        labels = example["segmentation"]
        rows = np.arange(len(labels)) + 0.5
        horizon = scene.horizon * len(labels)
        assert np.isin(labels[rows < horizon - 1], (SKY, SUN, MOUNTAIN, TREE)).all()
        assert np.isin(labels[rows > horizon + 1], (WATER, MEADOW, TREE)).all()


def test_sun_is_the_disc_but_for_what_stands_before_it(large):
    seen = 0
    for scene, example in large:
        labels = example["segmentation"]
        if scene.disc is None:
            assert not (labels == SUN).any()
            continue
        edge = _distance_to_disc(scene, *labels.shape)
        assert not (labels[edge > 0.75] == SUN).any()
        assert np.isin(labels[edge < -0.75], (SUN, MOUNTAIN, TREE)).all()
        if np.isin(labels[edge < 1], (MOUNTAIN, TREE)).any():
            continue
        seen += 1
        height, width = labels.shape
        rows, cols = np.nonzero(labels == SUN)
        x, y, radius = scene.disc
        offset = np.hypot(cols.mean() + 0.5 - x * width, rows.mean() + 0.5 - y * height)
        assert offset < 0.3, scene.caption
        assert len(rows) == pytest.approx(np.pi * (radius * height) ** 2, rel=0.1)
    assert seen >= 10


def test_trees_stand_where_the_scene_says(large):
    for scene, example in large:
        labels = example["segmentation"]
        height, width = labels.shape
        rows, cols = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
        near = np.zeros(labels.shape, bool)
        for tree in scene.trees:
            trunk = int((tree.y - 0.12 * tree.height) * height), int(tree.x * width)
            assert labels[trunk] == TREE, scene.caption
            tall = tree.height * height
            up, side = tree.y * height - rows, np.abs(cols - tree.x * width)
            near |= (up > -1) & (up < 1.03 * tall + 1) & (side < 0.36 * tall + 1)
        assert not (labels[~near] == TREE).any(), scene.caption


def test_ground_is_what_the_scene_says(hundred):
    assert {s.ground for s, _ in hundred} == {"meadow", "lake", "shore"}
    for scene, example in hundred:
        present = set(np.unique(example["segmentation"]).tolist())
        expected = {"meadow": {MEADOW}, "lake": {WATER}, "shore": {MEADOW, WATER}}[scene.ground]
        assert present & {MEADOW, WATER} == expected, scene.caption


# Captions, facts and pictures say the same.


def test_caption_agrees_with_facts(hundred):
    words = {"dawn": "at dawn", "noon": "by day", "sunset": "at sunset", "night": "at night"}
    numbers = ("no", "one tree", "two trees", "three trees", "four trees", "five trees")
    assert set(words) == set(TIMES)
    for _, example in hundred:
        facts = example["facts"]
        place = "lake" if facts["water"] else "meadow"
        extras = [numbers[facts["trees"]]] if facts["trees"] else []
        extras += [("a moon" if facts["time"] == "night" else "a sun")] if facts["sun"] else []
        tail = f" with {' and '.join(extras)}" if extras else ""
        assert example["caption"] == f"a mountain {place} {words[facts['time']]}{tail}"


def test_facts_agree_with_scene_and_segmentation(hundred):
    for scene, example in hundred:
        facts, labels = example["facts"], example["segmentation"]
        assert facts["water"] == (labels == WATER).any(), scene.caption
        assert (facts["trees"] > 0) == (labels == TREE).any(), scene.caption
        assert facts["sun"] == (labels == SUN).any(), scene.caption
        assert facts["trees"] == len(scene.trees) and facts["ranges"] == len(scene.ranges)


def test_disc_stands_above_horizon():
    """Indices at which the skyline's curve, not cut at the horizon, lies below it."""
    for index in (1316, 1533, 2628, 3163, 3183, 3870, 4030, 7744, 9315, 10142, 13451, 14513, 15105):
        scene = scene_at(0, "train", index)
        if scene.disc is not None:
            assert scene.disc[1] - 0.5 * scene.disc[2] < scene.horizon, (index, scene.caption)


def test_every_tree_can_be_seen_apart():
    """The caption counts trees, so none may hide behind the nearer ones."""
    rows, cols = ((np.arange(96) + 0.5) / 96).astype(np.float32)[:, None], ((np.arange(96) + 0.5) / 96)[None, :]
    for index in range(300):
        taken = np.zeros((96, 96), bool)
        for tree in reversed(scene_at(2, "train", index).trees):  # near to far
            crown, trunk, _ = rendering._tree_mask(tree, rows, cols.astype(np.float32), 1.0)
            own = crown | trunk
            assert (own & ~taken).sum() > 0.25 * own.sum(), index
            taken |= own


def test_facts_cover_their_values():
    drawn = [scene_at(0, "train", i).facts for i in range(400)]
    for key, values in {
        "time": set(TIMES),
        "water": {False, True},
        "trees": {0, 1, 2, 3, 4, 5},
        "sun": {False, True},
        "ranges": {1, 2, 3},
    }.items():
        assert {facts[key] for facts in drawn} == values, key


# The sketch draws the segmentation's outlines.


def test_borders_of_segmentation_have_ink(large):
    shares = [(_near(e["sketch"] < 0.75, 2)[_borders(e["segmentation"])]).mean() for _, e in large]
    assert min(shares) >= 0.95, min(shares)


def test_sky_sun_and_meadow_have_ink_at_borders_only(large):
    """Mountains also have ridges and each other's outlines, water has ripples, trees stand before trees."""
    for scene, example in large:
        labels = example["segmentation"]
        stray = (example["sketch"] < 0.75) & np.isin(labels, (SKY, SUN, MEADOW)) & ~_near(_borders(labels), 2)
        assert not stray.any(), scene.caption


def test_sketch_is_neither_empty_nor_full(large):
    shares = [1 - e["sketch"].mean() for _, e in large]
    assert min(shares) > 0.005 and max(shares) < 0.25, (min(shares), max(shares))


def test_line_width_is_to_scale_and_never_under_a_pixel():
    """Measured where a lake's far shore runs level; to half a pixel, since lines grow by whole subpixels."""
    lakes = [s for s in (scene_at(0, "train", i) for i in range(60)) if s.ground == "lake"][:3]
    for size in (32, 64, 128, 256):
        widths = []
        for scene in lakes:
            example = render(scene, size, size)
            row, reach = round(scene.horizon * size), max(3, size // 30)
            labels = example["segmentation"][row - reach : row + reach]
            plain = (labels[: reach - 1] == MOUNTAIN).all(0) & (labels[reach + 1 :] == WATER).all(0)
            widths.extend((1 - example["sketch"])[row - reach : row + reach, plain].sum(0))
        assert np.median(widths) == pytest.approx(max(1.0, 0.008 * size), abs=0.5), size


def test_ink_share_shrinks_with_line_width():
    """From 64 to 256 pixels a line falls from 1/64 to 0.008 of the height, half as much; from 256 on it keeps."""
    share = {
        size: np.mean([1 - render(scene_at(0, "test", i), size, size)["sketch"].mean() for i in range(5)])
        for size in (64, 256, 384)
    }
    assert 1.5 < share[64] / share[256] < 3
    assert share[384] == pytest.approx(share[256], rel=0.15)


# Errors.


def test_unknown_split():
    for make in (lambda: scene_at(0, "validation", 0), lambda: Scenes("validation", 10)):
        with pytest.raises(ValueError, match="validation") as error:
            make()
        assert all(split in str(error.value) for split in SPLITS)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seed_or_index(seed, index):
    with pytest.raises(ValueError, match="at least 0"):
        scene_at(seed, "train", index)
    with pytest.raises((ValueError, IndexError)):
        Scenes("train", 4, seed=seed)[index]


@pytest.mark.parametrize("size", [0, -3])
def test_empty_data_set(size):
    with pytest.raises(ValueError, match="at least one"):
        Scenes("train", size)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_index_outside(index):
    with pytest.raises(IndexError, match=str(index)):
        Scenes("train", 4)[index]


@pytest.mark.parametrize(("height", "width"), [(7, 32), (32, 7), (0, 0)])
def test_resolution_too_small(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width}"):
        render(scene_at(0, "train", 0), height, width)
    with pytest.raises(ValueError, match="8x8"):
        Scenes("train", 4, height, width)[0]


def test_draw_scene_advances_the_generator_it_is_given():
    rng = np.random.default_rng(0)
    assert draw_scene(rng).horizon != draw_scene(rng).horizon
