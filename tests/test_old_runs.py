"""What landed versions wrote goes on as with them; on the kind of machine that wrote it, training bit for bit."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.slow

OLD = tiny.ROOT / "tests/fixtures/v0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text())


def _is_the_same_machine():
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"jax": jax.__version__, "cpu": names[0] if names else ""} == EXPECTED["made_on"]


def assert_as_before(found, expected, name="", rounding=0.0):
    """Numbers of any structure, equal up to rounding where the machine is the one that wrote them."""
    if isinstance(expected, dict):
        # An evaluation had an empty table of what nothing measured.
        expected = {key: value for key, value in expected.items() if not (isinstance(value, dict) and not value)}
        assert set(expected) <= set(found), set(expected) - set(found)
        for key, value in expected.items():
            assert_as_before(found[key], value, f"{name}/{key}", rounding)
    elif isinstance(expected, list):
        assert len(found) == len(expected), name
        for i, value in enumerate(expected):
            assert_as_before(found[i], value, f"{name}/{i}", rounding)
    elif isinstance(expected, str | None):
        assert found == expected, name
    elif _is_the_same_machine():
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding, err_msg=name)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder that tests/old_runs_program.py fills, compiled as then: conftest.py's flags round otherwise."""
    folder = tmp_path_factory.mktemp("old")
    env = tiny.environment() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["PYTHONPATH"] = f"{tiny.ROOT}:{tiny.ROOT / 'tests'}"
    done = tiny.run_process([sys.executable, "tests/old_runs_program.py", str(folder)], timeout=600, env=env)
    assert done.status == 0, done.err
    return folder


def test_a_run_goes_on(found):
    """Resumed at step 3 with the config that its command made then, it ends as it would have."""
    with np.load(found / "found.npz") as ours, np.load(OLD / "expected.npz") as theirs:
        assert set(ours.files) == set(theirs.files)
        assert_as_before(*({name: file[name] for name in file.files if name != "samples"} for file in (ours, theirs)))
    assert_as_before(tiny.metrics_of(found / "run"), EXPECTED["metrics.jsonl"])


# Samplers are tables in float64 now, summed in another order: 2e-6 was seen in pictures of [-1, 1].
ROUNDING = 1e-5


def test_an_mcm_samples(found):
    with np.load(found / "found.npz") as ours, np.load(OLD / "expected.npz") as theirs:
        assert_as_before(ours["samples"], theirs["samples"], rounding=ROUNDING)


def test_an_mcm_is_evaluated(found):
    expected = {k: v for k, v in EXPECTED["evaluation"].items() if k not in ("versions", "device")}
    assert_as_before(json.loads((found / "metrics.json").read_text()), expected, rounding=ROUNDING)
