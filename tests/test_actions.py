"""What a run does every n steps, each action by itself; and what is said of the compiled step."""

import dataclasses
import json
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open

from mcm_jax import cli
from mcm_jax import config as config_lib
from mcm_jax.base import attention
from mcm_jax.data import DataSettings
from mcm_jax.errors import OutOfMemory, UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, Judgement
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import memory_errors
from mcm_jax.training.actions import Checkpoint, Control, HeldOutLoss, Profile, Report, ValidationPictures
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Clock, Moment
from mcm_jax.training.state import TrainState

pytestmark = [pytest.mark.usefixtures("quick")]


class Lines(list):
    """A log that keeps what it is told."""

    def write(self, step, metrics):
        self.append({"step": step, **metrics})


class SetClock(Clock):
    """A clock that stands still until it is set."""

    seconds = 0.0


def moment(step, last=10, *, clock=None, stopping=False, state=None, **metrics):
    if clock is None:
        clock = SetClock()
        clock.seconds = float(step)
    metrics = {k: jnp.float32(v) for k, v in (metrics or {"loss": 1.0}).items()}
    return Moment(step, last, state, metrics, stopping, clock, {}.update)


def report(tmp_path, log, **more):
    how = {"every": 3, "batch_size": 4, "learning_rate": lambda step: 0.1 * step}
    return Report(log, **how, blame=lambda step: {"examples": [step]}, workdir=tmp_path, **more)


def test_a_report_has_means_pace_and_waiting(tmp_path):
    log, clock = Lines(), SetClock()
    told = report(tmp_path, log)
    for step in range(1, 8):
        clock.seconds, clock.waited = 0.5 * step, 0.1 * step
        told(moment(step, 7, clock=clock, loss=step, mse=2 * step))
    assert [line["step"] for line in log] == [3, 6, 7]  # the last one, too
    assert [line["loss"] for line in log] == [2, 5, 7] and log[0]["mse"] == 4
    assert [round(line["images_per_second"], 3) for line in log] == [8, 8, 8]
    assert [round(line["input_wait"], 3) for line in log] == [0.2, 0.2, 0.2]
    assert log[1]["learning_rate"] == pytest.approx(0.5)


def test_a_report_goes_on_where_it_was(tmp_path):
    whole, parts = Lines(), Lines()
    first, second = report(tmp_path, whole), report(tmp_path, parts)
    for step in (1, 2, 3, 4, 5):
        first(moment(step, loss=step))
        second(moment(step, loss=step))
    resumed = report(tmp_path, parts, **json.loads(json.dumps(second.pending)))
    first(moment(6, loss=6))
    resumed(moment(6, loss=6))
    keys = ("step", "loss")
    assert [[line[k] for k in keys] for line in parts] == [[line[k] for k in keys] for line in whole]


def test_a_loss_that_is_not_finite_names_its_batch(tmp_path):
    told = report(tmp_path, Lines())
    told(moment(1, loss=1.0))
    told(moment(2, loss=np.nan))
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        told(moment(3, loss=1.0))
    assert json.loads((tmp_path / "diverged.json").read_text()) == {"step": 2, "loss": "nan", "examples": [1]}


def test_the_held_out_loss_is_the_averages(tmp_path):
    log, state = Lines(), types.SimpleNamespace(ema_params=2.0)
    loss_of = lambda params, record: (params * record, {"mse": record})  # noqa: E731
    action = HeldOutLoss(log, every=2, records=[1.0, 3.0], loss_of=loss_of)
    seen = []
    for step in (1, 2, 3, 4, 5):
        now = moment(step, 5, state=state)
        action(now)
        seen.append(now.measured)
    assert [line["step"] for line in log] == [2, 4, 5]
    assert seen[1] == {"held_out_loss": 4.0, "held_out_mse": 2.0} and seen[0] == {}


@pytest.fixture(scope="module")
def pipeline(trained):
    return Pipeline.from_folder(trained.workdir)


@pytest.mark.slow
def test_control_samples_the_moments_average(pipeline, trained):
    judged = []

    def judge(images, which):
        judged.append(images)
        return Judgement({"count": float(len(images)), "share": {"of": "nobody counts"}})

    held_out = HeldOut(DataSettings(), pipeline.base.card, pipeline.modalities, 2)
    log, by = Lines(), Judge("all", "counting", judge, ("count", "share.of"), ("seen", "share"))
    action = Control(log, every=2, pipeline=pipeline, held_out=held_out, judges=[by])
    for step in (1, 2):
        action(now := moment(step, state=trained.state))
    assert log == [{"step": 2, "seen": 2.0}] and now.measured["seen"] == 2
    assert judged[0].shape == (2, tiny.SIZE, tiny.SIZE, 3) and np.abs(judged[0]).max() <= 1
    tiny.assert_same_bits(jax.device_get(pipeline.mcms[0].params), jax.device_get(trained.state.ema_params))
    lost = dataclasses.replace(trained.state, ema_params=jax.tree.map(lambda p: p * np.nan, trained.state.ema_params))
    with pytest.warns(UserWarning, match="step 4: no control was measured: 2 of 2 samples of 'all' came out as NaN"):
        action(now := moment(4, state=lost))
    assert [line["step"] for line in log] == [2, 4] and np.isnan(log[1]["seen"]) and np.isnan(now.measured["seen"])


def full(*_, **how):
    raise OutOfMemory(f"a device's memory does not hold {how.get('batch_size')} samples")


def test_what_cannot_be_sampled_at_the_moment_leaves_the_training_to_go_on(pipeline, trained, tmp_path, monkeypatch):
    """Of several processes it ends it: the others would wait for the one that is out of memory, or it for them."""
    held_out = HeldOut(DataSettings(), pipeline.base.card, pipeline.modalities, 3)
    few, log, by = pipeline.settings.but(batch_size=2), Lines(), Judge("all", "", None, ("count",), ("seen",))
    monkeypatch.setattr(pipeline, "settings", few)
    control = Control(log, every=2, pipeline=pipeline, held_out=held_out, judges=[by])
    examples = {m.name: np.zeros((3, tiny.SIZE, tiny.SIZE), np.uint8) for m in pipeline.modalities}
    examples["image"] = np.zeros((3, tiny.SIZE, tiny.SIZE, 3), np.uint8)
    sheet = ValidationPictures(tmp_path, every=2, pipeline=pipeline, examples=examples, palettes={})
    monkeypatch.setattr(Pipeline, "__call__", full)
    for action, what in ((control, "control was measured"), (sheet, "validation pictures were drawn")):
        with pytest.warns(UserWarning, match=f"step 2: no {what}: a device's memory does not hold 2 samples"):
            action(moment(2, state=trained.state))
        with monkeypatch.context() as patched, pytest.raises(OutOfMemory):
            patched.setattr(jax, "process_count", lambda: 2)
            action(moment(2, state=trained.state))
    assert not list(tmp_path.iterdir()) and len(log) == 1 and np.isnan(log[0]["seen"])


@pytest.mark.slow
def test_pictures_are_drawn_every_n_steps(pipeline, trained, tmp_path):
    examples = {
        "image": np.zeros((2, tiny.SIZE, tiny.SIZE, 3), np.uint8),
        "segmentation": np.zeros((2, tiny.SIZE, tiny.SIZE), np.uint8),
        "sketch": np.full((2, tiny.SIZE, tiny.SIZE), 255, np.uint8),
    }
    action = ValidationPictures(tmp_path, every=2, pipeline=pipeline, examples=examples, palettes={})
    for step in (1, 2, 3):
        action(moment(step, state=trained.state))
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000002.png"]
    assert Image.open(tmp_path / "step_0000002.png").size == (6 * (2 * 17 + 1), 6 * (4 * 17 + 1))


def small_state(step):
    params = {"w": jnp.full(3, float(step))}
    return TrainState(jnp.int32(step), params, {"w": jnp.full(3, -float(step))}, ())


def checkpointing(tmp_path, changes, **more):
    settings = tiny.settings_of(tiny.make_config("scenes-ddpm", {"train.steps": 10, **changes}))
    checkpoints = Checkpoints(tmp_path, settings.train.keep)
    card = dataclasses.replace(settings.base.outline().card, name="tiny", fingerprint="f")
    told = report(tmp_path, Lines())
    return (
        Checkpoint(tmp_path, checkpoints, settings=settings, report=told, card=card, meta={"fingerprint": "f"}, **more),
        checkpoints,
    )


def test_checkpoints_come_every_n_steps_at_the_end_and_when_stopped(tmp_path):
    action, checkpoints = checkpointing(tmp_path, {"train.checkpoint_every": 3, "train.keep": 9})
    for step in range(1, 11):
        action(moment(step, 10, state=small_state(step), stopping=step == 4))
    assert checkpoints.steps() == [3, 4, 6, 9, 10]
    like = small_state(0)
    for step in (4, 10):
        found, _ = checkpoints.restore(like, {"base": "tiny", "fingerprint": "f"}, step)
        assert int(found.step) == step and float(found.params["w"][0]) == step
    checkpoints.close()
    with safe_open(tmp_path / "mcm.safetensors", "numpy") as file:
        assert file.get_tensor("w")[0] == -10 and file.metadata()["step"] == "10"


@pytest.mark.parametrize("metric, best", [("held_out_loss", 3), ("mean_iou", 5), ("palette/delta_e", 3)])
def test_the_best_checkpoint_stays(tmp_path, metric, best):
    changes = {"train.checkpoint_every": 2, "train.keep": 2, "train.best": metric, "train.evaluate_every": 1}
    action, checkpoints = checkpointing(tmp_path, changes)
    values = {1: 0.5, 3: 0.1, 5: 0.9, 7: 0.4, 9: 0.3}
    for step in range(1, 11):
        now = moment(step, 10, state=small_state(step))
        if step in values:
            now.measured[metric] = values[step]
        action(now)
    assert checkpoints.steps() == [best, 8, 10]
    _, meta = checkpoints.restore(small_state(0), {"base": "tiny", "fingerprint": "f"})
    assert meta["best"] == {"metric": metric, "step": best, "value": values[best]}  # a resumed run knows it
    checkpoints.close()
    with safe_open(tmp_path / "best/mcm.safetensors", "numpy") as file:
        assert file.metadata()["step"] == str(best)
    assert config_lib.FILE in {p.name for p in (tmp_path / "best").iterdir()}


def test_the_checkpoint_before_a_decay_stays(tmp_path):
    changes = {"train.checkpoint_every": 5, "train.keep": 1, "train.schedule": "wsd", "train.decay_steps": 4}
    action, checkpoints = checkpointing(tmp_path, changes)
    for step in range(1, 11):
        action(moment(step, 10, state=small_state(step)))
    assert checkpoints.steps() == [6, 10]
    checkpoints.close()


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_state(1), {"base": "tiny", "fingerprint": "f"})
    checkpoints.wait()
    file = tmp_path / "checkpoints/1/meta/metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9, "version": "7.0"}))
    with pytest.raises(UserError, match=r"checkpoints/1 was written by mcm-jax 7.0 in format 9, this version"):
        checkpoints.restore(small_state(0), {"base": "tiny", "fingerprint": "f"})
    checkpoints.close()


def test_a_profile_is_a_trace_of_the_asked_steps(tmp_path, capsys):
    action = Profile(tmp_path, 2, 4)
    for step in range(1, 7):
        action(moment(step, state=jnp.ones(3) * step))
    assert "a trace of steps 3 to 4" in capsys.readouterr().out
    names = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert any(n.endswith(".xplane.pb") for n in names) and any("perfetto" in n for n in names), names


def test_a_profile_begins_with_the_first_step_that_runs(tmp_path, capsys):
    for first, start in ((0, 0), (5, 2)):  # a fresh run; one that goes on
        action = Profile(tmp_path / str(first), start, first + 1)
        action.begin(first)
        for step in range(first + 1, first + 4):
            action(moment(step, state=jnp.ones(3)))
        assert f"a trace of steps {first + 1} to {first + 1} is in" in capsys.readouterr().out
        assert list((tmp_path / str(first)).rglob("*.xplane.pb"))


def test_a_device_without_memory_says_the_way_out():
    huge = jax.jit(lambda: jnp.ones(2**46))  # 256 TiB
    words = r"memory does not hold 256 TiB .RESOURCE_EXHAUSTED.*Buy more\.$"
    with pytest.raises(UserError, match=words), memory_errors("256 TiB", "Buy more."):
        huge().block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), memory_errors("", ""):
        raise jax.errors.JaxRuntimeError("INTERNAL: of something else, RESOURCE_EXHAUSTED or not")


def test_a_step_that_is_compiled_again_says_why():
    step = CompiledStep(jax.jit(lambda x: x @ x), jnp.ones((4, 4)))
    assert step.flops and step.flops >= 2 * 4**3 - 16 and step.bytes >= 128
    assert "GFLOP" in str(step) and "MiB" in str(step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(step(jnp.eye(4)), np.eye(4))
    with pytest.warns(UserWarning, match=r"compiled again.*float32\[5,5\]"):
        assert step(jnp.ones((5, 5)))[0, 0] == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(jnp.ones((5, 5)))


def test_a_step_says_what_is_known_of_it(monkeypatch):
    """On one CPU device attention is a loop, whose body the compiler counts once: no FLOPs are told."""
    monkeypatch.setattr(attention, "loops_over_heads", lambda: True)
    step = CompiledStep(jax.jit(lambda x: x @ x), jnp.ones((4, 4)))
    assert step.flops is None and "GFLOP" not in str(step) and "MiB" in str(step)
    step.bytes = None
    assert "what this device does not tell" in str(step)


def test_weights_and_biases_are_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"config.train.wandb='mine' needs the package wandb.*mcm-jax\[wandb\]"):
        Log(tmp_path, 0, wandb="mine")


def test_weights_and_biases_that_do_not_begin_are_explained(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no route to the host\nand a page more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # an extra: not in the tests' own
    words = r"^config.train.wandb='mine': .* cannot begin its run \(no route to the host\).*WANDB_MODE=offline"
    with pytest.raises(UserError, match=words):
        Log(tmp_path, 0, wandb="mine")


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    log = Log(tmp_path, 0, active=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["5", "a:b", "8:5", "5:5", "-1:5", ":"])
def test_a_span_that_is_none_is_explained(text):
    assert cli.span("5:8", "--profile") == (5, 8) and cli.span(None, "--profile") is None
    with pytest.raises(UserError, match="expected START:STOP"):
        cli.span(text, "--profile")
