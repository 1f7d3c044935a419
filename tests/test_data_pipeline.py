"""A batch is a function of (source, seed, step); an epoch shows every example once."""

import itertools

import numpy as np
import pytest

from mcm_jax.data.pipeline import InMemory, to_float, training_batches
from mcm_jax.data.scenes import Scenes

SIZE = 7


def _source(size=SIZE):
    """Example i has the pixel value i everywhere, the class i % 6, and grey 10 i."""
    i = np.arange(size, dtype=np.uint8)
    return InMemory(
        {
            "image": np.broadcast_to(i[:, None, None, None], (size, 4, 6, 3)).copy(),
            "segmentation": np.broadcast_to(i[:, None, None] % 6, (size, 4, 6)).copy(),
            "sketch": np.broadcast_to(10 * i[:, None, None], (size, 4, 6)).copy(),
        }
    )


def _batches(batch_size=3, seed=0, size=SIZE):
    source = _source(size)
    return training_batches(lambda index, draw: source[index], size, batch_size, seed)


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def _indices(batches, epochs, size=SIZE):
    """``[epochs, size]``, the examples in the order in which they are shown."""
    steps = -(-epochs * size // len(batches[0]["index"]))
    return np.concatenate([batches[k]["index"] for k in range(steps)])[: epochs * size].reshape(epochs, size)


# Order


def test_a_batch_is_a_function_of_its_step():
    forward, backward = _batches(), _batches()
    seen = [forward[k] for k in range(12)]
    for k in reversed(range(12)):
        _same(backward[k], seen[k])
    for batch, expected in zip(itertools.islice(iter(_batches()), 12), seen, strict=True):
        _same(batch, expected)
    _same(_batches()[100_000], forward[100_000])  # without end, and at no cost


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_each_epoch_is_a_permutation(batch_size):
    batches = _batches(batch_size)
    epochs = _indices(batches, 9)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.arange(SIZE)[None].repeat(9, 0))
    assert len(np.unique(epochs, axis=0)) > 6  # and nearly each another one
    np.testing.assert_array_equal(epochs, _indices(_batches(3), 9))  # the order has nothing to do with batches


@pytest.mark.parametrize("repeat", [0, 3])
def test_draws_count_how_often_an_example_was_seen(repeat):
    asked = []
    batches = training_batches(lambda index, draw: asked.append((index, draw)) or {}, SIZE, 4, 0, repeat)
    before = np.zeros(SIZE, int)
    for k in range(20):
        batch = batches[k]
        for index, seen, draw in zip(batch["index"], batch["seen"], batch["draw"], strict=True):
            assert seen == before[index] and draw == (seen % repeat if repeat else seen)
            before[index] += 1
        np.testing.assert_array_equal(asked[-1], (batch["index"], batch["draw"]))
    far = batches[100_000]
    np.testing.assert_array_equal(far["seen"], np.arange(400_000, 400_004) // SIZE)


def test_the_seed_decides_the_order():
    same, other = _indices(_batches(seed=0), 5), _indices(_batches(seed=1), 5)
    np.testing.assert_array_equal(same, _indices(_batches(seed=0), 5))
    assert not np.array_equal(same, other)


def test_processes_that_share_batches_out_see_what_one_would():
    source, shares = _source(), ([0, 1, 4], [2, 3, 5])  # rows of six
    whole = _batches(6)
    parts = [
        training_batches(lambda index, draw: source[index], SIZE, 6, seed=0, rows=np.array(rows)) for rows in shares
    ]
    for k in range(5):
        for part, rows in zip(parts, shares, strict=True):
            _same(part[k], {name: value[rows] for name, value in whole[k].items()})


@pytest.mark.parametrize("batch_size, size", [(20, 7), (5, 1)])
def test_a_batch_may_be_larger_than_the_source(batch_size, size):
    batch = _batches(batch_size, size=size)[0]
    assert batch["image"].shape == (batch_size, 4, 6, 3)
    np.testing.assert_array_equal(batch["draw"], np.arange(batch_size) // size)
    assert len({(i, d) for i, d in zip(batch["index"], batch["draw"], strict=True)}) == batch_size


# Content


def test_index_names_the_example():
    batches = _batches(5)
    for k in range(6):
        batch, index = batches[k], batches[k]["index"]
        for name, values in (("image", index), ("segmentation", index % 6), ("sketch", index * 10)):
            expected = np.broadcast_to(values.reshape(-1, *(1,) * (batch[name].ndim - 1)), batch[name].shape)
            np.testing.assert_array_equal(batch[name], expected)


def test_shapes_and_dtypes():
    batch = _batches(5)[2]
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "image": ((5, 4, 6, 3), "uint8"),
        "segmentation": ((5, 4, 6), "uint8"),
        "sketch": ((5, 4, 6), "uint8"),
        "index": ((5,), "int32"),
        "seen": ((5,), "int32"),
        "draw": ((5,), "int32"),
    }


def test_8_bits_fill_the_ranges_of_the_api():
    example = {name: np.array([0, 255], np.uint8) for name in ("image", "segmentation", "sketch")}
    out = to_float(example, maps=("sketch",))
    assert out["image"].tolist() == [-1, 1] and out["sketch"].tolist() == [0, 1]
    assert out["segmentation"].tolist() == [0, 255] and out["segmentation"].dtype == np.uint8
    assert out["image"].dtype == out["sketch"].dtype == np.float32
    assert example["image"].dtype == np.uint8  # the source's own is left alone


# InMemory


def _check_rendered(rendered, scenes, indices):
    for i in indices:
        stored, exact = rendered[i], scenes[i]
        assert stored.keys() == {"image", "segmentation", "sketch", "caption"}
        assert all(stored[name].dtype == np.uint8 for name in ("image", "segmentation", "sketch"))
        assert stored["caption"] == exact["caption"]
        np.testing.assert_array_equal(stored["segmentation"], exact["segmentation"])
        found = to_float(stored, maps=("sketch",))
        np.testing.assert_allclose(found["image"], exact["image"], atol=0.5 / 127.5 + 1e-6)  # half a level
        np.testing.assert_allclose(found["sketch"], exact["sketch"], atol=0.5 / 255 + 1e-6)


def test_rendered_scenes_are_the_scenes_in_8_bits():
    scenes = Scenes("train", 4, 8, 12, seed=5)
    rendered = InMemory.render(scenes)
    assert len(rendered) == 4 and rendered[0]["image"].shape == (8, 12, 3)
    _check_rendered(rendered, scenes, range(4))


def test_many_scenes_are_rendered_in_parallel_to_the_same_arrays():
    scenes = Scenes("train", 400, 8, 8, seed=5)
    parallel = InMemory.render(scenes)
    assert len(parallel) == 400 and len(parallel.arrays["sketch"]) == 400
    _check_rendered(parallel, scenes, [0, 1, *range(48, 400, 25), 399])
    serial = InMemory.render(Scenes("train", 60, 8, 8, seed=5))  # a scene depends on its index, not on their number
    for name, values in serial.arrays.items():
        np.testing.assert_array_equal(parallel.arrays[name][:60], values)
