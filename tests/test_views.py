"""Laws of augmentation: image and conditions change alike, and a view is a function of (seed, example, view)."""

import concurrent.futures
import json
import os

import numpy as np
import pytest
from PIL import Image

from mcm_jax.base import BaseCard
from mcm_jax.data import DataSettings
from mcm_jax.data.folder import Folder
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.scenes import PALETTE, Scenes
from mcm_jax.data.views import Views
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
COUNT, HEIGHT, WIDTH = 5, 48, 64


@pytest.fixture(scope="module")
def source():
    """Scenes whose picture is their label map, painted: what happened to one can be read from the other."""
    arrays = InMemory.render(Scenes("train", COUNT, HEIGHT, WIDTH, 3)).arrays
    colours = (np.asarray(PALETTE) * (255 if np.asarray(PALETTE).max() <= 1 else 1)).astype(np.uint8)
    return InMemory(arrays | {"image": colours[arrays["segmentation"]]})


def same(a, b):
    return all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in b)


def test_the_first_view_is_the_example(source):
    views = Views(source, MODALITIES, views=3, flip=True, crop=0.7)
    assert len(views) == 3 * COUNT
    for i in range(COUNT):
        assert same(views[3 * i], source[i])
        assert not same(views[3 * i + 1], source[i]) and not same(views[3 * i + 2], views[3 * i + 1])


def test_flip_alone_is_the_picture_and_its_mirror_image(source):
    views = Views(source, MODALITIES, views=2, flip=True)
    for i in range(COUNT):
        for name in ("image", "segmentation", "sketch"):
            np.testing.assert_array_equal(views[2 * i + 1][name], source[i][name][:, ::-1])
        assert views[2 * i + 1]["caption"] == source[i]["caption"]


def test_mirrored_twice_is_as_it_was(source):
    once = Views(source, MODALITIES, views=2, flip=True)
    twice = Views([once[2 * i + 1] for i in range(COUNT)], MODALITIES, views=2, flip=True)
    assert all(same(twice[2 * i + 1], source[i]) for i in range(COUNT))


def test_a_part_is_cut_and_then_mirrored(source):
    """Flip takes nothing from chance: the same parts are shown with it and without."""
    cut, both = (Views(source, MODALITIES, views=4, flip=flip, crop=0.6) for flip in (False, True))
    for row in range(len(cut)):
        for name in ("image", "segmentation", "sketch"):
            wanted = cut[row][name][:, ::-1] if row % 4 % 2 else cut[row][name]
            np.testing.assert_array_equal(both[row][name], wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_labels_keep_their_type(dtype):
    labels = np.arange(64).reshape(1, 8, 8).astype(dtype)
    source = InMemory({"image": np.zeros((1, 8, 8, 3), np.uint8), "segmentation": labels})
    views = Views(source, (Modality("segmentation", "labels", 64),), views=3, flip=True, crop=0.5)
    assert all(views[v]["segmentation"].dtype == dtype for v in range(3))


@pytest.mark.parametrize("flip", [False, True])
def test_image_and_labels_are_cut_alike(source, flip):
    """Away from borders, where the picture is a mixture, each pixel has the colour of its class."""
    views = Views(source, MODALITIES, views=4, flip=flip, crop=0.6)
    colours = np.unique(source.arrays["image"].reshape(-1, 3), axis=0)
    for row in range(len(views)):
        view = views[row]
        labels = view["segmentation"]
        shifted = [np.roll(labels, s, a) for s in (-3, -2, -1, 1, 2, 3) for a in (0, 1)]
        inside = np.all([labels == other for other in shifted], axis=0)
        inside[:3], inside[-3:], inside[:, :3], inside[:, -3:] = False, False, False, False
        found = view["image"].astype(int)
        distance = np.abs(found[..., None, :] - colours).sum(-1)
        of_class = {c: source.arrays["image"][source.arrays["segmentation"] == c][0] for c in np.unique(labels)}
        nearest = colours[distance.argmin(-1)]
        wanted = np.array([of_class.get(c, (0, 0, 0)) for c in range(6)])[labels]
        assert inside.mean() > 0.1
        assert (nearest == wanted).all(-1)[inside].mean() > 0.97
        assert view["image"].shape == (HEIGHT, WIDTH, 3) and labels.dtype == view["sketch"].dtype == np.uint8


def test_a_cut_shows_what_it_says():
    """A ramp: its values tell which part is seen. The share of the sides is in [crop, 1], and varies."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
    source = InMemory({"image": np.stack([ramp] * 3, -1)[None], "depth": ramp.T[None]})
    views = Views(source, (Modality("depth", "map", 1),), views=60, crop=0.5)
    spans = []
    for v in range(1, 60):
        image, depth = views[v]["image"][..., 0].astype(int), views[v]["depth"].astype(int)
        across, down = np.ptp(image[100]) / 199, np.ptp(depth[:, 100]) / 199
        assert abs(across - down) < 0.03  # one share for both sides
        spans.append((across, image[100, 0], depth[0, 100]))
    spans = np.array(spans)
    assert 0.47 < spans[:, 0].min() < 0.6 and 0.9 < spans[:, 0].max() <= 1
    assert np.ptp(spans[:, 1]) > 30 and np.ptp(spans[:, 2]) > 30


def test_jitter_changes_the_colours_of_the_picture_alone(source):
    """The same parts and sides with it and without; each factor by itself is what Pillow makes of it."""
    how = {"views": 4, "flip": True, "crop": 0.6}
    plain, jittered = (Views(source, MODALITIES, **how, jitter=j) for j in (0, 0.4))
    for row in range(len(plain)):
        one, two = plain[row], jittered[row]
        assert same(two, one) == (row % 4 == 0)
        assert all(np.array_equal(one[name], two[name]) for name in ("segmentation", "sketch"))
        assert two["image"].dtype == np.uint8 and two["image"].shape == one["image"].shape
    means = [Views(source, MODALITIES, views=40, jitter=0.4)[v]["image"].mean() for v in range(40)]
    assert 0.55 * means[0] < min(means) < 0.8 * means[0] and max(means) > 1.15 * means[0]


def test_mirrored_classes_are_exchanged(source):
    becomes, unknown = np.array([0, 2, 1, 3, 4, 5], np.int32), 255
    labels = source.arrays["segmentation"].copy()
    labels[:, :3] = unknown
    views = Views(
        InMemory(source.arrays | {"segmentation": labels}),
        MODALITIES,
        views=2,
        flip=True,
        swaps={"segmentation": becomes},
    )
    found, mirrored = views[1]["segmentation"], labels[0][:, ::-1]
    wanted = np.where(mirrored == 1, 2, np.where(mirrored == 2, 1, mirrored))
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.uint8 and (found == unknown).any() and (found == 1).any()
    assert np.array_equal(views[0]["segmentation"], labels[0])


def test_a_view_is_a_function_of_its_number(source):
    before = {name: a.copy() for name, a in source.arrays.items()}
    how = {"views": 3, "flip": True, "crop": 0.7, "jitter": 0.3}
    make = lambda seed: Views(source, MODALITIES, **how, seed=seed)  # noqa: E731
    one, two, other = make(0), make(0), make(1)
    forward = [one[i] for i in range(len(one))]
    assert all(same(two[i], forward[i]) for i in reversed(range(len(two))))
    assert not same(other[1], forward[1]) and same(other[0], forward[0])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(two.__getitem__, range(len(two))), forward))
    assert same(one[-1], forward[-1]) and same(one[np.int64(4)], forward[4])
    with pytest.raises(IndexError):
        one[len(one)]
    assert all(np.array_equal(before[name], a) for name, a in source.arrays.items())  # the source's own are left alone


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"views": 0}, ["views", "0"]),
        ({"crop": 0.0}, ["crop", "0.0"]),
        ({"crop": 1.1}, ["crop", "1.1"]),
        ({"flip": True}, ["views=1", "flip"]),
        ({"crop": 0.9}, ["views=1", "crop"]),
        ({"views": 2}, ["views=2", "only 1"]),
        ({"views": 3, "flip": True}, ["views=3", "only 2"]),
        ({"jitter": 0.2}, ["views=1", "jitter"]),
        ({"jitter": 1.0, "views": 2}, ["jitter", "1.0"]),
    ],
)
def test_views_that_would_not_differ_are_refused(source, settings, words):
    with pytest.raises(UserError) as error:
        Views(source, MODALITIES, **settings)
    assert all(word in str(error.value) for word in words), error.value


# Which data it is


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("image", "segmentation", "sketch"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            shape = (10, 12, 3) if name == "image" else (10, 12)
            values = rng.integers(0, 6, shape).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / "train" / name / f"{i}.png", compress_level=0)
    return tmp_path


def data(**changes):
    return DataSettings(**{"size": 4} | changes)


CARD = BaseCard("", "", None, (8, 8, 3), (8, 8, 3), False, 1, 1)


def test_a_source_is_opened_with_its_views(folder):
    of = lambda split, **changes: data(**changes).open(split, MODALITIES, CARD)  # noqa: E731
    mine = {"name": "folder", "path": str(folder), "held_out_share": 0.0}
    assert isinstance(of("train", **mine), Folder) and len(of("train", **mine)) == 3
    assert len(of("train", **mine, views=2, flip=True)) == 6 and len(of("train", views=2, flip=True)) == 8
    assert len(of("test", views=2, flip=True)) == 4  # held-out examples are as they are
    mirrored, plain = of("train", **mine, views=2, flip=True)[3], of("train", **mine)[1]
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    with pytest.raises(UserError, match="^views=1"):
        of("train", flip=True)


def test_a_folder_says_which_classes_mirroring_exchanges(folder):
    """And a fingerprint says so, where it matters, although no file of the examples has changed."""
    mine = data(name="folder", path=str(folder), held_out_share=0.0, views=2, flip=True)
    found = lambda: mine.find("train", MODALITIES, CARD)  # noqa: E731
    before, plain = mine.fingerprints(found()), mine.open("train", MODALITIES, CARD)[3]
    assert set(before) == {"image", "segmentation", "sketch"}
    classes = {"classes": [{"name": name} for name in "abcdef"], "swap": {"b": "e"}}
    (folder / "classes.json").write_text(json.dumps(classes))
    swapped = mine.open("train", MODALITIES, CARD)[3]
    becomes = np.array([0, 4, 2, 3, 1, 5], np.uint8)
    np.testing.assert_array_equal(swapped["segmentation"], becomes[plain["segmentation"]])
    after = mine.fingerprints(found(), known=before)
    assert mine.fingerprints(found()) == after and before.items() < after.items() and "segmentation.swap" in after
    assert mine.without_views().fingerprints(found(), known=after) == before


def test_fingerprints_tell_contents(folder):
    """Names and contents count; times do not, but for the stamp, which says whether to look again."""
    find = lambda: data(name="folder", path=str(folder)).find("train", MODALITIES, CARD)  # noqa: E731
    before, stamp = find().fingerprints(), find().stamp()
    assert set(before) == {"image", "segmentation", "sketch"}
    assert find().fingerprints() == before and find().stamp() == stamp
    file = folder / "train/segmentation/1.png"
    os.utime(file, ns=(1, 1))
    dated = find().stamp()
    assert find().fingerprints() == before and dated != stamp
    good = file.read_bytes()
    Image.fromarray(np.full((10, 12), 5, np.uint8)).save(file, compress_level=0)
    os.utime(file, ns=(1, 1))
    assert len(file.read_bytes()) == len(good) and find().stamp() == dated  # what only reading the file tells
    changed = find().fingerprints()
    assert changed["segmentation"] != before["segmentation"]
    assert changed["image"] == before["image"] and changed["sketch"] == before["sketch"]
    file.write_bytes(good)
    for name in before:
        (folder / "train" / name / "2.png").rename(folder / "train" / name / "3.png")
    assert all(find().fingerprints()[name] != before[name] for name in before)


def test_fingerprints_do_not_tell_the_order_of_a_folder(folder, tmp_path_factory):
    """A copy is the same data, in whichever order its files were written."""
    copy = tmp_path_factory.mktemp("copy")
    for file in sorted(folder.rglob("*.png"), reverse=True):
        target = copy / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    one, two = (Folder(path, "train", order, 8, 8) for path, order in ((folder, MODALITIES), (copy, MODALITIES[::-1])))
    assert one.fingerprints() == two.fingerprints()


def test_fingerprints_tell_prompts_where_they_are_read(folder):
    (folder / "train/caption").mkdir()
    for i in range(3):
        (folder / f"train/caption/{i}.txt").write_text("a lake")
    find = lambda captions: Folder(folder, "train", MODALITIES, 8, 8, captions)  # noqa: E731
    with_prompts, without, stamps = find(True).fingerprints(), find(False).fingerprints(), find(False).stamp()
    assert set(with_prompts) - set(without) == {"caption"}
    (folder / "train/caption/1.txt").write_text("a tree")
    changed = find(True).fingerprints()
    assert [name for name in changed if changed[name] != with_prompts[name]] == ["caption"]
    assert find(False).fingerprints() == without and find(False).stamp() == stamps


def test_fingerprints_of_scenes_tell_what_they_are():
    one = Scenes("train", 4, 8, 12, 2)
    assert one.stamp() == Scenes("train", 4, 8, 12, 2).stamp()
    for other in (("test", 4, 8, 12, 2), ("train", 5, 8, 12, 2), ("train", 4, 12, 8, 2), ("train", 4, 8, 12, 3)):
        assert Scenes(*other).fingerprints() != one.fingerprints() and Scenes(*other).stamp() != one.stamp()
