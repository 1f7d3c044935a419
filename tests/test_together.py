"""Trials that train together are the runs that they would be by themselves: curves, params, workdirs, resuming."""

import json
import signal

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_training import _hook, _kill, _Killed, _signal

from mcm_jax import config as config_lib
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import lock
from mcm_jax.sweep.run import groups_of, run_sweep
from mcm_jax.sweep.trials import read
from mcm_jax.training import loop, together, train_and_evaluate
from mcm_jax.training.together import TOGETHER_KEYS, train_together

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

SAME = tiny.SMALL | {
    **{"data.size": 12, "draws.count": 2, "cache.mode": "build"},
    **{"train.steps": 30, "train.log_every": 1, "train.checkpoint_every": 7, "train.held_out": 4},
    **{"train.validate_every": 0, "train.evaluate_every": 10, "train.best": "held_out_loss"},
}
TRIALS = (
    {"train.learning_rate": 3e-3, "loss.weighting": "x0", "train.weight_decay": 0.0, "train.warmup_steps": 40},
    {"seed": 1, "loss.weighting": "min_snr", "loss.snr_gamma": 3.0, "loss.l1": 0.15, "train.warmup_steps": 5},
    {"modalities.drop_rate": 0.6, "train.weight_decay": 0.2, "train.warmup_steps": 0, "train.ema_decay": 0.5},
)


def settings_of(base, changes):
    return tiny.settings_of(tiny.make_config(base, SAME | changes))


@pytest.fixture(scope="module", autouse=True)
def gaps():
    """Examples that lack modalities, as the hardest data."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.leave_gaps(patch)
        yield


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


def assert_same_run(found, expected):
    """Reports and held-out losses within 1e-5, and the same files.

    Params are not compared: where a gradient is 0 but for rounding, Adam makes whole updates of it.
    """
    lines, wanted = tiny.metrics_of(found), tiny.metrics_of(expected)
    assert [(line["step"], sorted(line)) for line in lines] == [(line["step"], sorted(line)) for line in wanted]
    for a, b in zip(lines, wanted, strict=True):
        np.testing.assert_allclose([a[k] for k in sorted(a)], [b[k] for k in sorted(b)], atol=1e-5)
    assert np.ptp([line["loss"] for line in wanted if "loss" in line]) > 1e-2
    assert files(found) == files(expected)
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    params, others = (load_file(folder / "mcm.safetensors") for folder in (found, expected))
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in others.items()}


def test_each_is_its_serial_run(runs, tmp_path):
    """Every key that may differ, two seeds, 30 steps in float32; two trials a device, the last one filled up."""
    trials = [(settings, tmp_path / str(i)) for i, (settings, _) in enumerate(runs)]
    assert {key for changes in TRIALS for key in changes} == TOGETHER_KEYS
    train_together(trials, width=2)
    for (_, found), (_, expected) in zip(trials, runs, strict=True):
        assert_same_run(found, expected)


def test_killed_stopped_and_with_one_that_diverges_a_sweep_is_its_serial_runs(
    runs, small_path, tmp_path, monkeypatch, capsys
):
    """One trial a device: more calls a step than one, as on CPUs. In between, another process holds the first trial."""
    path, workdir, original = tmp_path / "sweep.py", tmp_path / "run", loop.tqdm
    diverging = {"train.learning_rate": 1e30, "train.warmup_steps": 0}
    path.write_text(f"def get_hyper(): return {[*TRIALS, diverging]}")
    config = tiny.make_config(small_path, SAME | {"cache.path": runs[0][0].cache.path})
    _hook(monkeypatch, 12, _kill)
    with pytest.raises(_Killed):
        run_sweep(config, path, workdir)
    assert "1 diverged, 3 unfinished" in (workdir / "results.md").read_text()  # a look in the middle
    monkeypatch.setattr(loop, "tqdm", original)
    _hook(monkeypatch, 20, _signal(signal.SIGINT))
    held = next(workdir.glob("000_*"))
    with (
        lock(held, "training in this workdir", "--workdir"),
        pytest.raises(Interrupted, match="the states of all trials are saved"),
    ):
        run_sweep(config, path, workdir)
    monkeypatch.setattr(loop, "tqdm", original)
    found = run_sweep(config, path, workdir)
    assert [o.status for o in found] == ["done", "done", "done", "diverged"]
    printed = capsys.readouterr().out
    assert f"{held}: another process trains it" in printed
    assert "2 MCMs of" in printed and "going on from step 10; some are ahead, up to step 20" in printed
    for outcome, (_, expected) in zip(found, runs, strict=False):
        folder = workdir / outcome.trial.name
        assert (folder / "checkpoints").is_dir()
        assert_same_run(folder, expected)
    assert json.loads((workdir / found[3].trial.name / "diverged.json").read_text())["examples"]


def test_what_trains_at_a_time(small_path):
    def numbers(hyper, mode):
        config = tiny.make_config(small_path, SAME | {"cache.path": "cache"})
        trials = read(config, tiny.settings_of(config), hyper)
        return [[trial.number for trial in group] for group in groups_of(trials, mode)]

    hyper = [{"mcm.channels": c, "seed": s} for s in (0, 1) for c in (4, 8)] + [{"train.steps": 31}]
    assert numbers(hyper, "auto") == [[0, 2], [1, 3], [4]]
    assert numbers(hyper, "serial") == [[0], [1], [2], [3], [4]]
    assert numbers(hyper[::2], "serial") == [[0], [1], [2]]
    with pytest.raises(
        UserError, match="sweep_mode=together: trials differ in mcm.channels, train.steps; those of one program"
    ):
        numbers(hyper, "together")
    assert numbers(hyper[::2][:2], "together") == [[0, 1]]
    assert numbers([h | {"train.wandb": "p"} for h in hyper[::2][:2]], "auto") == [[0], [1]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.steps": 31}, "trials differ in train.steps; those of one program may in loss.l1, "),
        ({"cache.path": ""}, "cache.path: found '', a cache in each workdir"),
        ({"train.wandb": "project"}, "train.wandb: found 'project', expected ''"),
    ],
)
def test_what_one_program_cannot_hold_is_refused(small_path, tmp_path, changes, words):
    first = SAME | {"cache.path": "cache"} | ({} if "train.steps" in changes else changes)
    trials = [settings_of(small_path, first), settings_of(small_path, first | changes | {"seed": 1})]
    with pytest.raises(UserError, match=words):
        train_together([(settings, tmp_path / str(i)) for i, settings in enumerate(trials)])
    assert not list(tmp_path.iterdir())


def test_states_that_no_device_holds_are_told_with_the_way_out(runs, tmp_path, monkeypatch):
    def stacked(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(together, "stacked", stacked)
    with pytest.raises(UserError, match="memory does not hold the trials' states .*--sweep_mode=serial"):
        train_together([(settings, tmp_path / str(i)) for i, (settings, _) in enumerate(runs)], width=2)
