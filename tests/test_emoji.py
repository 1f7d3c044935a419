"""Laws of the shipped drawn art: what the archive holds, a split by groups, true labels and lines."""

import io
import json
import pathlib
import re
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mcm_jax import assets
from mcm_jax.base.loading import BaseSettings
from mcm_jax.data import DataSettings
from mcm_jax.data.colours import to_lab
from mcm_jax.data.emoji import CLASSES, PALETTE, SIZES, SPLITS, Emoji, classes_of
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

ARCHIVE = pathlib.Path(assets.__file__).parent / "emoji" / "emoji.zip"
MODALITIES = (Modality("segmentation", "labels", len(CLASSES)), Modality("sketch", "lines", 1))


@pytest.fixture(scope="module")
def archive():
    with zipfile.ZipFile(ARCHIVE) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.fixture(scope="module")
def facts(archive):
    """Name, group and caption of each example, by split."""
    return {split: json.loads(archive[f"{split}/examples.json"]) for split in SPLITS}


@pytest.fixture(scope="module", params=SIZES)
def held_out(request):
    """All held-out examples at one of the sizes, stacked."""
    examples = list(Emoji("test", request.param, request.param))
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


# The archive.


def test_archive_is_small_complete_and_licensed(archive, facts):
    assert ARCHIVE.stat().st_size <= 8 * 2**20
    assert b"Apache License" in archive["LICENSE"] and b"Google" in archive["NOTICE"]
    recipe = json.loads(archive["recipe.json"])
    assert recipe["licence"] == "Apache-2.0"
    assert recipe["palette"] == {n: "#" + bytes(c).hex() for n, c in zip(CLASSES, PALETTE, strict=True)}
    for split, least in (("train", 1_400), ("test", 150)):
        assert recipe["counts"][split]["examples"] == len(facts[split]) == len(Emoji(split)) >= least
        assert min(recipe["counts"][split]["shares"].values()) > 0.01  # no class is rare


def test_pictures_are_all_different(archive):
    pictures = [e["image"].tobytes() for split in SPLITS for e in Emoji(split, 64, 64)]
    assert len(set(pictures)) >= 0.99 * len(pictures)  # some emoji have two names


def test_splits_share_no_group(facts):
    groups = {split: {f["group"] for f in facts[split]} for split in SPLITS}
    assert not groups["train"] & groups["test"]
    counts = {split: len(groups[split]) for split in SPLITS}
    assert 0.09 < counts["test"] / sum(counts.values()) < 0.13


def test_variants_are_on_one_side(facts):
    """Told here by the names alone: tones, and who it is that does something."""
    sides = {}
    for split in SPLITS:
        for fact in facts[split]:
            name = re.sub(r"(-(medium-)?(light|medium|dark)-skin-tone)+$", "", fact["name"])
            who = re.sub(r"^(man|woman|person|men|women|people)-|-facing-right$", "", name)
            sides.setdefault(who, set()).add(split)
    assert len(sides) < len(facts["train"]) + len(facts["test"]) - 300  # there are many variants
    assert not [name for name, found in sides.items() if len(found) > 1]


# Examples.


def test_shapes_types_and_ranges(held_out):
    count, size = len(Emoji("test")), held_out["image"].shape[1]
    assert held_out["image"].shape == (count, size, size, 3) and held_out["image"].dtype == np.uint8
    for name in ("segmentation", "sketch"):
        assert held_out[name].shape == (count, size, size) and held_out[name].dtype == np.uint8
    assert set(np.unique(held_out["segmentation"])) == set(range(len(CLASSES)))
    assert held_out["image"].min() < 30 and (held_out["image"].reshape(count, -1).max(1) == 255).all()


def test_captions_are_the_names_in_words():
    for name, example in zip(Emoji("test").names, Emoji("test"), strict=True):
        words = str(example["caption"])
        assert re.fullmatch(r"[a-z0-9 ,]+", words), words
        assert set(re.findall(r"\w+", words)) - {"and"} == set(name.split("-")) - {"and"}


def test_same_example_every_time():
    source = Emoji("train", 32, 32)
    few = Emoji("train", 32, 32, limit=20)
    assert len(few) == 20 and few.names == source.names[:20]
    backwards = {i: source[i] for i in reversed(range(20))}
    for i, example in enumerate(few):
        assert all(np.array_equal(example[key], backwards[i][key]) for key in example)
    assert len({s.stamp() for s in (source, few, Emoji("test"), Emoji("train", 64, 64))}) == 4
    assert source.fingerprints() == Emoji("train").fingerprints()


def test_small_pictures_are_means_of_large_ones():
    small, large = Emoji("test", 32, 32), Emoji("test", 64, 64)
    for i in range(0, len(small), 10):
        means = large[i]["image"].astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3))
        assert np.abs(small[i]["image"] - means).max() <= 0.5


# Labels.


def test_lab_is_that_of_cie():
    """Values of sRGB's corners as Lindbloom's calculator gives them for D65."""
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [119, 119, 119]], np.uint8)
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(to_lab(colours), [*expected, [50.03, 0, 0]], atol=0.05)


def test_palettes_colours_are_their_own_classes():
    assert PALETTE.shape == (len(CLASSES), 3) and 8 <= len(set(CLASSES)) == len(CLASSES) <= 12
    np.testing.assert_array_equal(classes_of(PALETTE), np.arange(len(CLASSES)))


def test_labels_agree_with_the_palette(held_out):
    """Where colours meet, a small pixel's mean is of neither: there the label, from 512x512, knows better."""
    labels = held_out["segmentation"]
    same = classes_of(held_out["image"]) == labels
    inside = np.stack([ndimage.maximum_filter(m, 3) == ndimage.minimum_filter(m, 3) for m in labels])
    assert same.mean() > {32: 0.9, 64: 0.94}[labels.shape[1]]
    assert same[inside].mean() > 0.97


def test_labels_of_both_sizes_agree():
    small, large = Emoji("test", 32, 32), Emoji("test", 64, 64)
    same = []
    for a, b in zip(small, large, strict=True):
        cells = b["segmentation"].reshape(32, 2, 32, 2)
        votes = np.stack([(cells == c).sum((1, 3)) for c in range(len(CLASSES))])
        same.append(np.take_along_axis(votes, a["segmentation"][None].astype(int), 0)[0] == votes.max(0))
    assert np.mean(same) > 0.98


# Lines.


def test_sketches_hold_lines(held_out):
    ink = 1 - held_out["sketch"] / 255
    assert ((ink > 0.9).sum((1, 2)) >= held_out["sketch"].shape[1] // 2).all()  # strong ones, in every drawing
    assert ((ink == 0).mean((1, 2)) > 0.25).all()  # and room between them
    assert 0.05 < ink.mean() < 0.3


def test_lines_go_where_labels_change(held_out):
    found = []
    for labels, sketch in zip(held_out["segmentation"], held_out["sketch"], strict=True):
        borders = ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)
        found.append(ndimage.maximum_filter(sketch < 128, 3)[borders].mean())
    assert np.mean(found) > 0.9


# As a data set of a config.


def test_settings_give_it_at_the_bases_size(ldm_path):
    card = BaseSettings(path=str(ldm_path)).outline().card
    data = DataSettings(name="emoji", views=2, flip=True)
    data.check_holds(MODALITIES)
    assert data.has_test_split()
    train, test = (data.open(split, MODALITIES, card) for split in SPLITS)
    assert len(test) == len(Emoji("test")) and len(train) == 2 * len(Emoji("train"))
    assert len(data.open("test", MODALITIES, card, size=8)) == 8
    for name in ("image", "segmentation", "sketch"):
        np.testing.assert_array_equal(train[7][name], train[6][name][:, ::-1])
    assert data.find("train", MODALITIES, card).stamp() == Emoji("train", 32, 32).stamp()


def test_other_sizes_are_refused(base):
    with pytest.raises(UserError, match=r"'emoji' is there at 32x32 and at 64x64, .* 16x16.*folder"):
        DataSettings(name="emoji").find("train", MODALITIES, base.card)
    with pytest.raises(UserError, match="64x32"):
        Emoji("train", 64, 32)


@pytest.mark.parametrize("wrong", [Modality("segmentation", "labels", 6), Modality("depth", "map", 1)])
def test_other_modalities_are_refused(wrong):
    with pytest.raises(UserError, match=rf"modalities.{wrong.name} .* 'emoji' holds segmentation \(labels, channels="):
        DataSettings(name="emoji").check_holds([wrong])


def test_a_path_is_refused():
    with pytest.raises(UserError, match="path"):
        DataSettings(name="emoji", path="emoji.zip")


def test_wrong_split_index_and_limit():
    with pytest.raises(ValueError, match="validation"):
        Emoji("validation")
    with pytest.raises(ValueError, match="limit=0"):
        Emoji("test", limit=0)
    for index in (-1, len(Emoji("test"))):
        with pytest.raises(IndexError, match=str(index)):
            Emoji("test")[index]


def test_sheets_are_pngs_that_show_the_examples(archive):
    """A person can open them: 40 pictures in a row, as they are."""
    with Image.open(io.BytesIO(archive["test/image_64.png"])) as sheet:
        assert sheet.format == "PNG" and sheet.width == 40 * 64
        second_row = np.asarray(sheet)[64:128, :64]
    np.testing.assert_array_equal(second_row, Emoji("test", 64, 64)[40]["image"])
