"""Conditions become channels without loss or leak, and whatever is no condition is refused with a reason."""

import dataclasses
import io
import random
import re
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mcm_jax.errors import UserError
from mcm_jax.modalities import KINDS, Modality, drop, known, read_png, stack, total_channels
from mcm_jax.modalities.files import HEAD, eight_bits, is_read_anew
from mcm_jax.pictures import show

SEGMENTATION = Modality("segmentation", "labels", 6)
SKETCH = Modality("sketch", "map", 1)
NORMALS = Modality("normals", "map", 3)
LINES = Modality("sketch", "lines", 1)
PARTIAL = Modality("segmentation", "labels", 6, ignore=255)
VECTORS = Modality("normals", "normals", 3)
STROKES = Modality("strokes", "sparse", 3)
ALL = (SEGMENTATION, SKETCH, NORMALS)


def _labels(height=8, width=8, classes=6, seed=0):
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


def _conditions(batch=2, height=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "segmentation": rng.integers(0, 6, (batch, height, width)).astype(np.uint8),
        "sketch": rng.random((batch, height, width), np.float32),
        "normals": rng.random((batch, height, width, 3), np.float32),
    }


def _one_of(modality, height=8, width=12, seed=0):
    """A condition of any modality, as its files are read, with unknown pixels where it can have any."""
    rng = np.random.default_rng(seed)
    if not modality.continuous:
        return rng.integers(0, modality.channels, (height, width)).astype(np.int32)
    values = rng.random((height, width, modality.planes), np.float32)
    if modality.kind == "normals":
        values = (values - 0.5) / np.linalg.norm(values - 0.5, axis=-1, keepdims=True) / 2 + 0.5
        values[:2] = 0
    if modality.kind == "sparse":
        values[..., -1] = rng.random((height, width)) < 0.4
    return values if modality.planes > 1 else values[..., 0]


# Modality


@pytest.mark.parametrize(
    "modality", [PARTIAL, SKETCH, LINES, VECTORS, STROKES, Modality("hint", "sparse", 1)], ids=lambda m: f"{m.kind}"
)
def test_what_every_kind_does(modality):
    condition = _one_of(modality)
    modality.check(condition, "here")
    packed = modality.pack(condition)
    assert packed.dtype == np.uint8 and packed.nbytes == 8 * 12 * modality.planes
    np.testing.assert_allclose(modality.unpack(packed), condition, atol=0.5 / 255 + 1e-6)
    for these in (condition, packed):
        np.testing.assert_allclose(modality.mirror(modality.mirror(these)), these, atol=1e-6)
    small = modality.resize(condition, 4, 6)
    modality.check(small, "small")
    np.testing.assert_array_equal(modality.crop(condition, (0, 0, 8, 12), 4, 6), small)
    np.testing.assert_array_equal(modality.crop(condition, (2, 3, 6, 9), 4, 6), condition[2:6, 3:9])
    batch = modality.resize_all(packed[None], 4, 6)
    np.testing.assert_array_equal(batch[0], modality.pack(modality.resize(modality.unpack(packed), 4, 6)))
    null = modality.null(1, 4, 6)
    assert null.shape == batch.shape and not null.any()
    modality.check(null[0], "null")
    present = jnp.ones((1, 1), bool)
    seen = np.asarray(stack((modality,), {modality.name: small[None]}, present))
    assert seen.shape == (1, 4, 6, modality.channels + 1) and seen.min() >= 0 and seen.max() <= 1
    mirrored = np.asarray(stack((modality,), {modality.name: modality.mirror(small)[None]}, present))
    if modality is not VECTORS:  # whose colours change
        np.testing.assert_array_equal(mirrored, seen[:, :, ::-1])
    shown = modality.show(small[None])
    assert shown.shape == (1, 4, 6, 3) and shown.dtype == np.uint8
    assert modality.kind in KINDS


def test_known_names_make_modalities():
    names = ["segmentation", "sketch", "canny", "soft_edges", "lineart", "depth", "normals", "pose", "keypoints"]
    for name in [*names, "strokes", "grey", "low_resolution", "inpainting"]:
        found = known(name)
        modality = Modality(name, found.kind, found.channels or 2)
        assert found.judge in ("", modality.judge)
    assert known("mine") is None and Modality("mine", "map", 1).judge == "" == Modality("grey", "map", 3).judge
    assert repr(Modality("sketch", "lines", 1, -1)) == "Modality(name='sketch', kind='lines', channels=1)"  # in caches


def test_kinds_and_channels_are_checked():
    with pytest.raises(UserError, match=r"depth\.kind must be one of .*labels.*map.*, got 'depth'"):
        Modality("depth", "depth", 1)
    for channels in (0, -1):
        with pytest.raises(UserError, match=rf"depth\.channels must be at least 1, got {channels}"):
            Modality("depth", "map", channels)
    for modality, ignore in ((SEGMENTATION, 5), (SEGMENTATION, -2), (SEGMENTATION, 2**16), (SKETCH, 255)):
        with pytest.raises(UserError, match=rf"{modality.name}\.ignore must be -1 for none, .*, got {ignore}"):
            dataclasses.replace(modality, ignore=ignore)


@pytest.mark.parametrize(
    "modality, array",
    [
        (SEGMENTATION, np.array([[0, 5]], np.uint8)),
        (SEGMENTATION, np.array([[0, 5]], np.int64)),
        (PARTIAL, np.array([[0, 255]], np.uint8)),
        (SKETCH, np.array([[0.0, 1.0]], np.float32)),
        (SKETCH, np.zeros((2, 3, 1))),
        (NORMALS, np.ones((2, 3, 3), np.float32)),
        (LINES, np.array([[0.0, 1.0]], np.float32)),
    ],
)
def test_check_accepts_conditions(modality, array):
    modality.check(array, "here")


@pytest.mark.parametrize(
    "modality, array, message",
    [
        (SEGMENTATION, np.zeros((2, 2), np.float32), "2-D integer array of classes, got float32[2, 2]"),
        (SEGMENTATION, np.zeros((2, 2), bool), "2-D integer array of classes, got bool[2, 2]"),
        (SEGMENTATION, np.zeros((2, 2, 6), np.int32), "2-D integer array of classes, got int32[2, 2, 6]"),
        (SEGMENTATION, np.array([[0, 6, 9]]), "found the classes [6, 9], but this model knows 0..5 (6 classes)"),
        (SEGMENTATION, np.array([[-1, 0]]), "found the classes [-1], but this model knows 0..5 (6 classes)"),
        (
            SEGMENTATION,
            np.array([[0, 255]]),
            "If 255 means unlabelled, train with config.modalities.segmentation.ignore=255",
        ),
        (PARTIAL, np.array([[7, 255]]), "found the classes [7], but this model knows 0..5 (6 classes, and 255 for"),
        (SKETCH, np.zeros(4), "has 1 channel(s), got shape [4]"),
        (SKETCH, np.zeros((2, 2, 3)), "has 1 channel(s), got shape [2, 2, 3]"),
        (NORMALS, np.zeros((2, 2)), "has 3 channel(s), got shape [2, 2]"),
        (NORMALS, np.zeros((1, 2, 2, 3)), "has 3 channel(s), got shape [1, 2, 2, 3]"),
        (SKETCH, np.array([[0, 255]], np.uint8), "has values in [0, 1], got 0 to 255"),
        (SKETCH, np.array([[-0.5, 1.0]]), "has values in [0, 1], got -0.5 to 1.0"),
        (LINES, np.array([[0, 255]], np.uint8), "has values in [0, 1], got 0 to 255"),
        (SKETCH, np.array([[0.5, np.nan]]), "has values in [0, 1], got nan to nan"),
        (SKETCH, np.array([[0.5, np.inf]]), "has values in [0, 1], got 0.5 to inf"),
    ],
)
def test_check_says_what_was_found_and_expected(modality, array, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        modality.check(array, "my/file.png")
    assert str(caught.value).startswith("my/file.png: ")


# resize


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (4, 4), (3, 5), (13, 7), (1, 1), (32, 2)])
def test_resized_labels_hold_only_their_own_classes(shape):
    labels = _labels(8, 8) * 40  # classes between which an average would show
    resized = SEGMENTATION.resize(labels, *shape)
    assert resized.shape == shape and resized.dtype == labels.dtype
    assert set(np.unique(resized)) <= set(np.unique(labels))


@pytest.mark.parametrize("rows, columns", [(2, 2), (3, 1), (1, 4)])
def test_labels_survive_going_up_and_down(rows, columns):
    labels = _labels(6, 9)
    up = SEGMENTATION.resize(labels, 6 * rows, 9 * columns)
    np.testing.assert_array_equal(up, labels.repeat(rows, 0).repeat(columns, 1))
    np.testing.assert_array_equal(SEGMENTATION.resize(up, 6, 9), labels)


def test_nearest_takes_the_pixel_under_the_centre():
    np.testing.assert_array_equal(SEGMENTATION.resize(np.arange(9)[None], 1, 3), [[1, 4, 7]])
    np.testing.assert_array_equal(SEGMENTATION.resize(np.arange(3)[:, None], 5, 1), [[0], [0], [1], [2], [2]])


@pytest.mark.parametrize("modality", [SKETCH, NORMALS])
def test_maps_are_averaged_over_areas(modality):
    values = np.random.default_rng(0).random((12, 8) + (3,) * (modality is NORMALS), np.float32)
    small = modality.resize(values, 4, 4)  # 3 x 2 pixels each
    expected = values.reshape(4, 3, 4, 2, *values.shape[2:]).mean((1, 3))
    np.testing.assert_allclose(small, expected, atol=1e-6)
    assert small.dtype == np.float32
    np.testing.assert_allclose(modality.resize(small, 12, 8), small.repeat(3, 0).repeat(2, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (16, 4), (5, 24), (1, 1)])
def test_resized_maps_keep_their_mean_and_range(shape):
    values = np.zeros((8, 12), np.float32)
    values[:, 5:] = 1
    resized = SKETCH.resize(values, *shape)
    assert resized.shape == shape and resized.min() >= 0 and resized.max() <= 1
    if shape[0] <= 8 and shape[1] <= 12:
        # Exact at whole ratios; elsewhere Pillow's box counts a pixel for the cell that holds its centre.
        assert resized.mean() == pytest.approx(values.mean(), abs=0.03)
    np.testing.assert_array_equal(SKETCH.resize(np.ones((8, 12), np.float32), *shape), np.ones(shape))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_lines_keep_their_brightness(width):
    """Where an average would dim them: a line of 1 pixel in a cell of 8 is 1/8."""
    drawing = np.ones((64, 96), np.float32)
    drawing[19 : 19 + width] = drawing[:, 34 : 34 + width] = 0
    cells = np.zeros((8, 12))
    cells[2] = cells[:, 4] = 1
    np.testing.assert_allclose(LINES.resize(drawing, 8, 12), 1 - cells, atol=1e-6)
    np.testing.assert_allclose(SKETCH.resize(drawing, 8, 12)[0], 1 - cells[0] * width / 8, atol=1e-6)


def test_faint_noise_does_not_become_lines():
    noise = 1 - np.random.default_rng(0).integers(0, 3, (256, 256)).astype(np.float32) / 255
    assert LINES.resize(noise, 32, 32).min() > 0.9


def test_lines_enlarged_and_no_lines_at_all():
    drawing = _labels(6, 9, classes=2).astype(np.float32)
    np.testing.assert_allclose(LINES.resize(drawing, 12, 27), drawing.repeat(2, 0).repeat(3, 1), atol=1e-6)
    assert (LINES.resize(np.ones((64, 96), np.float32), 8, 12) == 1).all()


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (40, 3), (1, 1)])
def test_resized_lines_stay_in_range(shape):
    resized = LINES.resize(np.random.default_rng(0).random((24, 16), np.float32) ** 8, *shape)
    assert resized.shape == shape and resized.dtype == np.float32 and resized.min() >= 0 and resized.max() <= 1


def test_the_mcm_sees_the_ink():
    y = _conditions()["sketch"]
    np.testing.assert_allclose(LINES.channels_of(jnp.asarray(y)), 1 - y[..., None], atol=1e-7)
    np.testing.assert_array_equal(LINES.null(2, 4, 6), SKETCH.null(2, 4, 6))
    assert total_channels((LINES,)) == 2


def test_sparse_colours_are_averaged_where_they_are_known():
    colours = _one_of(STROKES)
    hidden = np.where(colours[..., 3:] > 0, colours, np.random.default_rng(1).random((8, 12, 4)) * [1, 1, 1, 0])
    small = STROKES.resize(colours, 4, 4)
    np.testing.assert_allclose(STROKES.resize(hidden, 4, 4), small, atol=1e-6)  # what is transparent has no colour
    cells = colours.reshape(4, 2, 4, 3, 4).swapaxes(1, 2).reshape(16, 6, 4)
    for cell, found in zip(cells, small.reshape(16, 4), strict=True):
        inked = cell[cell[:, 3] > 0]
        assert found[3] == pytest.approx(len(inked) / 6)
        np.testing.assert_allclose(found[:3], inked[:, :3].mean(0) if len(inked) else 0, atol=1e-6)
    np.testing.assert_allclose(STROKES.resize(small, 2, 2), STROKES.resize(colours, 2, 2), atol=1e-6)
    seen = np.asarray(stack((STROKES,), {"strokes": small[None]}, jnp.ones((1, 1), bool)))[0]
    np.testing.assert_allclose(seen, np.concatenate([small[..., :3] * small[..., 3:], small[..., 3:]], -1), atol=1e-6)


def test_normals_stay_unit_vectors_and_turn_with_the_picture():
    normals = _one_of(VECTORS)  # whose first two rows are black: unknown
    small = VECTORS.resize(normals, 4, 4)
    vectors = 2 * small[1:] - 1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    mean = (2 * normals[2:] - 1).reshape(3, 2, 4, 3, 3).mean((1, 3))
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-4)
    np.testing.assert_array_equal(small[0], 0.5)
    half = VECTORS.resize(normals[1:5], 1, 12)  # a row of four is unknown: the others' direction
    np.testing.assert_allclose(half, VECTORS.resize(normals[2:5], 1, 12), atol=1e-4)
    seen = np.asarray(stack((VECTORS,), {"normals": small[None]}, jnp.ones((1, 1), bool)))[0]
    assert not seen[0].any() and (seen[1:, :, 3] == 1).all()
    turned = 2 * VECTORS.mirror(small)[:, ::-1] - 1
    np.testing.assert_allclose(turned, (2 * small - 1) * [-1, 1, 1], atol=1e-6)
    with pytest.raises(UserError, match=r"normals\.channels must be 3"):
        Modality("normals", "normals", 1)


def test_the_same_grid_is_left_alone():
    grey = np.random.default_rng(0).random((8, 8), np.float32)
    for modality, array in ((SEGMENTATION, _labels()), (SKETCH, grey), (LINES, grey / 2)):
        np.testing.assert_array_equal(modality.resize(array, 8, 8), array)


# Channels


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_become_one_hot(dtype):
    labels = _labels(4, 6)[None].astype(dtype)
    channels = np.asarray(SEGMENTATION.channels_of(jnp.asarray(labels)))
    assert channels.dtype == np.float32
    np.testing.assert_array_equal(channels, np.eye(6)[labels])


def test_maps_become_their_values():
    y = _conditions()
    np.testing.assert_array_equal(SKETCH.channels_of(jnp.asarray(y["sketch"]))[..., 0], y["sketch"])
    np.testing.assert_array_equal(SKETCH.channels_of(jnp.asarray(y["sketch"][..., None]))[..., 0], y["sketch"])
    np.testing.assert_array_equal(NORMALS.channels_of(jnp.asarray(y["normals"])), y["normals"])


@pytest.mark.parametrize("modality", ALL, ids=lambda m: m.name)
def test_null_is_a_condition_of_zeros(modality):
    null = modality.null(2, 4, 6)
    assert null.shape == _conditions()[modality.name].shape and not null.any()
    for example in null:
        modality.check(example, "null")


def test_stack_shows_the_present_and_their_flags():
    y = _conditions()
    present = jnp.array([[True, False, True], [False, True, False]])
    stacked = np.asarray(stack(ALL, y, present))
    assert stacked.shape == (2, 4, 6, total_channels(ALL)) and total_channels(ALL) == 6 + 1 + 1 + 1 + 3 + 1
    assert stacked.dtype == np.float32
    one_hot, s_flag, sketch, k_flag, normals, n_flag = np.split(stacked, [6, 7, 8, 9, 12], axis=-1)
    np.testing.assert_array_equal(one_hot[0], np.eye(6)[y["segmentation"][0]])
    np.testing.assert_array_equal(sketch[1, ..., 0], y["sketch"][1])
    np.testing.assert_array_equal(normals[0], y["normals"][0])
    assert not one_hot[1].any() and not sketch[0].any() and not normals[1].any()
    for i, flag in enumerate((s_flag, k_flag, n_flag)):
        assert flag.shape[-1] == 1
        np.testing.assert_array_equal(flag, np.broadcast_to(present[:, i, None, None, None], flag.shape))


def test_an_absent_modality_cannot_leak():
    first, second = _conditions(seed=0), _conditions(seed=1)
    for hidden in range(8):
        present = jnp.array([[not hidden >> i & 1 for i in range(3)]] * 2)
        mixed = {m.name: (second if hidden >> i & 1 else first)[m.name] for i, m in enumerate(ALL)}
        np.testing.assert_array_equal(stack(ALL, first, present), stack(ALL, mixed, present))
    everything = jnp.ones((2, 3), bool)
    assert not np.array_equal(stack(ALL, first, everything), stack(ALL, second, everything))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_where_a_label_is_unknown_the_modality_is_absent(dtype):
    labels, unknown = _conditions()["segmentation"].astype(dtype), np.random.default_rng(0).random((2, 4, 6)) < 0.1
    assert 0 < unknown.sum() < unknown.size
    partial, present = jnp.asarray(np.where(unknown, dtype(255), labels)), jnp.ones((2, 1), bool)
    seen, absent = (np.asarray(stack((PARTIAL,), {"segmentation": partial}, p)) for p in (present, ~present))
    whole = np.asarray(stack((SEGMENTATION,), {"segmentation": labels}, present))
    np.testing.assert_array_equal(seen, np.where(unknown[..., None], absent, whole))
    assert not absent.any()


def test_unknown_survives_the_grid_and_is_shown_as_a_checkerboard():
    small = np.where(np.eye(4, dtype=bool), 255, _labels(4, 4)).astype(np.uint8)
    large = small.repeat(3, 0).repeat(2, 1)
    np.testing.assert_array_equal(PARTIAL.resize(large, 4, 4), small)
    shown = show(PARTIAL, small[None])[0]
    rows, columns = np.nonzero(small == 255)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[rows, columns], ((rows + columns) % 2 * 255)[:, None].repeat(3, 1))
    np.testing.assert_array_equal(shown[small < 255], show(SEGMENTATION, small[small < 255][None, None])[0, 0])


def test_the_flag_tells_a_map_of_zeros_from_no_map():
    y = _conditions() | {"sketch": np.zeros((2, 4, 6), np.float32)}
    with_map, without = (stack(ALL, y, jnp.array([[True, flag, True]] * 2)) for flag in (True, False))
    assert not np.array_equal(with_map, without)


def test_stack_follows_the_order_of_the_modalities():
    y, present = _conditions(), jnp.array([[True, False, True]] * 2)
    forward, backward = stack(ALL, y, present), stack(ALL[::-1], y, present[:, ::-1])
    np.testing.assert_array_equal(
        jnp.concatenate([forward[..., 9:], forward[..., 7:9], forward[..., :7]], -1), backward
    )


# drop


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.8])
def test_drop_hides_each_independently_at_its_rate(rate):
    present = np.asarray(jax.vmap(lambda k: drop(k, 3, rate))(jax.random.split(jax.random.key(0), 4000)))
    assert present.dtype == bool and present.shape == (4000, 3)
    np.testing.assert_allclose(1 - present.mean(0), rate, atol=4 * 0.5 / 4000**0.5)
    correlation = np.corrcoef(present.T)
    assert np.abs(correlation - np.eye(3)).max() < 4 / 4000**0.5


def test_drop_at_its_ends():
    assert drop(jax.random.key(0), 50, 0.0).all() and not drop(jax.random.key(0), 50, 1.0).any()


# read_png: labels


def _save(tmp_path, picture, name="condition.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def _palette(labels):
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.reshape(-1).tolist())
    picture.putpalette([255 - i // 3 for i in range(768)])  # colours that are not the indices
    return picture


@pytest.mark.parametrize("name", ["greyscale", "palette", "palette, transparent", "16 bit"])
def test_labels_are_read_exactly(name, tmp_path):
    labels, options = _labels(5, 9), {}
    if name == "16 bit":
        picture = Image.fromarray(labels.astype(np.uint16))
    else:
        picture = Image.fromarray(labels) if name == "greyscale" else _palette(labels)
        options = {"transparency": 0} if "transparent" in name else {}
    read = read_png(_save(tmp_path, picture, **options), SEGMENTATION)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_of_few_bits_are_read_exactly(bits, tmp_path):
    """Pillow opens greys of 2 and 4 bits as 8, so that class 1 would be 85 or 17."""
    labels = _labels(5, 8, classes=4)
    packed = [sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(row)) for row in labels.reshape(-1, 8 // bits)]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in np.array(packed, np.uint8).reshape(5, bits))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 5, bits, 0, 0, 0, 0))
    path = tmp_path / "few.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_png(path, SEGMENTATION), labels)
    np.testing.assert_allclose(read_png(path, SKETCH) * (2**bits - 1), labels, atol=1e-6)  # a map's range is whole


def test_lines_are_over_white_where_they_are_transparent(tmp_path):
    """As drawing programs export them; a map's colours count whatever alpha says."""
    drawn = np.zeros((8, 9, 4), np.uint8)
    drawn[..., 3] = 255 - _GREY
    path = _save(tmp_path, Image.fromarray(drawn))
    np.testing.assert_allclose(read_png(path, Modality("sketch", "lines", 1)) * 255, _GREY, atol=1)
    assert not read_png(path, Modality("depth", "map", 1)).any()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_lines_with_alpha_are_told_by_their_first_bytes(kind, tmp_path):
    """Caches of before they were laid over white are of other data."""
    for mode in ("L", "RGB") + (() if kind == "JPEG" else ("RGBA",)):
        options = {"lossless": True} if kind == "WEBP" else {}
        picture = Image.fromarray(_GREY).convert(mode)
        if mode == "RGBA":
            picture.putalpha(Image.fromarray(_GREY))
        head = _save(tmp_path, picture, format=kind, **options).read_bytes()[:HEAD]
        assert is_read_anew(head, "lines") == (mode == "RGBA") and not is_read_anew(head, "map")
    few = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBB", 8, 5, 4, 0)
    assert is_read_anew(few, "labels") and not is_read_anew(few, "lines")


def test_a_bilevel_picture_is_labels_of_two_classes(tmp_path):
    labels = _labels(5, 9, classes=2)
    read = read_png(str(_save(tmp_path, Image.fromarray(labels.astype(bool)))), SEGMENTATION)
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize("bits", [8, 16])
def test_unknown_classes_are_listed(bits, tmp_path):
    labels = _labels().astype(np.uint16 if bits == 16 else np.uint8)
    labels[0, 0], labels[3, 4] = 6, 250
    path = _save(tmp_path, Image.fromarray(labels))
    expected = f"{path}: found the classes [6, 250], but this model knows 0..5 (6 classes)"
    with pytest.raises(UserError, match=re.escape(expected)):
        read_png(path, SEGMENTATION)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_labels_are_refused(mode, tmp_path):
    path = _save(tmp_path, Image.fromarray(_labels()).convert(mode))
    expected = f"{path}: found a colour picture (mode {mode}), expected one class a pixel"
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        read_png(path, SEGMENTATION)
    assert "0..5" in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("disguised", [False, True])
def test_labels_that_are_no_png_are_refused_whatever_their_name(kind, disguised, tmp_path):
    name = "labels.png" if disguised else f"labels.{kind.lower()}"
    path = _save(tmp_path, Image.fromarray(_labels()), name, format=kind)
    with pytest.raises(UserError, match=re.escape(f"{path}: found a {kind} file, expected PNG")):
        read_png(path, SEGMENTATION)


# read_png: files that are no pictures


@pytest.mark.parametrize("modality", [SEGMENTATION, SKETCH], ids=lambda m: m.name)
def test_missing_files_and_folders(modality, tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        expected = f"{path}: no such file (wanted: the {modality.name}'s PNG)"
        with pytest.raises(UserError, match=re.escape(expected)):
            read_png(path, modality)


@pytest.mark.parametrize("content", [b"", b"no picture at all\n", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0"])
def test_files_that_are_no_pictures(content, tmp_path):
    path = tmp_path / "odd.png"
    path.write_bytes(content)
    for modality in (SEGMENTATION, SKETCH):
        with pytest.raises(UserError, match=re.escape(f"{path}: not a picture that can be read (")) as caught:
            read_png(path, modality)
        assert f"A {modality.name} is a PNG file" in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_png_is_read_or_refused_but_never_a_crash(tmp_path):
    buffer, rng, path = io.BytesIO(), random.Random(0), tmp_path / "damaged.png"
    _palette(_labels()).save(buffer, "PNG")
    whole = buffer.getvalue()
    damaged = [whole[:n] for n in range(0, len(whole), 5)]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.choice((rng.randrange(48), rng.randrange(len(whole))))] = rng.randrange(256)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            SEGMENTATION.check(read_png(path, SEGMENTATION), "read")
        except UserError as e:
            assert str(e).startswith(f"{path}: ")
            refused += 1
    assert refused > len(damaged) / 2
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match=re.escape(f"{path}: not a picture that can be read (")):
        read_png(path, SEGMENTATION)


def test_a_picture_too_large_to_unpack_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    path = _save(tmp_path, Image.fromarray(_labels()))
    with pytest.raises(UserError, match="not a picture that can be read .*exceeds limit"):
        read_png(path, SEGMENTATION)


# read_png: maps

_GREY = (np.arange(72).reshape(8, 9) * 3).astype(np.uint8)


@pytest.mark.parametrize(
    "mode, kind, tolerance",
    [
        ("L", "PNG", 0),
        ("P", "PNG", 0),
        ("LA", "PNG", 0),
        ("RGB", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("L", "GIF", 0),
        ("L", "TIFF", 0),
        ("RGB", "TIFF", 0),
        ("L", "JPEG", 4),
        ("CMYK", "JPEG", 4),
        ("RGB", "WEBP", 8),
    ],
)
def test_a_map_is_read_from_a_picture_of_any_mode(mode, kind, tolerance, tmp_path):
    path = _save(tmp_path, Image.fromarray(_GREY).convert(mode), format=kind)
    grey = read_png(path, SKETCH)
    assert grey.shape == (8, 9) and grey.dtype == np.float32 and grey.min() >= 0 and grey.max() <= 1
    np.testing.assert_allclose(grey * 255, _GREY, atol=tolerance + 1e-3)
    colour = read_png(path, NORMALS)
    assert colour.shape == (8, 9, 3) and colour.dtype == np.float32
    np.testing.assert_allclose(colour * 255, np.stack([_GREY] * 3, -1), atol=tolerance + 1e-3)


def test_a_bilevel_map_is_0_and_1(tmp_path):
    drawn = _labels(classes=2).astype(bool)
    np.testing.assert_array_equal(read_png(_save(tmp_path, Image.fromarray(drawn)), SKETCH), drawn)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big-endian"])
def test_a_map_of_16_bits_keeps_its_precision(kind, tmp_path):
    deep = np.linspace(0, 65535, 72).round().astype(np.uint16).reshape(8, 9)
    picture = Image.fromarray(deep)
    if "big" in kind:
        picture = Image.frombytes("I;16B", (9, 8), deep.astype(">u2").tobytes())
    read = read_png(_save(tmp_path, picture, format=kind.split(",")[0]), SKETCH)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read * 65535, deep, atol=0.01)


def test_greys_of_32_bits_are_read_where_their_scale_is_known(tmp_path):
    ramp = np.linspace(0, 1, 72, dtype=np.float32).reshape(8, 9)
    whole = np.round(ramp * 65535).astype(np.int32)
    for array in (ramp, whole):
        read = read_png(_save(tmp_path, Image.fromarray(array), format="TIFF"), SKETCH)
        np.testing.assert_allclose(read, ramp, atol=1e-5)
        assert np.abs(np.asarray(eight_bits(Image.fromarray(array))) - 255 * ramp).max() <= 0.51
    for array, words in (
        (ramp * 255, "floats from 0 to 255, expected 0 to 1"),
        (whole * 2, "to 131070, expected 0 to 65535"),
        (whole // 257, "whole numbers up to 255, .*255 may be white, too: save it with 8 or 16 bits"),
    ):
        with pytest.raises(UserError, match=f"found a grey picture of .*{words}"):
            read_png(_save(tmp_path, Image.fromarray(array), format="TIFF"), SKETCH)
    dark = (whole // 257).astype(np.uint16)  # of 16 bits it can mean but one thing
    for kind in ("PNG", "TIFF"):
        read = read_png(_save(tmp_path, Image.fromarray(dark), format=kind), SKETCH)
        np.testing.assert_allclose(read, dark / 65535, atol=1e-6)


def test_a_condition_one_pixel_wide_is_fitted():
    for modality in (SKETCH, SEGMENTATION):
        assert modality.fit(np.ones((1000, 1), np.uint8), 32, 64).shape[:2] == (32, 64)
        assert modality.fit(np.ones((1, 1000), np.uint8), 64, 32).shape[:2] == (64, 32)


def test_a_colour_map_keeps_its_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    read = read_png(_save(tmp_path, Image.fromarray(pixels)), NORMALS)
    np.testing.assert_allclose(read * 255, pixels, atol=1e-3)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_of_an_animation_the_first_frame_counts(kind, tmp_path):
    frames = [Image.fromarray(_GREY), Image.fromarray(255 - _GREY)]
    path = _save(tmp_path, frames[0], format=kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(read_png(path, SKETCH) * 255, _GREY, atol=1e-3)


def test_a_mode_that_cannot_be_turned_into_grey_is_refused(tmp_path):
    path = _save(tmp_path, Image.merge("LAB", [Image.fromarray(_GREY)] * 3), format="TIFF")
    with pytest.raises(UserError, match=re.escape(f"{path}: cannot read a picture of mode LAB as a sketch")):
        read_png(path, SKETCH)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_what_is_sparse_is_read_where_it_is_opaque(mode, tmp_path):
    unknown = np.arange(72).reshape(8, 9) % 3 == 0
    picture, options = Image.fromarray(np.where(unknown, 7, _GREY)).convert("L"), {}
    if mode == "palette":
        picture, options = picture.convert("P"), {"transparency": 7}  # no other pixel is 7
    else:
        picture.putalpha(Image.fromarray(np.where(unknown, 0, 255).astype(np.uint8)))
        picture = picture.convert(mode)
    read = read_png(_save(tmp_path, picture, **options), STROKES)
    assert read.shape == (8, 9, 4) and read.dtype == np.float32
    np.testing.assert_array_equal(read[..., 3], ~unknown)
    np.testing.assert_allclose(read[~unknown][:, :3] * 255, _GREY[~unknown][:, None].repeat(3, 1), atol=1e-3)
    shown = show(STROKES, read[None])[0]
    np.testing.assert_array_equal(shown[unknown], show(PARTIAL, np.full((1, 8, 9), 255))[0][unknown])
    np.testing.assert_array_equal(shown[~unknown][:, 0], _GREY[~unknown])


def test_what_is_sparse_needs_transparency(tmp_path):
    path = _save(tmp_path, Image.fromarray(_GREY).convert("RGB"))
    with pytest.raises(UserError, match=re.escape(f"{path}: found a picture without transparency (mode RGB)")):
        read_png(path, STROKES)


def test_a_map_of_two_channels_has_no_picture(tmp_path):
    path = _save(tmp_path, Image.fromarray(_GREY))
    with pytest.raises(UserError, match="a picture cannot hold the 2 channels of a flow"):
        read_png(path, Modality("flow", "map", 2))


def test_rare_formats_are_not_tried_under_the_name_of_another(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")  # Pillow would run Ghostscript
    with pytest.raises(UserError, match="cannot identify"):
        read_png(path, Modality("sketch", "lines", 1))
