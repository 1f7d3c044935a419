"""Sweeps: what is wrong is told before the first trial, and however one was stopped, it ends as if it had not been."""

import csv
import re
import shutil

import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from test_training import _kill, _Killed, _signal

from mcm_jax import sweep
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.sweep import trials
from mcm_jax.sweep.run import run_sweep
from mcm_jax.training import loop, step, train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

# Two rates by two seeds; trials of one size and schedule, so that all but the first find their programs compiled.
SWEEP = """
from mcm_jax import sweep

def get_hyper():
    return sweep.product(
        sweep.values("train.learning_rate", [1e-3, 2e-3]),
        sweep.values("seed", [0, 1]),
    )
"""
QUIET = {"train.validate_every": 0, "train.log_every": 1, "train.steps": 4, "train.checkpoint_every": 2}


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny", seed=0, size=8)


def small(base, changes=()):
    net = {"mcm.channels": 4, "mcm.groups": 2, "cache.batch_size": 4, "cache.mode": "build"}
    return tiny.make_config(base, QUIET | net | dict(changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


def save(folder, text=SWEEP, name="sweep.py"):
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture(scope="module")
def whole(small_path, folder):
    """The sweep without a break."""
    run_sweep(small(small_path), save(folder), folder / "whole")
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
    return trials.read(tiny.settings_of(small("nowhere", changes)), hyper)


def test_folders_are_short_safe_and_say_what_differs():
    hyper = sweep.product(
        [{"train.evaluate_every": 2}],
        sweep.choices("form", {"the paper's / eps": {"loss.weighting": "eps"}, "x" * 200: {}}),
        sweep.values("mcm.multipliers", [(1, 2), (1, 1)]),
        sweep.values("draws.seed", [0, 1]),
    )
    found = _read(hyper)
    assert found[0].name == "000_form=the-paper-s-eps_multipliers=1-2_draws.seed=0"
    assert all(re.fullmatch(r"[\w.=+-]{1,100}", t.name) for t in found) and len({t.name for t in found}) == 8
    assert found[0].settings.loss.weighting == "eps" and found[4].settings.loss.weighting == "v"
    assert found[3].settings.mcm.multipliers == (1, 1) and found[3].settings.draws.seed == 1
    assert all(t.settings.train.evaluate_every == 2 for t in found)
    # A trial that leaves a key alone has the config's value.
    assert [t.labels for t in _read([{}, {"train.steps": 5}])] == [{"steps": 4}, {"steps": 5}]


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
    ],
)
def test_all_trials_are_checked_and_named(hyper, words):
    with pytest.raises(UserError, match=words):
        _read(hyper)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["has no attribute 'get_hyper'", "docs/sweeps.md"]),
        ("def get_hyper(): return []", ["a list of dicts"]),
        ("def get_hyper(): return [{1: 2}]", ["a list of dicts"]),
        ("def get_hyper(): return 1 / 0", ["ZeroDivisionError"]),
        ("METRIC = 3\ndef get_hyper(): return [{}]", ["METRIC", "3"]),
        ("def get_hyper(): return [{'train.stepz': 5}]", ["trial 0", "config.train.stepz", "train.steps"]),
        ("def get_hyper(): return [{'seed': 1}, {'mcm.groups': 3}]", ["trial 1", "3 groups"]),
    ],
)
def test_a_bad_sweep_is_explained_and_writes_nothing(script, small_path, tmp_path, text, words):
    path = save(tmp_path, text)
    flags = [*tiny.config_flags(small_path, QUIET), f"--sweep={path}", f"--workdir={tmp_path / 'run'}"]
    assert script("train.py", *flags).explains(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sweep=nowhere.py"], ["nowhere.py", "get_hyper()"]),
        (["--sweep={sweep}", "--sweep_index=4"], ["--sweep_index=4", "4 trials, 0 to 3"]),
        (["--sweep={sweep}", "--sweep_index=-1"], ["--sweep_index=-1", "4 trials"]),
        (["--sweep_index=1"], ["--sweep_index goes with --sweep"]),
        (["--sweep={sweep}", "--profile=1:2"], ["sweep", "profile"]),
        (["--sweep={sweep}", "--sweep_mode=parallel"], ["sweep_mode", "together"]),
    ],
)
def test_bad_flags_of_a_sweep_are_explained_and_write_nothing(script, small_path, folder, tmp_path, flags, words):
    flags = [flag.format(sweep=save(folder)) for flag in flags]
    workdir = tmp_path / "run"
    assert script("train.py", *tiny.config_flags(small_path, QUIET), *flags, f"--workdir={workdir}").explains(*words)
    assert not workdir.exists()


def test_one_program_holds_no_other_number_of_steps(small_path, tmp_path):
    path = save(tmp_path, "def get_hyper(): return [{'train.steps': 3}, {'train.steps': 4}]")
    with pytest.raises(UserError, match="sweep_mode=together: the trials differ in train.steps"):
        run_sweep(small(small_path), path, tmp_path / "run", mode="together")


def test_one_path_is_not_for_two_caches(small_path, tmp_path):
    path = save(tmp_path, "def get_hyper(): return [{'draws.count': 3}, {'draws.count': 4}]")
    with pytest.raises(UserError, match=r"(?s)cache.path=.* trial 0 \(count=3\) and trial 1 \(count=4\) need one each"):
        run_sweep(small(small_path, {"cache.path": str(tmp_path / "cache")}), path, tmp_path / "run")


# --- its runs -------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_ordinary_workdirs_one_cache_and_results(whole, small_path, tmp_path):
    names = [f"{i:03d}_learning_rate={rate}_seed={seed}" for i, (rate, seed) in enumerate(ROWS)]
    assert sorted(p.name for p in whole.iterdir() if re.match(r"\d", p.name)) == names
    assert len(list((whole / "cache").iterdir())) == 1  # and none in the trials
    assert not [p for name in names for p in (whole / name).glob("cache*")]
    rows = table(whole)
    assert [(row["workdir"], row["status"], row["step"]) for row in rows] == [(name, "done", "4") for name in names]
    for row in rows:
        assert float(row["loss"]) == tiny.metrics_of(whole / row["workdir"])[-1]["loss"]
    # The second one is what it is when it trains alone.
    changes = {"seed": 1, "train.learning_rate": 1e-3, "cache.path": str(next((whole / "cache").iterdir()))}
    train_and_evaluate(small(small_path, changes), tmp_path / "alone")
    assert tiny.metrics_of(tmp_path / "alone") == tiny.metrics_of(whole / names[1])


ROWS = [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]


def test_the_report_averages_seeds_and_names_the_best(whole):
    losses = [float(row["loss"]) for row in table(whole)]
    text = (whole / "results.md").read_text()
    means = {rate: sum(losses[i : i + 2]) / 2 for i, rate in ((0, 0.001), (2, 0.002))}
    spread = {rate: abs(losses[i] - losses[i + 1]) / 2**0.5 for i, rate in ((0, 0.001), (2, 0.002))}
    ranked = sorted(means, key=means.get)
    for place, rate in enumerate(ranked, 1):
        assert f"| {place} | {rate:g} | {means[rate]:.4g} ± {spread[rate]:.4g} |" in text
    first = 0 if ranked[0] == 0.001 else 2
    best = min((first, first + 1), key=lambda i: losses[i])
    rate, seed = ROWS[best]
    assert f"--config.train.learning_rate={rate} --config.seed={seed}" in text
    assert f"sample.py --workdir={whole}/{best:03d}_learning_rate={rate}_seed={seed} --segmentation=" in text
    assert "4 trials: 4 done" in text and "`loss`" in text


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


def test_the_picture_is_drawn_or_said_to_be_left_out(whole, tmp_path, monkeypatch, capsys):
    from mcm_jax.sweep import plots

    pytest.importorskip("matplotlib")
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "results.png" in (whole / "results.md").read_text()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    plots._say.cache_clear()
    for _ in range(2):
        assert not plots.draw([], tmp_path / "results.png", "loss")
    assert capsys.readouterr().out.count("pip install 'mcm-jax[sweep]'") == 1


@pytest.mark.parametrize("action, error", [(_signal(2), Interrupted), (_kill, _Killed)])
def test_stopped_in_the_second_trial_it_ends_as_the_uninterrupted_one(
    small_path, folder, whole, tmp_path, monkeypatch, capsys, action, error
):
    workdir = tmp_path / "run"
    shutil.copytree(whole / "cache", workdir / "cache")
    bars = []
    original = loop.tqdm

    class Bar(loop.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            if len(bars) == 2 and self.n == 3:
                action()

    monkeypatch.setattr(loop, "tqdm", Bar)
    with pytest.raises(error):
        run_sweep(small(small_path), save(folder), workdir)
    monkeypatch.setattr(loop, "tqdm", original)
    assert [row["status"] for row in table(workdir)] == ["done", "not begun", "not begun", "not begun"]
    first = tiny.contents(workdir / table(workdir)[0]["workdir"])
    capsys.readouterr()
    found = run_sweep(small(small_path), save(folder), workdir)
    assert [o.status for o in found] == ["done"] * 4
    said = capsys.readouterr().out
    assert "going on from step" in said and "trial 0 (" not in said.split("best by")[0]
    assert table(workdir) == table(whole)
    assert tiny.contents(workdir / table(workdir)[0]["workdir"]) == first


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(small_path, whole, tmp_path, monkeypatch, capsys):
    path = save(tmp_path, "def get_hyper(): return [{'seed': 1, 'loss.l1': 0.5}, {'train.learning_rate': 1e-3}]")
    workdir = tmp_path / "run"
    shutil.copytree(whole / "cache", workdir / "cache")
    make = step.make_noise_step

    def broken(*args, seed, **kwargs):
        noise_step = make(*args, seed=seed, **kwargs)
        return (lambda *a: (r := noise_step(*a)) | {"noise": r["noise"] * float("nan")}) if seed == 1 else noise_step

    monkeypatch.setattr(step, "make_noise_step", broken)
    config = small(small_path, {"train.learning_rate": 3e-3})
    assert [o.status for o in run_sweep(config, path, workdir)] == ["diverged", "done"]
    text = (workdir / "results.md").read_text()
    assert "1 done, 1 diverged" in text and "0 (diverged)" in text and "diverged.json" in text
    assert "`001_" in text.partition("## The best")[2]
    capsys.readouterr()
    run_sweep(config, path, workdir)  # nothing is left to do
    assert "MCM of" not in capsys.readouterr().out
