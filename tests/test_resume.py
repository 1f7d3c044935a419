"""A run that is stopped, killed, made longer, moved or begun with another MCM: what it ends with is no surprise."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_training import _hook, _kill, _Killed, _signal

from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import lock
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import assembly, loop, train_and_evaluate
from mcm_jax.training.checkpoints import Checkpoints

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

QUIET = {"train.validate_every": 0, "train.log_every": 3}


def small(base, changes):
    return tiny.make_config(base, QUIET | tiny.SMALL | changes)


@pytest.mark.parametrize("mode", ["off", "build"])
def test_stopped_at_five_random_steps_it_is_the_uninterrupted_run(small_path, tmp_path, monkeypatch, mode):
    """With accumulation and the average; every other time the process is gone, and the last checkpoint counts."""
    changes = {"cache.mode": mode, "cache.path": str(tmp_path / "cache") if mode == "build" else ""}
    changes |= {"train.steps": 30, "train.accumulate": 2, "train.checkpoint_every": 4, "train.evaluate_every": 8}
    config = small(small_path, changes | {"train.held_out": 4, "train.best": "held_out_loss"})
    whole = train_and_evaluate(config, tmp_path / "whole")
    rng, original = random.Random(mode), loop.tqdm
    steps = sorted(rng.sample(range(1, 30), 5))
    for i, at in enumerate(steps):
        action, error = ((_signal(signal.SIGTERM), Interrupted), (_kill, _Killed))[i % 2]
        _hook(monkeypatch, at, action)
        with pytest.raises(error):
            train_and_evaluate(config, tmp_path / "run")
        monkeypatch.setattr(loop, "tqdm", original)
    end = train_and_evaluate(config, tmp_path / "run")
    tiny.assert_same_bits(jax.device_get(end), jax.device_get(whole))
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(tmp_path / "whole")
    for name in ("mcm.safetensors", "best/mcm.safetensors"):
        tiny.assert_same_bits(load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name))


SAVER = """
import pathlib, sys
import jax.numpy as jnp, numpy as np
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.state import TrainState
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
step = (checkpoints.latest_step() or 0) + 1
print("ready", flush=True)
while True:
    values = {f"w{i}": jnp.full((64, 256, 16), float(step)) for i in range(12)}
    checkpoints.save(TrainState(jnp.int32(step), values, {}, ()), {"base": "b", "fingerprint": "f"})
    step += 1
"""


def test_killed_at_random_moments_of_saving_the_last_whole_checkpoint_counts(tmp_path):
    """Ten processes that do nothing but save, in the background, each killed at a random moment."""
    rng, hits = random.Random(0), 0

    def kill_one(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], cwd=tiny.ROOT, env=tiny.environment(), stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.05, 0.8))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    like = None
    for _ in range(10):
        kill_one(tmp_path)
        hits += bool(list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
        checkpoints = Checkpoints(tmp_path)
        if (step := checkpoints.latest_step()) is not None:
            if like is None:
                from mcm_jax.training.state import TrainState

                values = {f"w{i}": np.zeros((64, 256, 16), np.float32) for i in range(12)}
                like = jax.device_put(TrainState(np.int32(0), values, {}, ()))
            found, _ = checkpoints.restore(like, {"base": "b", "fingerprint": "f"})
            assert int(found.step) == step
            assert all((np.asarray(v) == step).all() for v in found.params.values())
        checkpoints.close()
    print(f"{hits} of 10 kills hit a save; the last step is {step}")
    assert hits >= 3 and step >= 3


def test_a_decaying_run_is_made_longer(small_path, tmp_path, capsys):
    """By the same command with more steps: as if it had been so long from the start."""
    wsd = {"train.schedule": "wsd", "train.decay_steps": 3, "train.warmup_steps": 2, "train.checkpoint_every": 100}
    wsd |= {"train.evaluate_every": 2, "train.held_out": 4, "train.best": "held_out_loss"}
    long = small(small_path, wsd | {"train.steps": 9})
    whole = train_and_evaluate(long, tmp_path / "whole")
    train_and_evaluate(small(small_path, wsd | {"train.steps": 6}), tmp_path / "run")
    capsys.readouterr()
    end = train_and_evaluate(long, tmp_path / "run")
    said = capsys.readouterr().out
    assert "train.steps: there 6, now 9" in said and "going on from step 3" in said
    aside = re.search(
        r"best is of step ([456]), later than 3, from which the run goes on: it is (best_step_\1) now", said
    )
    best = [tiny.contents(tmp_path / "run" / name)["mcm.safetensors"] for name in ("best", aside[2])]
    assert best[0] != best[1]  # of the new steps, though it may be worse than what was best at step 2
    tiny.assert_same_bits(jax.device_get(end), jax.device_get(whole))
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    with pytest.raises(UserError, match="decayed from step 6 on, and no checkpoint from before"):
        train_and_evaluate(small(small_path, wsd | {"train.steps": 12}), tmp_path / "run")


def test_what_may_change_on_the_way_and_what_may_not(trained, base_path, tmp_path, capsys):
    workdir = trained.copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    free = {"train.log_every": 1, "train.keep": 5, "sampling.steps": 2, "train.validate_every": 0}
    end = train_and_evaluate(tiny.make_config(base_path, free), workdir)
    said = capsys.readouterr().out
    for key in free:
        assert f"{key}: there" in said
    tiny.assert_same_bits(jax.device_get(end.params), jax.device_get(trained.state.params))
    assert json.loads((workdir / "config.json").read_text())["train"]["keep"] == 5
    for key, value in {"train.optimizer": "lion", "train.schedule": "linear", "loss.snr_gamma": 2.0}.items():
        with pytest.raises(UserError, match=f"(?s)differs in.*{key}: there.*On the way may change"):
            train_and_evaluate(tiny.make_config(base_path, free | {key: value}), workdir)


def test_two_trainings_in_one_workdir_are_refused(trained, base_path, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    with lock(workdir, "training", "--workdir"), pytest.raises(UserError, match="another process is training in this"):
        train_and_evaluate(trained.config, workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3"]


def test_a_workdir_that_another_run_took_meanwhile_is_refused(trained, base_path, tmp_path, monkeypatch):
    assemble, workdir = assembly.assemble, tmp_path / "run"

    def late(*arguments):
        parts = assemble(*arguments)
        shutil.rmtree(workdir, ignore_errors=True)
        trained.copy(workdir)
        return parts

    monkeypatch.setattr(assembly, "assemble", late)
    before = tiny.contents(trained.workdir)
    other = trained.config.copy_and_resolve_references()
    other.train.learning_rate = 0.5
    with pytest.raises(UserError, match="(?s)another run's config.*train.learning_rate: there .*, now 0.5"):
        train_and_evaluate(other, workdir)
    assert tiny.contents(workdir) == before


def test_training_begins_with_a_trained_mcm(trained, base_path, tmp_path):
    """The same network: the same samples. One with another modality: the same as long as that one is absent."""
    changes = {"train.init_from": str(trained.workdir), "train.steps": 1, "train.learning_rate": 1e-12}
    config = tiny.make_config(base_path, QUIET | changes | {"train.checkpoint_every": 1})
    config.mcm.conditions = "encoder" if config.mcm.conditions == "grid" else "grid"  # of pixels no other network
    same = train_and_evaluate(config, tmp_path / "same")
    before = jax.device_get(trained.state.ema_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), jax.device_get(same.params), before)

    with config.unlocked():
        del config.modalities["segmentation"]
    less = train_and_evaluate(config, tmp_path / "less")
    kernel = lambda params: np.asarray(params["unet"]["conv_in"]["kernel"])  # noqa: E731
    shown = 3 * 3  # x_t, eps, x0; then segmentation's 6 + 1, then sketch's 1 + 1
    np.testing.assert_allclose(kernel(less.params)[:, :, :shown], kernel(before)[:, :, :shown], atol=1e-9)
    np.testing.assert_allclose(kernel(less.params)[:, :, shown:], kernel(before)[:, :, shown + 7 :], atol=1e-9)
    again = tiny.make_config(base_path, QUIET | changes | {"train.init_from": str(tmp_path / "less")})
    more = train_and_evaluate(again, tmp_path / "more")
    np.testing.assert_allclose(kernel(more.params)[:, :, shown : shown + 7], 0, atol=1e-9)
    maps = {"sketch": np.ones((2, tiny.SIZE, tiny.SIZE), np.float32)}
    keys = jax.random.split(jax.random.key(0), 2)
    images = [Pipeline.from_folder(tmp_path / name)(maps, keys) for name in ("less", "more")]
    np.testing.assert_allclose(images[1], images[0], atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"mcm.multipliers": (1, 3)}, ["another network", "mcm.multipliers: there [1, 2], now [1, 3]"]),
        ({"mcm.shift_space": "eps"}, ["another network", "mcm.shift_space"]),
        ({"mcm.x0_clip": 2.0}, ["another network", "mcm.x0_clip: there 1.0, now 2.0"]),
        ({"base.path": "other"}, ["mcm.safetensors", "'tiny'", "'other'", "base.path"]),
        ({"train.init_from": "nowhere"}, ["nowhere", "neither a folder nor a shipped name"]),
    ],
)
def test_a_start_from_another_network_or_base_is_refused(trained, base_path, other_base_path, tmp_path, changes, words):
    changes = {"train.init_from": str(trained.workdir)} | changes
    if "base.path" in changes:
        changes["base.path"] = str(other_base_path)
    with pytest.raises(UserError) as error:
        train_and_evaluate(tiny.make_config(base_path, QUIET | changes), tmp_path / "run")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.init_from": "nowhere"}, "nowhere.*neither a folder nor a shipped name"),
        ({"train.best": "mean_ou"}, "config.train.best='mean_ou': not measured"),
        ({"train.wandb": "mine"}, "needs the package wandb"),
        (
            {"cache.load_base": True, "evaluation.judges.sketch": "eyes"},
            "--judge=sketch=eyes: no judge of lines; expected",
        ),
        ({"mcm.attention": (0, 7)}, "config.mcm.attention must be 1 or 0"),
    ],
)
def test_what_can_be_known_before_is_refused_before_a_cache_is_built(base_path, tmp_path, monkeypatch, changes, words):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tiny.make_config(base_path, QUIET | {"cache.mode": "build", "train.evaluate_every": 2} | changes)
    with pytest.raises(UserError, match=words):
        train_and_evaluate(config, tmp_path / "run")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_options_reach_what_they_are_for(base_path, tmp_path, monkeypatch):
    """The config's values, as the parts get them; what each part makes of them is in its own tests."""
    seen = {}

    class Enough(Exception):
        pass

    def record(name):
        real = getattr(assembly, name) if hasattr(assembly, name) else getattr(assembly.steps_lib, name)

        def recorded(*args, **kwargs):
            seen[name] = (args, kwargs)
            return real(*args, **kwargs)

        return recorded

    for name in ("make_schedule", "make_optimizer"):
        monkeypatch.setattr(assembly, name, record(name))
    monkeypatch.setattr(assembly.steps_lib, "make_train_step", record("make_train_step"))

    def stop(*args, **kwargs):
        raise Enough

    monkeypatch.setattr(assembly, "train", stop)
    options = {"train.schedule": "wsd", "train.decay_steps": 2, "train.optimizer": "lion", "train.clip_norm": 0.3}
    options |= {"train.weight_decay": 0.2, "train.accumulate": 2, "train.ema_decay": 0.5, "loss.snr_gamma": 3.0}
    options |= {"loss.weighting": "min_snr", "loss.l1": 0.1, "mcm.remat": True, "mcm.dtype": "bfloat16"}
    with pytest.raises(Enough):
        train_and_evaluate(tiny.make_config(base_path, QUIET | options), tmp_path / "run")
    assert seen["make_schedule"] == (
        ("wsd",),
        {"steps": 6, "learning_rate": 1e-3, "warmup_steps": 100, "decay_steps": 2},
    )
    assert seen["make_optimizer"][0][0] == "lion" and seen["make_optimizer"][1] == {
        "weight_decay": 0.2,
        "clip_norm": 0.3,
    }
    (modulator, _), how = seen["make_train_step"]
    assert modulator.module.remat and modulator.module.dtype == "bfloat16"
    assert how == {"weighting": "min_snr", "l1": 0.1, "snr_gamma": 3.0, "ema_decay": 0.5, "accumulate": 2}


def test_what_is_best_must_be_measured(base_path, tmp_path):
    changes = {"train.best": "mean_iuo", "train.evaluate_every": 2, "train.held_out": 2}
    with pytest.raises(UserError, match=r"train.best='mean_iuo'.*held_out_loss, held_out_mse"):
        train_and_evaluate(tiny.make_config(base_path, QUIET | changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.train.best must be '' where train.evaluate_every is 0"):
        train_and_evaluate(tiny.make_config(base_path, QUIET | {"train.best": "mean_iou"}), tmp_path / "run")
