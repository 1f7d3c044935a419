"""Laws of the mesh: what lies where, who reads which rows, and that a split base is the base."""

import json
import os
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from mcm_jax import sharding
from mcm_jax.base import load_base
from mcm_jax.errors import UserError
from mcm_jax.sharding import MeshSettings

if jax.device_count() != 2:
    pytest.skip("written for two devices", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("quick")

HALVES = MeshSettings(fsdp=2)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"fsdp": 0}, ["fsdp must be at least 1, got 0"]),
        ({"data": -1}, ["data must be at least 0, got -1"]),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(UserError) as error:
        MeshSettings(**values)
    assert str(error.value).startswith(words[0])


@pytest.mark.parametrize("values, shape", [({}, (2, 1)), ({"fsdp": 2}, (1, 2)), ({"data": 2}, (2, 1))])
def test_meshes_hold_all_devices(values, shape):
    for mesh in (sharding.make_mesh(MeshSettings(**values)), sharding.local_mesh(MeshSettings(**values))):
        assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
        assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "values, words",
    [
        ({"fsdp": 3}, ["fsdp=3 needs a multiple of 3 devices, there are 2", "config.mesh.fsdp to 1 or 2"]),
        ({"fsdp": 4}, ["fsdp=4 needs a multiple of 4 devices, there are 2", "config.mesh.fsdp to 1 or 2"]),
        ({"fsdp": 2, "data": 3}, ["data=3 x fsdp=2 needs 6 devices, there are 2", "config.mesh.data to 1, or to 0"]),
        ({"data": 1}, ["data=1 x fsdp=1 needs 1 devices, there are 2", "config.mesh.data to 2, or to 0"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(values, words):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(MeshSettings(**values))
    assert all(word in str(error.value) for word in ["config.mesh:", *words]), error.value


def test_a_local_mesh_fits_any_machine():
    """A workdir that was trained on eight devices is sampled from on two, or on one."""
    assert dict(sharding.local_mesh(MeshSettings(fsdp=8, data=4)).shape) == {"data": 1, "fsdp": 2}
    assert dict(sharding.local_mesh(MeshSettings(fsdp=3)).shape) == {"data": 2, "fsdp": 1}


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((3, 3, 4, 8), (None, None, None, "fsdp")),
        ((3, 3, 8, 4), (None, None, "fsdp")),
        ((7, 4), (None, "fsdp")),  # the longest does not divide
        ((6,), ("fsdp",)),
        ((3, 5), ()),
        ((), ()),
        ((0,), ()),
    ],
)
def test_a_parameter_is_split_along_its_longest_axis_that_divides(shape, spec):
    assert sharding.param_sharding(shape, sharding.make_mesh(HALVES)).spec == PartitionSpec(*spec)
    assert sharding.param_sharding(shape, sharding.make_mesh()).spec == PartitionSpec()


@pytest.mark.parametrize("kind", [np.asarray, jax.numpy.asarray])
def test_placed_parameters_keep_their_values(kind):
    mesh = sharding.make_mesh(HALVES)
    params = {"kernel": kind(np.arange(24, dtype=np.float32).reshape(3, 8)), "scale": kind(np.float32(2))}
    placed = sharding.place(params, mesh)
    tiny.assert_same_bits(jax.device_get(placed), jax.device_get(params))
    assert placed["kernel"].addressable_data(0).shape == (3, 4)
    assert placed["scale"].sharding.is_fully_replicated
    assert sharding.mesh_of(placed) == mesh
    assert sharding.mesh_of(sharding.place(params, sharding.make_mesh())) is None
    whole = sharding.replicate(params, mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
    tiny.assert_same_bits(jax.device_get(whole), jax.device_get(params))


def test_shapes_are_placed_too():
    shapes = {"kernel": jax.ShapeDtypeStruct((3, 8), np.float16)}
    mesh = sharding.make_mesh(HALVES)
    placed = sharding.place(shapes, mesh)["kernel"]
    assert placed.sharding.spec == PartitionSpec(None, "fsdp") and placed.dtype == np.float16


@pytest.mark.parametrize("settings", [MeshSettings(), HALVES])
def test_a_batch_is_split_over_all_devices(settings):
    mesh = sharding.make_mesh(settings)
    rows = sharding.local_rows(mesh, 4)
    np.testing.assert_array_equal(rows, np.arange(4))
    batch = {"image": np.arange(12).reshape(4, 3), "key": jax.random.split(jax.random.key(0, impl="rbg"), 4)}
    found = sharding.split_batch({name: value[rows] for name, value in batch.items()}, mesh)
    assert found["image"].sharding == sharding.batch_sharding(mesh)
    assert [shard.data.shape for shard in found["image"].addressable_shards] == [(2, 3), (2, 3)]
    np.testing.assert_array_equal(found["image"], batch["image"])
    assert found["key"].dtype == batch["key"].dtype
    np.testing.assert_array_equal(*map(jax.random.key_data, (found["key"], batch["key"])))


@pytest.mark.parametrize(
    "size, accumulate, words",
    [
        (5, 1, ["must be a multiple of the 2 devices, such as 4 or 6"]),
        (1, 1, ["such as 2"]),
        (0, 1, ["such as 2"]),
        (6, 2, ["2 devices x 2 parts, such as 4 or 8"]),
    ],
)
def test_batch_sizes_that_fit_are_named(size, accumulate, words):
    mesh = sharding.make_mesh()
    with pytest.raises(UserError) as error:
        sharding.check_batch_size(size, mesh, "config.train.batch_size", accumulate)
    assert all(word in str(error.value) for word in [f"config.train.batch_size={size}", *words]), error.value
    for fits in (2, 8):
        sharding.check_batch_size(fits * accumulate, mesh, accumulate=accumulate)


def test_loading_puts_each_tensor_before_the_next_is_read(base_path):
    mesh, read = sharding.make_mesh(HALVES), []

    def put(tensor):
        assert isinstance(tensor, np.ndarray)
        read.append(sharding.place(tensor, mesh))
        return read[-1]

    base = load_base(base_path, put=put)
    leaves = jax.tree.leaves(base.params)
    assert set(map(id, leaves)) == set(map(id, read))
    assert base.fingerprint == load_base(base_path).fingerprint
    tiny.assert_same_bits(jax.device_get(base.params), jax.device_get(load_base(base_path).params))


@pytest.mark.parametrize("rows", [4, 1])
def test_gathered_parameters_are_whole_and_rows_stay_split(rows):
    """Values and gradients are those of whole parameters; one row, which cannot be split, is no error."""
    mesh = sharding.make_mesh(HALVES)
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(rows, 3)).astype(np.float32)

    def network(w, x, mesh):
        w, x = sharding.gather(w, x, mesh)
        return sharding.keep_split(jax.numpy.tanh(x @ w), mesh)

    step = jax.jit(jax.value_and_grad(lambda x, w, mesh: network(w, x, mesh).sum()), static_argnums=2)
    for found, expected in zip(step(x, sharding.place(w, mesh), mesh), step(x, w, None), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    out = jax.jit(network, static_argnums=2)(sharding.place(w, mesh), x, mesh)
    assert out.addressable_data(0).shape == (max(rows // 2, 1), 6)


@pytest.mark.slow
def test_a_split_base_is_the_base(sd_path, base_path):
    """On eight devices, in groups of four: see sharding_check.py."""
    env = tiny.environment(devices=8) | {"PYTHONPATH": str(tiny.ROOT)}
    check = os.path.join(os.path.dirname(__file__), "sharding_check.py")
    done = tiny.run_process([sys.executable, check, str(sd_path), str(base_path)], env=env)
    assert done.status == 0, done.err
    report = json.loads(done.out.splitlines()[-1])
    print(report)
    assert report["devices"] == 8 and report["share"] <= 0.3
    assert report["excess"] < 100  # bytes, while it is loaded: a key
    assert report["collectives"] == ["all-gather"] and report["split"]  # of parameters: rows stay where they are
    # Of float32, with one row a device in place of eight; a base with random parameters rounds more than a trained one.
    assert all(difference < 3e-6 for difference in report["differences"].values())
