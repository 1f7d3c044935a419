"""Sweeps: what is wrong is told before the first trial, and however one was stopped, it ends as if it had not been."""

import contextlib
import csv
import dataclasses
import errno
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tiny
from absl import flags
from ml_collections import config_flags
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from test_training import _kill, _Killed, _signal

from configs import folder as folder_config
from configs import scenes
from mcm_jax import config as config_lib
from mcm_jax import sweep
from mcm_jax.errors import Busy, Interrupted, UserError
from mcm_jax.files import lock
from mcm_jax.modalities import Modality
from mcm_jax.sweep import folder as folders
from mcm_jax.sweep import outcomes, plots, results, run, trials
from mcm_jax.sweep.run import run_sweep
from mcm_jax.training import caching, loop, read_run, step, train_and_evaluate
from mcm_jax.training import settings as settings_lib
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.actions import Diverged

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

# Two seeds at one rate, one at another.
SWEEP = """
from mcm_jax import sweep

def get_hyper():
    return sweep.product(
        [{"train.learning_rate": 1e-3}], sweep.values("seed", [0, 1])
    ) + [{"train.learning_rate": 2e-3, "seed": 0}]
"""
# The same by another label, and with a key that may change in a run.
RENAMED = """
from mcm_jax import sweep

def get_hyper():
    return sweep.product(
        [{"train.log_every": 7}],
        sweep.choices("rate", {"low": {"train.learning_rate": 1e-3}}),
        sweep.values("seed", [0, 1]),
    ) + [{"train.learning_rate": 2e-3, "seed": 0, "train.log_every": 7}]
"""
ROWS = [(0.001, 0), (0.001, 1), (0.002, 0)]
NAMES = [f"{i:03d}_learning_rate={rate}_seed={seed}" for i, (rate, seed) in enumerate(ROWS)]
CHANGES = {
    "train.validate_every": 0,
    "train.log_every": 1,
    "train.steps": 4,
    "train.checkpoint_every": 2,
    **tiny.SMALL,
    "cache.mode": "build",
}


def small(base, changes=()):
    return tiny.make_config(base, CHANGES | dict(changes))


def serially(*args, **kwargs):
    """One trial after the other, which is what these tests look at."""
    return run_sweep(*args, mode="serial", **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


def save(folder, text=SWEEP, name="sweep.py"):
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture(scope="module")
def whole(small_path, folder):
    """The sweep without a break."""
    serially(small(small_path), save(folder), folder / "whole")
    return folder / "whole"


def table(workdir):
    with (workdir / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in tiny.PACE} for row in csv.DictReader(file)]


# --- what a sweep file says -----------------------------------------------------------------------------------------


def test_helpers_make_lists_of_overrides():
    rates, seeds = sweep.values("train.learning_rate", [1e-3, 2e-3]), sweep.values("seed", [0, 1])
    assert sweep.product(rates, seeds) == [
        {"train.learning_rate": rate, "seed": seed} for rate in (1e-3, 2e-3) for seed in (0, 1)
    ]
    assert sweep.zipped(rates, seeds) == [
        {"train.learning_rate": 1e-3, "seed": 0},
        {"train.learning_rate": 2e-3, "seed": 1},
    ]
    with pytest.raises(UserError, match="sets seed twice"):
        sweep.product(seeds, seeds)
    with pytest.raises(UserError, match="of one length, got 2, 1"):
        sweep.zipped(rates, seeds[:1])


def test_a_search_is_repeatable_and_stays_in_its_bounds():
    of = {"a": sweep.log_uniform(1e-4, 1e-2), "b": sweep.uniform(0, 0.5), "c": sweep.choice("x", "y")}
    found = sweep.search(200, of, seed=3)
    assert found[:20] == sweep.search(20, of, seed=3) != sweep.search(20, of, seed=4)
    assert all(1e-4 <= t["a"] <= 1e-2 and 0 <= t["b"] <= 0.5 for t in found)
    assert 70 < sum(t["a"] < 1e-3 for t in found) < 130 and {t["c"] for t in found} == {"x", "y"}
    with pytest.raises(UserError, match="above 0"):
        sweep.log_uniform(0, 1)


def _read(hyper, changes=()):
    config = small("nowhere", changes)
    return trials.read(config, tiny.settings_of(config), hyper)


def test_folders_are_short_safe_and_say_what_differs():
    hyper = sweep.product(
        [{"train.evaluate_every": 2}],
        sweep.choices("form", {"the paper's / eps": {"loss.weighting": "eps"}, "x" * 200: {}}),
        sweep.values("mcm.inputs", [("x_t", "eps"), ("eps",)]),
        sweep.values("draws.seed", [0, 1]),
    )
    found = _read(hyper)
    assert found[0].name == "000_form=the-paper-s-eps_inputs=x_t-eps_draws.seed=0"
    assert all(re.fullmatch(r"[\w.=+-]{1,100}", t.name) for t in found) and len({t.name for t in found}) == 8
    assert found[0].settings.loss.weighting == "eps" and found[4].settings.loss.weighting == "v"
    assert found[3].settings.mcm.inputs == ("eps",) and found[3].settings.draws.seed == 1
    assert all(t.settings.train.evaluate_every == 2 for t in found)
    # A trial that leaves a key alone has the config's value.
    assert [t.labels for t in _read([{}, {"train.steps": 5}])] == [{"steps": 4}, {"steps": 5}]
    # Or its choice's.
    hyper = sweep.choices("form", {"paper": {"train.learning_rate": 1e-5}}) + sweep.values("train.learning_rate", [0.1])
    assert [t.labels["learning_rate"] for t in _read(hyper)] == [1e-5, 0.1]


def test_a_trial_takes_what_the_command_line_takes():
    depth = {"modalities.depth.kind": "map", "modalities.depth.channels": 1, "evaluation.judges.depth": "none"}
    hyper = [{}, {"modalities.sketch.kind": "none"}, depth]
    found = _read(hyper, {"data.name": "folder", "data.path": "data"})
    names = [[m.name for m in t.settings.modalities.shown] for t in found]
    assert names == [["segmentation", "sketch"], ["segmentation"], ["depth", "segmentation", "sketch"]]
    assert found[1].overrides == hyper[1] and found[1].labels["modalities.sketch.kind"] == "none"
    assert found[2].settings.evaluation.judges["depth"] == "none"
    numpy = {"seed": np.int64(3), "mcm.inputs": np.array(["eps"]), "train.learning_rate": np.float64(0.5)}
    assert _read([numpy])[0].overrides == {"seed": 3, "mcm.inputs": ["eps"], "train.learning_rate": 0.5}


def test_each_trial_has_the_modalities_of_its_own_folder(tmp_path, monkeypatch):
    """Also when the sweep goes on, its data gone."""
    looked = []

    def discover(path, said, share):
        looked.append(path)
        m = Modality("areas", said.get("areas", {}).get("kind", "labels"), {"a": 3, "b": 5}[path])
        return types.SimpleNamespace(findings=[types.SimpleNamespace(modality=m)])

    monkeypatch.setattr(settings_lib, "discover", discover)
    config = folder_config.get_config()
    config.data.path = "a"
    base = read_run(config)
    hyper = [{"modalities.areas.kind": "map"}, {"data.path": "b"}, {"seed": 1}, {}]
    found = trials.read(config, base, hyper)
    shown = [(m.kind, m.channels) for t in found for m in t.settings.modalities.shown]
    assert shown == [("map", 3), ("labels", 5), ("labels", 3), ("labels", 3)] and looked == ["a", "a", "b"]
    folders.claim(base, found, tmp_path)
    assert folders.find(tmp_path) is None
    (tmp_path / found[0].name).mkdir()
    config_lib.save(found[0].settings, tmp_path / found[0].name)
    begun = folders.find(tmp_path)
    assert begun.base == base and begun.trials == [t.settings for t in found]
    assert trials.read(config, read_run(config, known=begun.base.modalities.shown), hyper, begun.trials) == found
    assert len(looked) == 3
    # Older sweeps had the config's modalities, but for what a trial overrides of them.
    content = json.loads((tmp_path / "sweep.json").read_text())
    for entry in content["trials"]:
        del entry["modalities"]
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert [t.modalities.shown[0].channels for t in folders.find(tmp_path).trials] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "hyper, words",
    [
        ([{}, {"train.stepz": 5}], r"trial 1 of the sweep \(train.stepz=5\): config.train.stepz: unknown key, meant"),
        ([{}, {"trian.steps": 5}], "trial 1 .*config.trian.steps: unknown key"),
        ([{"mcm": {"channels": 8}}], "trial 0 .*config.mcm: unknown key"),
        ([{"seed": 1}, {"train.steps": 1.5}], r"trial 1 .*config.train.steps must be a whole number, got 1.5"),
        ([{"train.steps": 0}], "trial 0 .*config.train.steps must be at least 1"),
        ([{"train.learning_rate": "1e-3"}], "trial 0 .*train.learning_rate must be a number, got '1e-3'"),
        ([{"seed": 1}, {}, {"seed": 1}], "trials 0 and 2 of the sweep are the same: seed=1 and seed=1"),
        ([{}, {"seed": 0}], "trials 0 and 1 of the sweep are the same: nothing overridden and seed=0"),
        ([{"form": sweep.Choice("a", {"seed": 1}), "seed": 2}], "trial 0 of the sweep sets seed twice"),
        ([{}, {"data.discover": True}], r"trial 1 .*data.discover holds for all .*say --config.data.discover"),
        (
            [{"form": sweep.Choice(name, {"train.steps": steps})} for name, steps in (("a", 5), ("b", 6), ("a", 7))],
            "trials 0 and 2 of the sweep .000_form=a, 002_form=a. have the same labels, but differ in train.steps",
        ),
    ],
)
def test_all_trials_are_checked_and_named(hyper, words):
    with pytest.raises(UserError, match=words):
        _read(hyper)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["it has no get_hyper()", "docs/sweeps.md"]),
        ("def get_hyper(): return []", ["a list of dicts"]),
        ("def get_hyper(): return [{1: 2}]", ["a list of dicts"]),
        ("def get_hyper(): return 1 / 0", ["ZeroDivisionError"]),
        ("METRIC = 3\ndef get_hyper(): return [{}]", ["METRIC", "3"]),
        ("def get_hyper(): return [{'train.stepz': 5}]", ["trial 0", "config.train.stepz", "train.steps"]),
        ("def get_hyper(): return [{'seed': 1}, {'mcm.groups': 3}]", ["trial 1", "3 groups"]),
        ("def get_hyper(): return [{'seed': 1}, {'sampling.steps': 1001}]", ["trial 1", "got 1001"]),
    ],
)
def test_a_bad_sweep_is_explained_and_writes_nothing(script, small_path, tmp_path, text, words):
    path = save(tmp_path, text)
    flags = [*tiny.config_flags(small_path, CHANGES), f"--sweep={path}", f"--workdir={tmp_path / 'run'}"]
    assert script("train.py", *flags).explains(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sweep=nowhere.py"], ["nowhere.py", "get_hyper()"]),
        (["--sweep={sweep}", "--sweep_index=3"], ["--sweep_index=3", "3 trials, 0 to 2"]),
        (["--sweep={sweep}", "--sweep_index=-1"], ["--sweep_index=-1", "3 trials"]),
        (["--sweep={sweep}", "--sweep_width=0"], ["--sweep_width=0", "at least 1"]),
        (["--sweep={sweep}", "--sweep_width=2", "--sweep_mode=serial"], ["--sweep_width=2", "--sweep_mode=serial"]),
        (["--sweep={sweep}", "--sweep_width=2", "--sweep_index=1"], ["--sweep_width=2", "--sweep_index=1"]),
        (["--sweep={sweep}", "--sweep_mode=together", "--sweep_index=1"], ["--sweep_index=1", "together"]),
        (["--sweep_index=1"], ["--sweep_index goes with --sweep"]),
        (["--sweep={sweep}", "--profile=1:2"], ["sweep", "profile"]),
        (["--sweep={sweep}", "--sweep_mode=parallel"], ["sweep_mode", "together"]),
    ],
)
def test_bad_flags_of_a_sweep_are_explained_and_write_nothing(script, small_path, folder, tmp_path, flags, words):
    flags = [flag.format(sweep=save(folder)) for flag in flags]
    workdir = tmp_path / "run"
    assert script("train.py", *tiny.config_flags(small_path, CHANGES), *flags, f"--workdir={workdir}").explains(*words)
    assert not workdir.exists()


def test_one_path_is_not_for_two_caches(small_path, tmp_path):
    path = save(tmp_path, "def get_hyper(): return [{'draws.count': 3}, {'draws.count': 4}]")
    with pytest.raises(UserError, match=r"(?s)cache.path=.* trial 0 \(count=3\) and trial 1 \(count=4\) need one each"):
        run_sweep(small(small_path, {"cache.path": str(tmp_path / "cache")}), path, tmp_path / "run")


# --- its runs -------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_ordinary_workdirs_one_cache_and_results(whole, small_path, tmp_path):
    assert sorted(p.name for p in whole.iterdir() if re.match(r"\d", p.name)) == NAMES
    assert len(list((whole / "cache").iterdir())) == 1  # and none in the trials
    assert not [p for name in NAMES for p in (whole / name).glob("cache*")]
    rows = table(whole)
    assert [(row["workdir"], row["status"], row["step"]) for row in rows] == [(name, "done", "4") for name in NAMES]
    for row, (rate, _) in zip(rows, ROWS, strict=True):
        assert float(row["learning_rate"]) == rate != float(row["last learning_rate"])
        assert float(row["loss"]) == tiny.metrics_of(whole / row["workdir"])[-1]["loss"]
    # The second one is what it is when it trains alone.
    changes = {"seed": 1, "cache.path": str(next((whole / "cache").iterdir()))}
    train_and_evaluate(small(small_path, changes), tmp_path / "alone")
    assert tiny.metrics_of(tmp_path / "alone") == tiny.metrics_of(whole / NAMES[1])


def test_the_report_averages_seeds_and_names_the_best(whole):
    losses = [float(row["loss"]) for row in table(whole)]
    text = (whole / "results.md").read_text()
    mean, spread = sum(losses[:2]) / 2, abs(losses[0] - losses[1]) / 2**0.5
    lines = {mean: f"| 0.001 | {mean:.4g} ± {spread:.4g} | 0, 1 |", losses[2]: f"| 0.002 | {losses[2]:.4g} | 2 |"}
    for place, score in enumerate(sorted(lines), 1):
        assert f"| {place} {lines[score]}" in text
    best = 2 if losses[2] < mean else int(losses[1] < losses[0])
    rate, seed = ROWS[best]
    assert f"--config.train.learning_rate={rate} --config.seed={seed}" in text
    assert f"sample.py --workdir={whole}/{NAMES[best]} --segmentation=" in text
    assert "3 trials: 3 done" in text and "`loss`" in text


def test_the_metric_is_the_files_or_the_first_that_all_have(whole, folder):
    found = outcomes.collect(_read(trials.load(save(folder))[0]), whole)
    assert outcomes.metric_of(found, None) == "loss" and outcomes.metric_of(found, "mse") == "mse"
    # What has not measured it is not ranked, and nothing else is held up.
    text = results.summary(found, whole, outcomes.metric_of(found, "edge_f1"), ["train.py"])
    assert re.search(r"done without a finite `edge_f1`: trials 0, 1, 2\. METRIC may be one of .*mse_of_base", text)
    assert "done without" not in results.summary(found, whole, "loss", ["train.py"])
    # Nor does an older number stand for the MCM at the end.
    older = dataclasses.replace(found[0], reports=[{"step": 2, "mean_iou": 0.9}, *found[0].reports])
    assert older.score("mean_iou") is None and older.score("loss") == found[0].score("loss")
    assert dataclasses.replace(older, status="unfinished").numbers["mean_iou"] == 0.9
    # Seeds are averaged before settings are ranked: the best trial need not be the highest of all.
    scored = [
        dataclasses.replace(o, reports=[*o.reports, {"step": 4, "held_out_loss": 1.0, "mean_iou": value}])
        for o, value in zip(found, (0.5, 0.9, 0.8), strict=True)
    ]
    assert outcomes.metric_of(scored, None) == "mean_iou"
    assert outcomes.metric_of([*scored[:2], found[2]], None) == "loss"  # all must have it
    rows = outcomes.settings_of(scored, "mean_iou")
    assert [row.mean for row in rows] == [0.8, pytest.approx(0.7)] and rows[1].spread == pytest.approx(0.4 / 2**0.5)
    assert outcomes.best_of(rows, "mean_iou").trial.number == 2
    unfinished = [dataclasses.replace(scored[0], status="unfinished"), *scored[1:]]
    assert outcomes.best_of(outcomes.settings_of(unfinished, "mean_iou"), "mean_iou").trial.number == 1


def test_losses_that_do_not_compare_are_pointed_out(tmp_path):
    found = outcomes.collect(_read(sweep.values("loss.weighting", ["v", "eps"])), tmp_path)
    results.write(found, tmp_path, "held_out_loss", ["python", "train.py"])
    assert "The trials differ in loss.weighting" in (tmp_path / "results.md").read_text()
    for key, values in (("modalities.drop_rate", [0.0, 0.3]), ("draws.offset", [0.0, 0.1])):
        found = outcomes.collect(_read(sweep.values(key, values)), tmp_path)
        results.write(found, tmp_path, "held_out_mse", ["python", "train.py"])
        text = (tmp_path / "results.md").read_text()
        assert f"The trials differ in {key}, and `held_out_mse` compares only" in text and "METRIC" not in text
    for key in ("data.seed", "train.held_out"):
        of_examples = outcomes.collect(_read(sweep.values(key, [5, 6])), tmp_path)
        results.write(of_examples, tmp_path, "held_out_loss", ["python", "train.py"])
        text = (tmp_path / "results.md").read_text()
        assert f"differ in {key}, and `held_out_loss` compares only where these are the same.\n" in text
    results.write(found, tmp_path, "mean_iou", ["python", "train.py"])
    text = (tmp_path / "results.md").read_text()
    assert "2 trials: 2 not begun" in text and "The trials differ" not in text and "The best" not in text


def test_tensorboard_shows_the_hyperparameters(whole):
    for i, (rate, seed) in enumerate(ROWS):
        (path,) = (whole / f"{i:03d}_learning_rate={rate}_seed={seed}/tensorboard").glob("*.hparams")
        data, found = path.read_bytes(), {}
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "hparams"
                found[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
        start = found["_hparams_/session_start_info"].session_start_info
        assert {k: v.number_value for k, v in start.hparams.items()} == {"learning_rate": rate, "seed": seed}
        tags = {m.name.tag for m in found["_hparams_/experiment"].experiment.metric_infos}
        assert {"loss", "mse"} <= tags and "_hparams_/session_end_info" in found


def test_hyperparameters_that_were_cut_off_are_written_again(tmp_path, monkeypatch):
    outcome = outcomes.Outcome(_read([{}])[0], "done", 4, [{"step": 4, "loss": 1.0}])
    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.event_file_writer.EventsWriter.close", lambda _: _kill())
        with pytest.raises(_Killed):
            results._write_hparams(outcome, tmp_path)
    for _ in range(2):
        results._write_hparams(outcome, tmp_path)
        (path,) = tmp_path.iterdir()
        assert path.suffix == ".hparams" and path.stat().st_size


def test_the_commands_of_the_best_are_typed_as_flags_are_read():
    """Tuples, quotes, spaces, and a modality that is left out."""
    hyper = {"mcm.inputs": ("x_t", "eps"), "train.wandb": 'it\'s "mine"', "evaluation.strengths": (1.5,)}
    hyper |= {"modalities.sketch.kind": "none", "data.name": "folder", "data.path": "my data"}
    (trial,) = _read([hyper])
    command = ["python", "train.py", *tiny.config_flags("nowhere", CHANGES)]
    alone, sample = results.commands(outcomes.Outcome(trial, "done", 4, []), pathlib.Path("a run"), command)
    argv, values = shlex.split(alone)[1:], flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", values)
    values(argv)
    assert read_run(holder.value) == trial.settings and values.workdir == "a run_best"
    assert shlex.split(sample)[3:-1] == ["--segmentation=PICTURE"]  # there is none of these data


def test_dollars_are_drawn_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    names = {"5$ or $\\less": {}, "$": {"train.steps": 5}}
    found = _read(sweep.product(sweep.choices("cost", names), sweep.choices("$\\x$", {"a": {}, "b": {"seed": 1}})))
    scored = [outcomes.Outcome(t, "done", 4, [{"step": 4, "loss": 1.0}]) for t in found]
    assert plots.draw(scored, tmp_path / "results.png", "loss")


def test_the_picture_is_drawn_or_said_to_be_left_out(whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "results.png" in (whole / "results.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plots._say.cache_clear()
    for _ in range(2):
        assert not plots.draw([], tmp_path / "results.png", "loss")
    assert capsys.readouterr().out.count("pip install 'mcm-jax[sweep]'") == 1


def _hook(monkeypatch, action, step=3):
    """Runs ``action`` in the middle of a step of the next run."""

    class Bar(loop.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == step:
                action()

    monkeypatch.setattr(loop, "tqdm", Bar)


def _begun(whole, folder, *missing):
    """A copy of the sweep that some trials are missing from."""
    shutil.copytree(whole, folder)
    for i in missing:
        shutil.rmtree(folder / NAMES[i])
    return folder


def test_killed_stopped_and_ended_by_a_job_array_it_is_the_uninterrupted_one(
    script, small_path, folder, whole, tmp_path, monkeypatch
):
    workdir, config, original = _begun(whole, tmp_path / "run", 1, 2), small(small_path), loop.tqdm
    first = tiny.contents(workdir / NAMES[0])
    _hook(monkeypatch, _kill)
    with pytest.raises(_Killed):
        serially(config, save(folder), workdir)
    assert not (workdir / NAMES[2]).exists()
    # The same command again: the second trial goes on, and so does the sweep.
    bars = []

    class Bar(original):
        def update(self, n=1):
            super().update(n)
            bars.append(self.n)
            if len(bars) == 5:  # two steps are left of the second trial
                _signal(2)()

    monkeypatch.setattr(loop, "tqdm", Bar)
    with pytest.raises(Interrupted, match=f"{NAMES[2]}. Go on with the same command"):
        serially(config, save(folder), workdir)
    monkeypatch.setattr(loop, "tqdm", original)
    assert [row["status"] for row in table(workdir)] == ["done", "done", "not begun"]
    flags = [*tiny.config_flags(small_path, CHANGES), f"--sweep={save(folder)}", f"--workdir={workdir}"]
    done = script("train.py", *flags, "--sweep_index=0")
    assert done.status == 0 and "2 done, 1 unfinished" in done.out and "MCM of" not in done.out
    done = script("train.py", *flags, "--sweep_index=2")
    assert done.status == 0 and "going on from step 3" in done.out and "best by loss: trial" in done.out
    assert table(workdir) == table(whole)
    assert all(tiny.metrics_of(workdir / name) == tiny.metrics_of(whole / name) for name in NAMES)
    assert tiny.contents(workdir / NAMES[0]) == first
    # The command that the report gives for the best is one that train.py reads.
    command = re.search(r"^python train.py (.*)$", (workdir / "results.md").read_text(), re.MULTILINE)[1]
    best = next(n for n in NAMES if f"`{n}`" in (workdir / "results.md").read_text())
    again = shlex.split(command.replace("run_best", f"run/{best}"))
    assert f"{best} is finished" in script("train.py", *again).out  # it is that trial's own config


def test_a_signal_in_a_trials_last_step_ends_the_sweep_after_it(small_path, folder, whole, tmp_path, monkeypatch):
    workdir, config = _begun(whole, tmp_path / "run", 1, 2), small(small_path)
    with monkeypatch.context() as patch:
        _hook(patch, _signal(signal.SIGTERM), step=config.train.steps)
        with pytest.raises(
            Interrupted, match="stopped by a signal as .*Whole are 2 of 3 trials .0, 1.; the same command"
        ):
            serially(config, save(folder), workdir)
    assert [row["status"] for row in table(workdir)] == ["done", "done", "not begun"]
    serially(config, save(folder), workdir)
    assert table(workdir) == table(whole)


def test_a_signal_to_a_trial_that_diverges_is_not_lost():
    with pytest.raises(Diverged), loop.stop_requests():
        _signal(signal.SIGTERM)()
        raise Diverged("loss is nan")
    assert loop.stopped_late() and not loop.stopped_late()
    with pytest.raises(Interrupted), loop.stop_requests():
        _signal(signal.SIGTERM)()
        raise Interrupted("saved")
    assert not loop.stopped_late()


def test_a_process_that_is_killed_leaves_what_the_same_command_ends(script, small_path, folder, whole, tmp_path):
    """A real SIGKILL, as soon as a trial has a checkpoint."""
    workdir = _begun(whole, tmp_path / "run", 1, 2)
    arguments = [*tiny.config_flags(small_path, CHANGES), f"--sweep={save(folder)}", f"--workdir={workdir}"]
    arguments.append("--sweep_mode=serial")
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        **dict(cwd=tiny.ROOT, env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
    )
    until = time.monotonic() + 120
    while process.poll() is None and not (workdir / NAMES[1] / "checkpoints/2").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert script("train.py", *arguments).status == 0
    assert table(workdir) == table(whole)


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(
    small_path, folder, whole, tmp_path, monkeypatch, capsys
):
    workdir, make = _begun(whole, tmp_path / "run", 1), step.make_noise_step

    def broken(*args, **kwargs):
        noise_step = make(*args, **kwargs)
        return lambda *a: (r := noise_step(*a)) | {"noise": r["noise"] * np.float32("nan")}

    monkeypatch.setattr(step, "make_noise_step", broken)
    for _ in range(2):  # the second time, nothing is left to do
        found = serially(small(small_path), save(folder), workdir)
        assert [o.status for o in found] == ["done", "diverged", "done"]
    assert capsys.readouterr().out.count("diverged, and is left at that: the loss is nan at step 1") == 1
    text = (workdir / "results.md").read_text()
    assert "2 done, 1 diverged" in text and "| 0, 1 (diverged) |" in text and f"{NAMES[1]}/diverged.json" in text
    assert list((workdir / NAMES[1] / "tensorboard").glob("*.hparams"))


def test_what_stops_a_trial_is_told_with_the_trials_that_are_whole(small_path, folder, whole, tmp_path):
    workdir = _begun(whole, tmp_path / "run", 1)
    (workdir / NAMES[1]).write_text("in the way")
    words = r"(?s)trial 1 \(learning_rate=0.001, seed=1\): .*cannot be written.*Whole are 2 of 3 trials \(0, 2\)"
    with pytest.raises(UserError, match=words):
        serially(small(small_path), save(folder), workdir)


def test_a_workdir_of_another_sweep_or_a_run_is_refused(small_path, folder, whole, tmp_path, capsys):
    with pytest.raises(UserError, match=r"(?s)another sweep.*train.ema_decay: there 0.999, now 0.9\n.*Take another"):
        serially(small(small_path, {"train.ema_decay": 0.9}), save(folder), whole)
    other = save(tmp_path, SWEEP.replace("2e-3", "3e-3").rstrip() + " + [{'sampling.steps': 1001}]")
    words = r"(?s)trials: there 3, now 4\n  trial 2: train.learning_rate: there 0.002, now 0.003"
    with pytest.raises(UserError, match=words):
        serially(small(small_path), other, whole)
    with pytest.raises(UserError, match="holds a run, expected a sweep"):
        serially(small(small_path), save(folder), whole / NAMES[0])
    with pytest.raises(UserError, match="holds a sweep, expected a run or nothing.*--sweep=FILE"):
        train_and_evaluate(small(small_path), whole)
    keys = save(tmp_path, SWEEP.replace('"seed": 0}', '"seed": 0, "train.keep": 5}'), "keys.py")
    with pytest.raises(UserError, match="trial 2: train.keep: there 2, now 5\n"):  # it tells trials apart
        serially(small(small_path), keys, whole)
    # What may change in a run may change in a sweep; one that has not begun is nobody's.
    workdir = _begun(whole, tmp_path / "run")
    serially(small(small_path, {"train.keep": 5}), save(folder), workdir)
    assert json.loads((workdir / "sweep.json").read_text())["config"]["train"]["keep"] == 5
    serially(small(small_path, {"cache.mode": "on"}), save(folder), workdir)  # as a run takes it
    (workdir / "cache" / caching.store.MANIFEST).touch()  # as precompute.py makes one there
    serially(small(small_path), save(tmp_path, RENAMED, "renamed.py"), workdir)
    assert f"{workdir}/cache is a cache that no trial reads" in capsys.readouterr().out
    assert [row["workdir"] for row in table(workdir)] == NAMES and table(workdir)[0]["rate"] == "low"
    assert sorted(p.name for p in workdir.iterdir() if re.match(r"\d", p.name)) == NAMES
    (tmp_path / "new" / NAMES[0]).mkdir(parents=True)  # made before its data were looked at
    shutil.copy(whole / "sweep.json", tmp_path / "new")
    (tmp_path / "new/cache/0/held_out-4").mkdir(parents=True)
    with lock(tmp_path / "new/cache/0/held_out-4", "building", ""), pytest.raises(Busy, match="building a cache"):
        folders.claim(tiny.settings_of(small(small_path)), [], tmp_path / "new")
    with pytest.raises(UserError, match="trial 3 .*got 1001"):  # what is wrong now is not whose it is
        serially(small(small_path), other, tmp_path / "new")


def test_a_sweep_of_several_caches_goes_on_after_what_an_older_version_wrote(small_path, tmp_path):
    base = tiny.settings_of(small(small_path))
    card, swept = base.base.outline().card, [{"draws.count": n} for n in (1, 2)]
    each = [trials.Trial(i, f"{i:03d}", c, c, tiny.changed(base, c)) for i, c in enumerate(swept)]
    folders.claim(base, folders.placed(each, tmp_path, None, lambda _: card), tmp_path)
    (tmp_path / "000").mkdir()
    (tmp_path / "000/config.json").write_text(json.dumps(config_lib.to_dict(each[0].settings)))
    content = json.loads((tmp_path / "sweep.json").read_text())
    before = [entry["cache"] for entry in content["trials"]]
    for entry in content["trials"]:
        del entry["modalities"]
    content["config"]["mcm"]["x0_clip"] = 1.0  # which was the default
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    begun = folders.find(tmp_path)
    with pytest.raises(UserError, match="mcm.x0_clip: there 1.0, now 0.0"):
        folders.check_same(begun, each, tmp_path)
    base, each = folders.as_begun(begun, base, each)
    assert [trial.settings.mcm.x0_clip for trial in each] == [1, 1]
    folders.check_same(begun, each, tmp_path)
    folders.claim(base, folders.placed(each, tmp_path, begun, lambda _: card), tmp_path)
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["config"]["mcm"]["x0_clip"] == 1
    after = content["trials"]
    assert [entry["cache"] for entry in after] == before and len({*before}) == 2 and "modalities" in after[0]


def test_what_another_process_holds_is_waited_for_or_passed_over(
    small_path, folder, whole, tmp_path, monkeypatch, capsys
):
    workdir = _begun(whole, tmp_path / "run", 1)
    (workdir / NAMES[1]).mkdir()
    with lock(workdir / NAMES[1], "training in this workdir", "--workdir"):
        found = serially(small(small_path), save(folder), workdir)
        assert [o.status for o in found] == ["done", "not begun", "done"]
        assert f"{NAMES[1]}: another process trains it" in capsys.readouterr().out
        with pytest.raises(UserError, match="another process is training in this workdir"):
            serially(small(small_path), save(folder), workdir, index=1)
    monkeypatch.setattr(run, "_LOOKS", 0.01)
    held = lock(tmp_path, "building", "path")
    held.__enter__()
    tries = []

    def act():
        tries.append(0)
        if len(tries) == 3:
            held.__exit__(None, None, None)
        with lock(tmp_path, "building", "path"):
            pass

    monkeypatch.setattr(run.jax, "process_count", lambda: 2)  # the others of them wait for this one
    run._patiently(act)
    assert len(tries) == 3 and capsys.readouterr().out.count("waiting for it") == 1


def test_a_cache_is_shared_where_what_is_in_it_is_the_same(small_path, tmp_path):
    """By the settings alone, but never where caching.made_of tells two apart."""
    base = tiny.settings_of(small(small_path))
    card = base.base.outline().card

    def made_of(settings):
        return caching.made_of(settings, card, caching._find(settings, card, "train").fingerprints())

    def shared_by(settings):
        return caching.shared_by(settings, card)

    same = {
        "seed": 1,
        "train.steps": 9,
        "mcm.channels": 8,
        "loss.l1": 0.1,
        "modalities.drop_rate": 0.1,
        "train.held_out": 3,
        **{
            "mcm.conditions": "encoder",
            "data.prompt_drop_rate": 0.5,
        },  # which say nothing on bases of pixels, without text
    }
    for key, value in same.items():
        changed = tiny.changed(base, {key: value})
        assert made_of(changed) == made_of(base) and shared_by(changed) == shared_by(base), key
    other = [{"draws.count": 3}, {"draws.seed": 1}, {"draws.density": [1.0, 2.0]}, {"draws.offset": 0.1}]
    other += [
        {"data.size": 9},
        {"data.seed": 5},
        {"data.views": 2, "data.flip": True},
        {"data.views": 2, "data.jitter": 0.2},
    ]
    other += [{"cache.dtype": "int8"}, {"base.dtype": "bfloat16"}]
    other += [{"modalities.segmentation.ignore": 255}]
    # Caches of versions that did not know the key are found as long as it is not set.
    assert made_of(base)["modalities.segmentation"] == "labels, channels=6" and "ignore" not in repr(base.modalities)
    for changes in other:
        changed = tiny.changed(base, changes)
        assert made_of(changed) != made_of(base), changes
        assert shared_by(changed) != shared_by(base), changes
    shares = [{"data.name": "folder", "data.path": str(tmp_path), "data.held_out_share": s} for s in (0.1, 0.2)]
    assert len({shared_by(tiny.changed(base, changes)) for changes in shares}) == 2
    (tmp_path / "test").mkdir()  # its own split is held out, whatever the share
    assert len({shared_by(tiny.changed(base, changes)) for changes in shares}) == 1


@pytest.mark.parametrize("name", sorted(p.stem for p in (tiny.ROOT / "configs/sweeps").glob("*.py")))
def test_shipped_sweeps_read(name):
    hyper, metric = trials.load(tiny.ROOT / f"configs/sweeps/{name}.py")
    found = trials.read(scenes.get_config(), tiny.settings_of(scenes.get_config()), hyper)
    assert metric == "mean_iou" and len(found) == len(hyper)
    assert all(t.settings.train.checkpoint_every < t.settings.train.steps for t in found)  # a kill does not lose all


def test_a_metric_that_no_trial_will_measure_is_refused_before_the_first_one(small_path, folder, tmp_path):
    path = save(tmp_path, 'METRIC = "mean_iou"\n' + SWEEP)
    with pytest.raises(UserError, match=r"METRIC='mean_iou'.*trial 0 \(.*has config.train.evaluate_every=0"):
        run_sweep(small(small_path, {"train.evaluate_every": 0}), path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    beside = small(small_path, {"train.evaluate_every": 2})  # a cache without the base
    with pytest.raises(
        UserError, match=r"METRIC='mean_iou'.*trial 0 \(.*no base to sample with: config.cache.load_base"
    ):
        run_sweep(beside, path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for metric, changes in (("images_per_second", {}), ("held_out_mse", {"train.evaluate_every": 2})):
        outcomes.check_measured(_read([{}], changes), metric)


def test_what_a_trial_may_not_begin_with_is_refused_before_the_first_one_and_goes_on_in_older_sweeps(
    small_path, tmp_path
):
    path = tmp_path / "attention.py"
    path.write_text("def get_hyper(): return [{'mcm.attention': (1,)}, {'mcm.attention': (7,)}]")
    workdir = tmp_path / "sweep"
    with pytest.raises(UserError, match=r"trial 1 .*of the sweep: config.mcm.attention must be 1 or 0"):
        run_sweep(small(small_path, {}), path, workdir)
    assert not workdir.exists()
    older = tiny.settings_of(small(small_path, {}))
    older = dataclasses.replace(older, mcm=dataclasses.replace(older.mcm, attention=(7,)))
    for there in (False, True):
        workdir.mkdir(exist_ok=True)
        (workdir / workdirs.SWEEP).write_text("{}") if there else None
        with contextlib.nullcontext() if there else pytest.raises(UserError, match="mcm.attention"):
            assert workdirs.check_same_run(older, workdir / "1") is None


def test_a_full_disk_is_told_before_the_first_trial(small_path, folder, tmp_path, monkeypatch):
    def write(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "write_atomically", write)
    with pytest.raises(UserError, match=r"sweep.json could not be written .*No space.*Whole are 0 of 3 trials"):
        run_sweep(small(small_path), save(folder), tmp_path / "run")
