"""What landed versions wrote goes on as it did with them; on the kind of machine that wrote it, bit for bit."""

import json
import pathlib
import shutil

import jax
import ml_collections
import numpy as np
import pytest
import tiny
from flax import traverse_util
from jax.sharding import AxisType

from mcm_jax import sharding
from mcm_jax.evaluation.evaluate import evaluate
from mcm_jax.generate import generate
from mcm_jax.training import train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

OLD = tiny.ROOT / "tests/fixtures/v0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())
MAPS = {name: str(tiny.ROOT / f"docs/examples/{name}.png") for name in ("segmentation", "sketch")}


def _is_the_same_machine():
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"jax": jax.__version__, "cpu": names[0] if names else ""} == EXPECTED["made_on"]


def assert_as_before(found, expected, name=""):
    """Numbers of any structure, equal to the bit where the machine is the one that wrote them."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), set(expected) - set(found)
        for key, value in expected.items():
            assert_as_before(found[key], value, f"{name}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for i, value in enumerate(expected):
            assert_as_before(found[i], value, f"{name}/{i}")
    elif isinstance(expected, str | None) or _is_the_same_machine():
        np.testing.assert_array_equal(found, expected, err_msg=name)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_run_goes_on(tmp_path):
    """Resumed at step 3 with the config that its command made then, it ends as it would have."""
    workdir = shutil.copytree(OLD / "workdir", tmp_path / "run")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    end = jax.device_get(train_and_evaluate(config, workdir))
    found = traverse_util.flatten_dict({"params": end.params, "ema_params": end.ema_params}, sep="/")
    with np.load(OLD / "expected.npz") as file:
        assert_as_before(found, {name: file[name] for name in file.files if name != "samples"})
    assert_as_before(tiny.metrics_of(workdir), EXPECTED["metrics.jsonl"])


@pytest.fixture
def one_device(monkeypatch):
    """As then: a batch over two devices is rounded otherwise."""
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
    monkeypatch.setattr(sharding, "local_mesh", lambda settings=None: mesh)


@pytest.mark.usefixtures("one_device")
def test_an_mcm_samples(tmp_path):
    images = generate(str(OLD / "mcm"), MAPS, tmp_path, num_samples=2, seed=5, steps=3)
    with np.load(OLD / "expected.npz") as file:
        assert_as_before(images, file["samples"])


@pytest.mark.usefixtures("one_device")
def test_an_mcm_is_evaluated(tmp_path):
    found = evaluate(str(OLD / "mcm"), tmp_path / "metrics.json")
    expected = {k: v for k, v in EXPECTED["evaluation"].items() if k not in ("versions", "device")}
    assert_as_before(found, expected)
