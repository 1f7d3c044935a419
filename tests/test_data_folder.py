"""A picture and its conditions show the same part of a scene, whatever their sizes; what cannot be paired is named."""

import dataclasses
import json
import os
import re
import tracemalloc

import numpy as np
import pytest
import tiny
from PIL import Image

from mcm_jax import config as config_lib
from mcm_jax.base import BaseCard
from mcm_jax.data import DataSettings, captions
from mcm_jax.data.captions import read_lines
from mcm_jax.data.classes import read_classes
from mcm_jax.data.folder import Folder, held_out_names
from mcm_jax.data.render import PALETTE, render
from mcm_jax.data.scene import draw_scene
from mcm_jax.data.views import Views
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

SEGMENTATION = Modality("segmentation", "labels", 6)
SKETCH = Modality("sketch", "lines", 1)
DEPTH = Modality("depth", "map", 1)
NORMALS = Modality("normals", "map", 3)
SQUARE = (48, 48)
CARD = BaseCard("", "", None, (8, 8, 3), (8, 8, 3), False, 1, 1)


def _save(path, picture, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


def _noise(height, width, *channels, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, (height, width, *channels)).astype(np.uint8)


def _image(tmp_path, picture, grid, name="a.png", **options):
    """A picture after a round through a folder."""
    _save(tmp_path / "train" / "image" / name, picture, **options)
    return Folder(tmp_path, "train", (), *grid)[0]["image"]


def _condition(tmp_path, modality, picture, image_size, grid, name="a.png", **options):
    """A condition after a round through a folder, beside a black picture of ``image_size`` (height, width)."""
    if image_size:
        _save(tmp_path / "train" / "image" / "a.png", np.zeros((*image_size, 3), np.uint8))
    _save(tmp_path / "train" / modality.name / name, picture, **options)
    return Folder(tmp_path, "train", (modality,), *grid)[0][modality.name]


def _tree(tmp_path, *files, split="train"):
    """Small valid files by their paths in the split, and the split's folder."""
    for file in files:
        path = tmp_path / split / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".txt":
            path.write_text("a prompt")
        elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            _save(path, np.zeros((8, 8) + (3,) * (path.parent.name == "image"), np.uint8))
        else:
            path.write_bytes(b"something")
    return tmp_path / split


def _refused(tmp_path, *modalities, split="train", captions=False):
    with pytest.raises(UserError) as caught:
        Folder(tmp_path, split, modalities, 8, 8, captions)
    return str(caught.value)


# Pictures


@pytest.mark.parametrize(
    "size, part",
    [
        ((48, 48), np.s_[:, :]),
        ((48, 64), np.s_[:, 8:56]),
        ((64, 48), np.s_[8:56, :]),
        ((48, 65), np.s_[:, 8:56]),
        ((49, 48), np.s_[:48, :]),
    ],
)
def test_a_picture_that_is_only_cut_keeps_its_pixels(size, part, tmp_path):
    pixels = _noise(*size, 3)
    np.testing.assert_array_equal(_image(tmp_path, pixels, SQUARE), pixels[part])


@pytest.mark.parametrize("size", [(96, 128), (37, 91), (91, 37), (480, 641), (11, 7), (1, 1)])
@pytest.mark.parametrize("grid", [(48, 48), (32, 64), (64, 24)])
def test_a_picture_is_scaled_to_cover_the_grid_and_cut_at_its_centre(size, grid, tmp_path):
    """A picture of its own coordinates says where each pixel came from."""
    rows, columns = np.meshgrid(*((np.arange(n) + 0.5) / n * 255 for n in size), indexing="ij")
    pixels = np.round(np.stack([rows, columns, 0 * rows], -1)).astype(np.uint8)
    found = _image(tmp_path, pixels, grid)
    assert found.shape == (*grid, 3) and found.dtype == np.uint8
    scale = max(g / s for g, s in zip(grid, size, strict=True))
    for axis in (0, 1):
        centres = (np.arange(grid[axis]) + 0.5 - grid[axis] / 2) / scale + size[axis] / 2
        expected = np.clip(centres, 0.5, size[axis] - 0.5) / size[axis] * 255
        inner = found[..., axis].mean(1 - axis)
        # the cut is at whole pixels, so half of one off, and Lanczos overshoots at the border
        assert np.abs(inner - expected).max() <= 255 * (0.6 / size[axis]) + 2


def test_a_fine_pattern_shrinks_to_its_mean(tmp_path):
    board = np.indices((96, 128)).sum(0) % 2 * 255
    found = _image(tmp_path, board.astype(np.uint8), (24, 24))
    assert np.abs(found[2:-2, 2:-2].astype(int) - 127.5).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_picture_is_turned_as_its_exif_data_says(orientation, ending, tmp_path):
    upright = np.kron(_noise(3, 4, 3), np.ones((16, 16, 1))).astype(np.uint8)
    turn = {  # EXIF: where the stored picture's first row and column lie in the upright one
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}, "png": {}}[ending]
    stored = np.ascontiguousarray(turn(upright))
    found = _image(tmp_path, stored, (48, 64), f"a.{ending}", exif=exif, **options)
    np.testing.assert_allclose(found.astype(int), upright, atol=4 if ending == "jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path):
    pixels = _noise(8, 16, 3)
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01", b"Exif\0\0nonsense"):
        np.testing.assert_array_equal(_image(tmp_path, pixels, (8, 16), exif=exif), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "CMYK"])
def test_any_picture_becomes_rgb(mode, tmp_path):
    picture = Image.fromarray(_noise(8, 8, 3)).convert(mode)
    options = {"format": "JPEG", "quality": 100, "subsampling": 0} if mode == "CMYK" else {}
    name = "a.jpg" if mode == "CMYK" else "a.png"
    found = _image(tmp_path, picture, (8, 8), name, **options)
    np.testing.assert_allclose(found.astype(int), np.asarray(picture.convert("RGB")), atol=4 if mode == "CMYK" else 0)


def test_a_picture_of_16_bits_keeps_its_range(tmp_path):
    grey = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(_image(tmp_path, grey, (8, 8)), np.round(grey / 257)[..., None].repeat(3, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "colour key"])
def test_what_is_transparent_is_white(mode, tmp_path):
    pixels, options = np.full((8, 8, 4), (200, 0, 0, 255), np.uint8), {}
    pixels[:4, :, 3] = 0
    expected = np.full((8, 8, 3), (200, 0, 0), np.uint8)
    expected[:4] = 255
    picture = Image.fromarray(pixels)
    if mode == "LA":
        picture = picture.convert("LA")
        expected[4:] = np.asarray(picture)[4, 0, 0]
    elif mode == "palette":
        picture = Image.fromarray(np.repeat(np.uint8([0, 1]), 32).reshape(8, 8)).convert("P")
        picture.putdata([0] * 32 + [1] * 32)
        picture.putpalette([9, 9, 9, 200, 0, 0])
        options = {"transparency": 0}
    elif mode == "colour key":
        pixels[:4, :, :3] = 9
        picture, options = Image.fromarray(pixels[..., :3].copy()), {"transparency": (9, 9, 9)}
    np.testing.assert_array_equal(_image(tmp_path, picture, (8, 8), **options), expected)


def test_half_transparent_is_half_white(tmp_path):
    found = _image(tmp_path, np.full((8, 8, 4), (0, 100, 255, 51), np.uint8), (8, 8))
    np.testing.assert_allclose(found[0, 0].astype(int), (204, 224, 255), atol=1)


# Conditions lie on their pictures


def _scene(index=0):
    return draw_scene(np.random.default_rng(index))


def test_labels_of_another_resolution_are_cut_alike(tmp_path):
    labels = render(_scene(), 96, 128)["segmentation"]
    found = _condition(tmp_path, SEGMENTATION, labels, (48, 64), SQUARE)
    np.testing.assert_array_equal(found, labels[1::2, 17:113:2])  # columns 16 to 111 are the cut; nearest of two
    assert found.dtype == np.uint8


def test_a_scene_lies_on_its_labels(tmp_path):
    """A picture in its classes' colours, and labels drawn at twice its size: no shift agrees better than none."""
    small, large = (render(_scene(3), 48 * k, 64 * k)["segmentation"] for k in (1, 2))
    _save(tmp_path / "train" / "image" / "a.png", PALETTE[small])
    labels = _condition(tmp_path, SEGMENTATION, large, None, SQUARE)
    colours = Folder(tmp_path, "train", (), *SQUARE)[0]["image"]
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    agree = {s: np.mean(np.roll(PALETTE[labels], s, (0, 1)) == colours, where=_inner(colours)) for s in shifts}
    assert max(agree, key=agree.get) == (0, 0) and agree[0, 0] > 0.95


def _inner(picture):
    inner = np.zeros(picture.shape, bool)
    inner[1:-1, 1:-1] = True
    return inner


def _disc(height, width):
    """How much of each pixel a white disc fills: an exact place at every resolution."""
    y, x = np.meshgrid(*((np.arange(8 * n) + 0.5) / (8 * n) for n in (height, width)), indexing="ij")
    scale = min(height, width)
    inside = ((y - 0.53) * height) ** 2 + ((x - 0.46) * width) ** 2 < (0.2 * scale) ** 2
    return inside.reshape(height, 8, width, 8).mean((1, 3))


def _centre(weights):
    return np.array([(weights.sum(1 - axis) * np.arange(weights.shape[axis])).sum() for axis in (0, 1)]) / weights.sum()


@pytest.mark.parametrize("image", [(48, 64), (101, 135), (64, 48), (180, 241), (35, 77)], ids=str)
@pytest.mark.parametrize("factor", [0.6, 1, 1.7])
@pytest.mark.parametrize("grid", [(48, 48), (40, 64), (24, 17)], ids=str)
def test_conditions_of_any_resolution_lie_on_their_picture(image, factor, grid, tmp_path):
    size = tuple(round(factor * n) for n in image)
    picture, filled = np.round(255 * _disc(*image)).astype(np.uint8), _disc(*size)
    _save(tmp_path / "train" / "image" / "a.png", picture)
    _save(tmp_path / "train" / "segmentation" / "a.png", (filled > 0.5).astype(np.uint8))
    _save(tmp_path / "train" / "depth" / "a.png", np.round(255 * filled).astype(np.uint8))
    _save(tmp_path / "train" / "sketch" / "a.png", np.round(255 - 255 * filled).astype(np.uint8))
    example = Folder(tmp_path, "train", (SEGMENTATION, DEPTH, SKETCH), *grid)[0]
    white = example["image"][..., 0] / 255
    enlarged = max(1, *(g / s for g, s in zip(grid, size, strict=True)))  # grid pixels in a condition's
    for name, found in (
        ("segmentation", example["segmentation"]),
        ("depth", example["depth"] / 255),
        ("sketch", 1 - example["sketch"] / 255),
    ):
        assert found.shape == grid
        assert np.abs(_centre(found) - _centre(white)).max() < 0.5 * enlarged, name
        assert np.sqrt(found.sum() / white.sum()) == pytest.approx(1, abs=0.07 * enlarged), name


@pytest.mark.parametrize("modality", [DEPTH, SKETCH, NORMALS], ids=lambda m: m.name)
def test_maps_that_are_only_cut_keep_their_values(modality, tmp_path):
    values = _noise(48, 64, *(3,) * (modality.channels == 3))
    found = _condition(tmp_path, modality, values, (48, 64), SQUARE)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, values[:, 8:56])


@pytest.mark.parametrize("modality", [DEPTH, NORMALS], ids=lambda m: m.name)
def test_maps_are_averaged_over_areas(modality, tmp_path):
    values = _noise(96, 128, *(3,) * (modality.channels == 3))
    found = _condition(tmp_path, modality, values, (48, 64), SQUARE)
    expected = values[:, 16:112].reshape(48, 2, 48, 2, -1).mean((1, 3)).reshape(found.shape)
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_a_coarse_map_is_enlarged_under_its_picture(tmp_path):
    values = _noise(12, 16)
    found = _condition(tmp_path, DEPTH, values, (480, 640), SQUARE)
    np.testing.assert_array_equal(found, values[:, 2:14].repeat(4, 0).repeat(4, 1))


def test_lines_keep_their_strength(tmp_path):
    drawing = np.full((192, 256), 255, np.uint8)
    drawing[81:83] = 0
    found = _condition(tmp_path, SKETCH, drawing, (48, 64), SQUARE)
    expected = np.full(SQUARE, 255)
    expected[20] = 0
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(  # and are what sample.py makes of the same drawing
        found[:, :40] / 255, SKETCH.resize((drawing / 255).astype(np.float32), 48, 64)[:, 8:48]
    )


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_maps_may_be_pictures_of_any_kind(ending, tmp_path):
    values = np.kron(_noise(3, 4), np.ones((16, 16))).astype(np.uint8)
    found = _condition(tmp_path, DEPTH, Image.fromarray(values).convert("RGB"), (48, 64), SQUARE, f"a.{ending}")
    assert np.median(np.abs(found.astype(int) - values[:, 8:56])) <= 3


def test_the_index_of_a_palette_is_the_class(tmp_path):
    labels = _noise(48, 64, high=6)
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.reshape(-1).tolist())
    picture.putpalette([255 - i // 3 for i in range(768)])
    found = _condition(tmp_path, SEGMENTATION, picture, (48, 64), SQUARE, transparency=3)
    np.testing.assert_array_equal(found, labels[:, 8:56])


@pytest.mark.parametrize(
    "channels, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)], ids=str
)
def test_many_classes_have_room(channels, dtype, tmp_path):
    labels = np.linspace(0, min(channels, 65536) - 1, 64).astype(np.uint16).reshape(8, 8)
    found = _condition(tmp_path, Modality("segmentation", "labels", channels), labels, (8, 8), (8, 8))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("size", [(32, 43), (32, 42), (667, 889), (334, 445), (3000, 4000)], ids=str)
def test_a_size_that_rounding_made_is_the_same_shape(size, tmp_path):
    labels = np.zeros(size, np.uint8)
    assert _condition(tmp_path, SEGMENTATION, labels, (75, 100), (8, 8)).shape == (8, 8)


# The folder


def test_examples_are_sorted_by_name_and_are_what_training_takes(tmp_path):
    names = ["b", "a.2", "A", "a.10", "é"]
    for k, name in enumerate(names):
        _save(tmp_path / "train" / "image" / f"{name}.png", np.full((8, 8, 3), k, np.uint8))
        _save(tmp_path / "train" / "segmentation" / f"{name}.PNG", np.full((8, 8), k, np.uint8))
        _save(tmp_path / "train" / "sketch" / f"{name}.png", np.full((8, 8), 50 * k, np.uint8))
        (tmp_path / "train" / "caption").mkdir(exist_ok=True)
        (tmp_path / "train" / "caption" / f"{name}.TXT").write_text(f"\ufeff prompt of {name} \r\n\n", "utf-8")
    source = Folder(str(tmp_path), "train", (SEGMENTATION, SKETCH), 8, 8, captions=True)
    assert len(source) == 5 and source.names == ("A", "a.10", "a.2", "b", "é")
    for i, name in enumerate(source.names):
        example, k = source[i], names.index(name)
        assert list(example) == ["image", "segmentation", "sketch", "caption"]
        assert example["caption"].shape == () and str(example["caption"]) == f"prompt of {name}"
        assert (example["image"] == k).all() and (example["segmentation"] == k).all()
        assert (example["sketch"] == 50 * k).all()
    assert source[-1]["caption"] == source[np.int64(4)]["caption"]
    with pytest.raises(IndexError):
        source[5]


def test_splits_are_apart_and_only_what_is_asked_for_is_read(tmp_path):
    _tree(tmp_path, "image/a.png", "depth/nothing like it.xyz", "caption/b.txt", "README.md")
    _tree(tmp_path, "image/c.JPG", "image/d.jpeg", "image/e.webp", split="test")
    train, test = Folder(tmp_path, "train", (), 8, 8), Folder(tmp_path, "test", (), 8, 8)
    assert (train.names, test.names) == (("a",), ("c", "d", "e"))
    assert list(train[0]) == ["image"] and test[0]["image"].shape == (8, 8, 3)


def test_what_file_managers_leave_behind_is_ignored(tmp_path):
    clutter = [".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", ".hidden/a.png"]
    _tree(tmp_path, "image/a.png", "sketch/a.png", *(f"{f}/{c}" for f in ("image", "sketch") for c in clutter))
    assert Folder(tmp_path, "train", (SKETCH,), 8, 8).names == ("a",)


def test_an_accent_is_one_letter_however_it_is_written(tmp_path):
    _tree(tmp_path, "image/caf\u00e9.png", "sketch/cafe\u0301.png")
    assert Folder(tmp_path, "train", (SKETCH,), 8, 8)[0]["sketch"].shape == (8, 8)


def test_links_are_followed_and_broken_ones_named(tmp_path):
    split = _tree(tmp_path, "image/a.png", "elsewhere/a.png")
    try:
        (split / "sketch").symlink_to(split / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("symbolic links cannot be made here, as on Windows without developer mode")
    assert len(Folder(tmp_path, "train", (SKETCH,), 8, 8)) == 1
    (split / "image" / "b.png").symlink_to(split / "nowhere.png")
    (split / "image" / "c.png").symlink_to(split / "image" / "c.png")
    message = f"{split / 'image'}: 2 files (b.png, c.png): a link that leads nowhere"
    assert message in _refused(tmp_path)


def test_nothing_is_opened_before_it_is_asked_for(tmp_path):
    split = _tree(tmp_path, "image/a.png", "image/b.png")
    (split / "image" / "b.png").write_bytes(b"")
    source = Folder(tmp_path, "train", (), 8, 8)
    assert source[0]["image"].shape == (8, 8, 3)
    with pytest.raises(UserError, match=re.escape(str(split / "image" / "b.png"))):
        source[1]


# What is wrong with the tree


def test_a_missing_split_says_what_is_there(tmp_path):
    assert f"{tmp_path / 'train'}: no such folder; there are no files" in _refused(tmp_path)
    for folder in ("image", "sketch"):
        (tmp_path / folder).mkdir()
    message = _refused(tmp_path)
    assert "there are image, sketch. Expected " + str(tmp_path / "train" / "image" / "NAME.jpg") in message
    assert f"nor is {tmp_path / 'no'}" in _refused(tmp_path / "no")


def test_a_missing_or_empty_image_folder(tmp_path):
    split = _tree(tmp_path, "images/a.png")
    assert f"{split / 'image'}: cannot be read as a folder (No such file or directory)" in _refused(tmp_path)
    _tree(tmp_path, "image/.gitkeep")
    assert f"{split / 'image'}: holds no pictures" in _refused(tmp_path)


def test_missing_conditions_are_counted_and_named(tmp_path):
    images = [f"image/{k}.jpg" for k in range(9)]
    split = _tree(tmp_path, *images, "segmentation/0.png", "segmentation/1.png", "segmentation/x_mask.png")
    message = _refused(tmp_path, SEGMENTATION)
    assert (
        f"{split / 'segmentation'}: 7 files (2.png, 3.png, 4.png and 4 more): missing, but {split / 'image'}" in message
    )
    assert f"{split / 'segmentation' / 'x_mask.png'}: {split / 'image'} has no picture of its name" in message


def test_all_folders_are_checked_at_once(tmp_path):
    split = _tree(tmp_path, "image/a.png", "sketch/b.png")
    message = _refused(tmp_path, SEGMENTATION, SKETCH, captions=True)
    assert [line.split(": ")[0] for line in message.splitlines()] == [
        str(path) for path in (split, split / "sketch" / "a.png", split / "sketch" / "b.png")
    ]
    assert f"{split}: 2 files (segmentation, caption): cannot be read as a folder" in message


def test_missing_captions(tmp_path):
    split = _tree(tmp_path, "image/a.png", "image/b.png", "caption/a.txt")
    assert f"{split / 'caption' / 'b.txt'}: missing" in _refused(tmp_path, captions=True)


def test_two_files_of_one_name_are_refused(tmp_path):
    split = _tree(tmp_path, "image/a.png", "image/a.jpg", "image/b.png")
    message = _refused(tmp_path)
    assert f"{split / 'image' / 'a.png'}: has the same name as a.jpg, and files of one name are one example" in message
    os.remove(split / "image" / "a.jpg")
    _tree(tmp_path, "sketch/a.png", "sketch/a.webp", "sketch/b.png")
    assert "a.webp: has the same name as a.png" in _refused(tmp_path, SKETCH)


@pytest.mark.parametrize("stranger", ["a.tiff", "notes.txt", "folder/b.png", "png", "b.png.bak"])
def test_other_files_are_named_rather_than_left_out(stranger, tmp_path):
    split = _tree(tmp_path, "image/a.png", f"image/{stranger}")
    found = "a folder" if "/" in stranger else "expected .png, .jpg, .jpeg, .webp files only"
    assert f"{split / 'image' / stranger.split('/')[0]}: {found}" in _refused(tmp_path)


def test_lossy_labels_are_refused_by_their_name_and_by_their_content(tmp_path):
    split = _tree(tmp_path, "image/a.png", "segmentation/a.jpg")
    message = _refused(tmp_path, SEGMENTATION)
    assert f"{split / 'segmentation' / 'a.jpg'}: expected .png files only. Labels are PNGs" in message
    os.rename(split / "segmentation" / "a.jpg", split / "segmentation" / "a.png")
    expected = re.escape(f"{split / 'segmentation' / 'a.png'}: found a JPEG file, expected PNG")
    with pytest.raises(UserError, match=expected):
        Folder(tmp_path, "train", (SEGMENTATION,), 8, 8)[0]


# What is wrong with a file


def _fails(tmp_path, *modalities, captions=False):
    source = Folder(tmp_path, "train", modalities, 8, 8, captions)
    with pytest.raises(UserError) as caught:
        source[0]
    return str(caught.value)


@pytest.mark.parametrize("folder", ["image", "sketch", "segmentation"])
@pytest.mark.parametrize("content", ["empty", "text", "cut off", "gone"])
def test_a_damaged_picture_is_named(folder, content, tmp_path):
    split = _tree(tmp_path, "image/a.png", "sketch/a.png", "segmentation/a.png")
    path = _save(split / folder / "a.png", _noise(64, 64, *(3,) * (folder == "image"), high=6))
    source = Folder(tmp_path, "train", (SKETCH, SEGMENTATION), 8, 8)
    if content == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "text": b"a text\n", "cut off": path.read_bytes()[:700]}[content])
    with pytest.raises(UserError) as caught:
        source[0]
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("turned", [False, True])
def test_another_aspect_ratio_names_both_files(turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _save(tmp_path / "train" / "image" / "a.jpg", _noise(48, 64, 3), **({"exif": exif} if turned else {}))
    labels = _save(tmp_path / "train" / "segmentation" / "a.png", _noise(*((48, 64) if turned else (64, 64)), high=6))
    message = _fails(tmp_path, SEGMENTATION)
    if turned:  # made by a tool that does not turn the picture
        assert f"{labels}: is 64x48 pixels" in message and f"{image}: 48x64 pixels as its EXIF data turns it" in message
    else:
        assert f"{labels}: is 64x64 pixels" in message and f"{image}: 64x48 pixels. " in message


def test_two_pixels_are_another_aspect_ratio(tmp_path):
    labels = np.zeros((48, 66), np.uint8)
    with pytest.raises(UserError, match="is 66x48 pixels, which is another shape"):
        _condition(tmp_path, SEGMENTATION, labels, (48, 64), (8, 8))


@pytest.mark.parametrize("ignore", [255, 256])
def test_unknown_labels_keep_their_value(ignore, tmp_path):
    labels = np.where(_noise(48, 48) < 26, np.uint16(ignore), _noise(48, 48, high=6, seed=1))
    modality = Modality("segmentation", "labels", 6, ignore)
    found = _condition(tmp_path, modality, labels, (48, 48), (24, 24))
    assert found.dtype == (np.uint8 if ignore == 255 else np.uint16)
    np.testing.assert_array_equal(found, modality.resize(labels, 24, 24))
    views = Views(Folder(tmp_path, "train", (modality,), 24, 24), (modality,), views=3, flip=True, crop=0.6)
    for view in range(3):
        assert ignore in views[view]["segmentation"] and views[view]["segmentation"].dtype == found.dtype


def test_labels_are_read_as_everywhere(tmp_path):
    labels = np.zeros((48, 64), np.uint8)
    labels[0, 0] = 255  # in the part that is cut off, too
    with pytest.raises(UserError, match=re.escape("found the classes [255], but this model knows 0..5")):
        _condition(tmp_path, SEGMENTATION, labels, (48, 64), (8, 8))
    with pytest.raises(UserError, match=re.escape("found a colour picture (mode RGB)")):
        _condition(tmp_path, SEGMENTATION, _noise(48, 64, 3), (48, 64), (8, 8))


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "expected one line, the prompt, found 0"),
        (b" \n\n", "found 0"),
        (b"one\ntwo\n", "found 2"),
        (b"caf\xe9", "not a text file in UTF-8"),
        (b"\xff\xfea\x00", "not a text file in UTF-8"),
    ],
)
def test_a_caption_is_one_prompt_in_utf_8(content, found, tmp_path):
    path = _tree(tmp_path, "image/a.png", "caption/a.txt") / "caption" / "a.txt"
    path.write_bytes(content)
    message = _fails(tmp_path, captions=True)
    assert message.startswith(f"{path}: ") and found in message


# Names and colours of classes

SKY, SEA, VOID = (135, 206, 235), (0, 60, 200), (0, 0, 0)
TWO = Modality("segmentation", "labels", 2, 255)
DESCRIBED = {
    "classes": [{"name": "sky", "color": list(SKY)}, {"name": "sea", "color": list(SEA)}],
    "ignore": 255,
    "ignore_color": list(VOID),
    "swap": {"sky": "sea"},
}


def _describe(tmp_path, name="classes.json", **changes):
    path = tmp_path / name
    path.write_text(json.dumps(DESCRIBED | changes))
    return path


def test_classes_are_described(tmp_path):
    found = read_classes(_describe(tmp_path))
    assert (found.names, found.ignore, found.ignore_color) == (("sky", "sea"), 255, VOID)
    np.testing.assert_array_equal(found.colors, [SKY, SEA])
    np.testing.assert_array_equal(found.mirrored, [1, 0])
    data = DataSettings("folder", str(tmp_path))
    assert data.classes("segmentation") == ("sky", "sea")  # what pictures are drawn with, and judges read by
    np.testing.assert_array_equal(data.palette("segmentation"), [SKY, SEA])
    _describe(tmp_path, "parts.classes.json", classes=[{"name": "a"}, {"name": "b"}, {"name": "c"}], **_PLAIN)
    assert len(data.classes("parts")) == 3 and data.palette("parts") is None and len(data.classes("other")) == 2


_PLAIN = {"ignore_color": None, "swap": {}}


def test_what_is_described_is_kept_and_counts_before_the_folder(tmp_path):
    """Colours or none, unknown or not: a workdir says the same, whatever becomes of the folder."""
    (workdir := tmp_path / "run").mkdir()
    _describe(tmp_path)
    _describe(tmp_path, "parts.classes.json", classes=[{"name": "é"}, {"name": "b"}], ignore=-1, **_PLAIN)
    data, kept = DataSettings("folder", str(tmp_path)), (TWO, Modality("parts", "labels", 2))
    said = {name: data.described(name, workdir) for name in ("segmentation", "parts")}  # a run that has kept none
    data.keep_described(kept, workdir)
    (tmp_path / "classes.json").unlink()
    (tmp_path / "parts.classes.json").write_text("no JSON")
    for name, classes in said.items():
        found = data.described(name, workdir)
        np.testing.assert_array_equal(data.palette(name, workdir), classes.colors)
        assert dataclasses.replace(found, colors=None) == dataclasses.replace(classes, colors=None)
    before = tiny.contents(workdir)
    assert data.palette("segmentation") is None and before.keys() == {f"{n}.classes.json" for n in said}
    with pytest.raises(UserError, match="parts.classes.json"):
        data.keep_described(kept, workdir)
    assert tiny.contents(workdir) == before
    (best := tmp_path / "best").mkdir()
    data.keep_described(kept, best, workdir)  # of the best MCM's folder, from the workdir's own
    assert tiny.contents(best) == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": []}, "classes must be a list"),
        ({"classes": [{"name": "sky"}, {"name": "sky"}], **_PLAIN}, "'sky' more than once"),
        ({"classes": [{"name": "sky", "color": [1, 2, 256]}, {"name": "sea"}]}, "given for every class or for none"),
        ({"classes": [{"name": "sky", "color": [1, 2, 256]}], **_PLAIN}, "color of 'sky' must be three whole numbers"),
        ({"classes": [{"name": n, "color": [1, 2, 3]} for n in "ab"], **_PLAIN}, r"\(1, 2, 3\) for a and b"),
        ({"swap": {"sky": "moon"}}, r"swap must be of names among classes \(sky, sea\), got moon"),
        ({"ignore": 1}, "ignore must be -1 for none, or a value that is no class"),
        ({"ignore_color": list(SKY)}, "that of 'sky'"),
        ({"colours": 1}, "its keys must be of classes, ignore, ignore_color, swap, got colours"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(changes, message, tmp_path):
    path = _describe(tmp_path, **changes)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{message}"):
        read_classes(path)
    _tree(tmp_path, "image/a.png", "segmentation/a.png")
    assert str(path) in _refused(tmp_path, TWO)


def _described(tmp_path, picture):
    _describe(tmp_path)
    return _condition(tmp_path, TWO, picture, (8, 8), (8, 8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_labels_are_read_by_their_colours(mode, tmp_path):
    """A palette in another order, too, if all its colours are the classes'; greyscale values are the classes."""
    _describe(tmp_path)
    labels = np.where(_noise(48, 48) < 26, 255, _noise(48, 48, high=2, seed=1)).astype(np.uint8)
    colours = np.array([SKY, SEA, *[VOID] * 254], np.uint8)[labels]
    picture = Image.fromarray(labels if mode == "L" else colours)
    picture = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=3) if mode == "P" else picture.convert(mode)
    np.testing.assert_array_equal(_condition(tmp_path, TWO, picture, (48, 48), (48, 48)), labels)


def test_a_palette_whose_colours_and_indices_contradict_each_other_is_refused(tmp_path):
    """One stray colour would turn the reading of a whole file from its colours to its indices."""
    labels = (_noise(8, 8) < 26).astype(np.uint8)  # the sea's index 0, the sky's 1: the other way round
    picture = Image.fromarray(labels, "P")
    picture.putpalette([*SEA, *SKY, 1, 2, 3, *[9] * 759])
    np.testing.assert_array_equal(_described(tmp_path, picture), 1 - labels)
    picture.putpixel((0, 0), 2)
    with pytest.raises(UserError, match="1 of 64 pixels .* other classes than the colours do; .* as greyscale"):
        _described(tmp_path, picture)
    picture.putpalette([*SKY, *SEA, *[9] * 762])  # those of the classes: a further index is what it is
    with pytest.raises(UserError, match=r"found the classes \[2\]"):
        _described(tmp_path, picture)
    picture.putpixel((0, 0), 1)
    picture.putpalette([7] * 768)
    np.testing.assert_array_equal(_described(tmp_path, picture), np.asarray(picture))


def test_one_bit_is_a_palette_of_black_and_white(tmp_path):
    said = [{"name": "object", "color": [255] * 3}, {"name": "background", "color": [0] * 3}]
    _describe(tmp_path, classes=said, swap={}, ignore_color=None)
    bits = _noise(8, 8) < 26
    np.testing.assert_array_equal(_condition(tmp_path, TWO, Image.fromarray(bits), (8, 8), (8, 8)), ~bits)


def test_a_colour_that_is_no_class_is_counted_and_the_nearest_named(tmp_path):
    _describe(tmp_path)
    pixels = np.full((8, 8, 3), SKY, np.uint8)
    pixels[0, :5], pixels[1, 0] = (130, 200, 230), (1, 1, 1)
    with pytest.raises(UserError) as caught:
        _condition(tmp_path, TWO, pixels, (8, 8), (8, 8))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'train' / 'segmentation' / 'a.png'}: 6 of 64 pixels")
    assert "[130, 200, 230] in 5 of them, and 1 other(s); the nearest class is 'sky'" in message
    assert "anti-aliasing" in message and "JPEG" in message
    with pytest.raises(UserError, match="64 of 64 pixels are transparent"):
        _condition(tmp_path, TWO, np.zeros((8, 8, 4), np.uint8), (8, 8), (8, 8))
    three = Modality("segmentation", "labels", 3)
    assert "describes 2 classes, but config.modalities.segmentation.channels is 3" in _refused(tmp_path, three)


# Prompts in one file


@pytest.mark.parametrize("file", ["captions.jsonl", "metadata.jsonl", "image/metadata.jsonl"])
def test_prompts_are_read_from_lines(file, tmp_path):
    split = _tree(tmp_path, "image/a.png", "image/b.jpg", "image/caf\u00e9 \u5c71.png")
    ours = file == "captions.jsonl"
    rows = [("a.png", "one"), ("image/b.jpg", " two\nlines "), ("cafe\u0301 \u5c71", "three")]
    keys = ("file", "caption") if ours else ("file_name", "text")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    (split / file).write_text("\n".join([*lines, ""]), encoding="utf-8")
    source = Folder(tmp_path, "train", (), 8, 8, captions=True)
    assert [str(source[i]["caption"]) for i in range(3)] == ["one", "two lines", "three"]
    before, stamp = source.fingerprints()["caption"], source.stamp()
    (split / file).write_text("\n".join(lines).replace("one", "uno"), encoding="utf-8")
    changed = Folder(tmp_path, "train", (), 8, 8, captions=True)
    assert changed.fingerprints()["caption"] != before and changed.stamp() != stamp
    _tree(tmp_path, "caption/a.txt")
    assert f"{split}: prompts are in {split / 'caption'} and in {split / file}" in _refused(tmp_path, captions=True)
    assert len(Folder(tmp_path, "train", (), 8, 8)) == 3  # not asked for, not looked at


@pytest.mark.parametrize(
    "line, found",
    [
        ("{", "line 2: no JSON"),
        ("[" * 100_000, "line 2: "),
        ('["a.png", "text"]', "which is no object"),
        ('{"file": "a.png"}', "found the keys 'file', expected one of caption, text"),
        ('{"file": "a.png", "name": "a", "text": "x"}', "expected one of file, file_name, name"),
        ('{"file": "a.png", "text": 3}', "text is '3', expected a text"),
        ('{"file": "a.png", "text": " "}', "the prompt for 'a' is empty"),
        ('{"file": "../../etc/passwd", "text": "x"}', "names only, no paths"),
        ('{"file": "/a.png", "text": "x"}', "names only, no paths"),
        ('{"file": "image/..", "text": "x"}', "names only, no paths"),
        ('{"file": "..\\\\a.png", "text": "x"}', "names only, no paths"),
        ('{"file": "c.png", "text": "x"}', "there is no picture 'c'"),
        (json.dumps({"file": "c" * 9_000, "text": "x"}), "...'"),
        ('{"file": "b.png", "text": "x"}', "line 1 has a prompt for 'b' already"),
    ],
)
def test_a_broken_line_is_named_by_its_number(line, found, tmp_path):
    split = _tree(tmp_path, "image/a.png", "image/b.png")
    (split / "captions.jsonl").write_text('{"file": "b.png", "caption": "one"}\n' + line + "\n")
    message = _refused(tmp_path, captions=True)
    assert message.startswith(f"{split / 'captions.jsonl'}: line 2: ") and found in message and len(message) < 1_200
    assert "no line for 1 of 2 pictures: 'a'" in message


def test_files_far_larger_than_prompts_are_refused_and_not_read(tmp_path, monkeypatch):
    split = _tree(tmp_path, "image/a.png")
    path, line = split / "captions.jsonl", '{"file": "a.png", "caption": "one"}\n'
    with path.open("w") as file:
        file.write(line)
        file.truncate(2**33)  # a sparse one
    tracemalloc.start()
    assert f"{path}: line 2: has more than 1,048,576 characters" in _refused(tmp_path, captions=True)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    path.write_text(line + "x\n" * 10_001)
    problems = read_lines(path, (".png",), {"a"})[1]
    assert len(problems) == 10_001 and problems[-1].found.startswith("line 10,002: 10,000 lines before are wrong, ")
    path.write_text(line + "\n" * 3_000)
    monkeypatch.setattr(captions, "_MOST_OF_FILE", 2_000)
    assert f"{path}: line 1,966: the file has more than 2,000 characters" in _refused(tmp_path, captions=True)
    path.unlink()
    os.truncate(_tree(tmp_path, "caption/a.txt") / "caption" / "a.txt", 2**33)
    with pytest.raises(UserError, match=r"a\.txt: expected one line, the prompt, found more than 1,048,576"):
        Folder(tmp_path, "train", (), 8, 8, captions=True)[0]


# Held out by a hash of the names


def test_a_folder_without_a_test_split_holds_some_out(tmp_path):
    names = [f"{k:03}" for k in range(400)]
    held_out = held_out_names(names, 0.1)
    assert 20 < len(held_out) < 60
    more = held_out_names([*names, *(f"new {k}" for k in range(100))], 0.1)
    assert more & set(names) == held_out  # new pictures move no old one
    for few in (["a", "b"], [f"x{k}" for k in range(5)]):
        assert 1 <= len(held_out_names(few, 0.1)) < len(few) and len(held_out_names(few, 0.9)) < len(few)
    assert held_out_names(["a"], 0.1) == held_out_names(names, 0.0) == set()

    split = _tree(tmp_path, *(f"image/{k}.png" for k in range(20)))
    of = lambda split, share: Folder(tmp_path, split, (), 8, 8, held_out_share=share).names  # noqa: E731
    train, test = of("train", 0.2), of("test", 0.2)
    assert test and not set(train) & set(test) and len(train) + len(test) == 20
    assert len(of("train", 0.0)) == 20
    data = DataSettings("folder", str(tmp_path))
    assert data.has_test_split() and data.splits_itself()
    (tmp_path / "config.json").write_text(json.dumps({"data": {"name": "folder", "path": str(tmp_path)}}))
    old = config_lib.load(dataclasses.make_dataclass("Part", [("data", DataSettings)], frozen=True), tmp_path).data
    assert not old.has_test_split() and len(old.find("train", (), CARD)) == 20  # a run of before
    _tree(tmp_path, "image/z.png", split="test")
    assert of("test", 0.2) == ("z",) and len(of("train", 0.2)) == 20 and not data.splits_itself()
    for name in os.listdir(split / "image")[1:]:
        (split / "image" / name).unlink()
    (tmp_path / "test" / "image" / "z.png").unlink()
    (tmp_path / "test" / "image").rmdir()
    (tmp_path / "test").rmdir()
    assert not data.has_test_split() and len(of("train", 0.2)) == 1
    with pytest.raises(UserError, match="holds one picture, so none can be held out"):
        of("test", 0.2)


# Pictures that miss modalities


def test_a_gap_is_the_null_condition(tmp_path, capsys):
    split = _tree(tmp_path, "image/a.png", "image/b.png", "sketch/a.png", "segmentation/a.png", "segmentation/b.png")
    message = _refused(tmp_path, SKETCH, SEGMENTATION)
    assert str(split / "sketch" / "b.png") in message and "config.data.partial=True" in message
    modalities = (SEGMENTATION, SKETCH, NORMALS)
    assert f"{split / 'normals'}: no such folder, so no picture has one" in _refused_partial(tmp_path, modalities)
    _save(split / "normals" / "b.png", _noise(8, 8, 3))
    source = Folder(tmp_path, "train", modalities, 8, 8, partial=True)
    assert source.shares() == {"segmentation": 1.0, "sketch": 0.5, "normals": 0.5}
    whole, gap = source[1], source[0]
    assert whole["present"].tolist() == [1, 0, 1] and gap["present"].tolist() == [1, 1, 0]
    for name, dtype, shape in (("sketch", np.uint8, (8, 8)), ("normals", np.uint8, (8, 8, 3))):
        for example in (whole, gap):
            assert example[name].dtype == dtype and example[name].shape == shape
    assert not gap["normals"].any() and "present" not in Folder(tmp_path, "train", (SEGMENTATION,), 8, 8)[0]
    (split / "normals" / "a.png").write_bytes((split / "normals" / "b.png").read_bytes())
    assert Folder(tmp_path, "train", modalities, 8, 8, partial=True).fingerprints() != source.fingerprints()
    DataSettings("folder", str(tmp_path), partial=True, held_out_share=0.0).open("train", modalities, CARD)
    assert "segmentation 100%, sketch 50%, normals 100%" in capsys.readouterr().out
    _save(split / "sketch" / "stray.png", _noise(8, 8))
    assert "stray.png" in _refused_partial(tmp_path, modalities)


def _refused_partial(tmp_path, modalities):
    with pytest.raises(UserError) as caught:
        Folder(tmp_path, "train", modalities, 8, 8, partial=True)
    return str(caught.value)
