"""Trials that train together are the runs that they would be by themselves: curves, params, workdirs, resuming."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_training import _hook, _kill, _Killed, _signal

from mcm_jax import config as config_lib
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.training import loop, train_and_evaluate
from mcm_jax.training.together import TOGETHER_KEYS, train_together

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

SAME = {
    **{"data.size": 12, "draws.count": 2, "cache.mode": "build", "cache.batch_size": 4, "mcm.channels": 4},
    **{"mcm.multipliers": (1,), "mcm.attention": (0,), "mcm.groups": 2},
    **{"train.steps": 30, "train.log_every": 1, "train.checkpoint_every": 7, "train.held_out": 4},
    **{"train.validate_every": 0, "train.evaluate_every": 10, "train.best": "held_out_loss"},
}
TRIALS = (
    {"train.learning_rate": 3e-3, "loss.weighting": "x0", "train.weight_decay": 0.0, "train.warmup_steps": 40},
    {"seed": 1, "loss.weighting": "min_snr", "loss.snr_gamma": 3.0, "loss.l1": 0.15, "train.warmup_steps": 5},
    {"modalities.drop_rate": 0.6, "train.weight_decay": 0.2, "train.warmup_steps": 0, "train.ema_decay": 0.5},
)


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny", seed=0, size=8)


def settings_of(base, changes):
    return tiny.settings_of(tiny.make_config(base, SAME | changes))


@pytest.fixture(scope="module")
def runs(small_path, tmp_path_factory):
    """Settings of the trials, and the workdirs of their serial runs."""
    root = tmp_path_factory.mktemp("serial")
    trials = [settings_of(small_path, {"cache.path": str(root / "cache")} | changes) for changes in TRIALS]
    workdirs = [root / str(i) for i in range(len(trials))]
    with tiny.quick_compiling():
        for settings, workdir in zip(trials, workdirs, strict=True):
            train_and_evaluate(config_lib.to_dict(settings), workdir)
    return list(zip(trials, workdirs, strict=True))


def files(workdir):
    """Names of what is in a workdir, but for what TensorBoard and Orbax make of the time and of their own."""
    names = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file()}
    return {name for name in names if not name.startswith(("tensorboard/", "checkpoints/"))} | {
        f"checkpoints/{p.name}" for p in (workdir / "checkpoints").iterdir()
    }


def assert_same_run(found, expected, largest=1e-5):
    lines, wanted = tiny.metrics_of(found), tiny.metrics_of(expected)
    assert [(line["step"], sorted(line)) for line in lines] == [(line["step"], sorted(line)) for line in wanted]
    differences = {k: max(abs(a[k] - b[k]) for a, b in zip(lines, wanted, strict=True) if k in b) for k in wanted[0]}
    print(f"{found}: largest differences {differences}")
    for a, b in zip(lines, wanted, strict=True):
        np.testing.assert_allclose([a[k] for k in sorted(a)], [b[k] for k in sorted(b)], atol=largest)
    assert np.ptp([line["loss"] for line in wanted if "loss" in line]) > 1e-2
    assert files(found) == files(expected)
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    for name in ("mcm.safetensors", "best/mcm.safetensors"):
        if not (expected / name).exists():
            continue
        params, others = load_file(found / name), load_file(expected / name)
        print(f"{name}: {max(np.abs(params[k] - others[k]).max() for k in others)}")
        assert params.keys() == others.keys()
        assert all(np.allclose(params[k], others[k], atol=largest, rtol=0) for k in others)


@pytest.mark.parametrize("width", [1, 2])
def test_each_is_its_serial_run(runs, tmp_path, width):
    """Two seeds, and every key that may differ, 30 steps, float32: one trial, and two, on a device at a time."""
    trials = [(settings, tmp_path / str(i)) for i, (settings, _) in enumerate(runs)]
    assert {key for changes in TRIALS for key in changes} == TOGETHER_KEYS
    train_together(trials, width=width)
    for (_, found), (_, expected) in zip(trials, runs, strict=True):
        assert_same_run(found, expected)
