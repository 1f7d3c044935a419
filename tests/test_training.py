"""Laws of a training run: nothing reaches the base, a resumed run is the uninterrupted one, devices do not matter."""

import errno
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
from jax.sharding import AxisType
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event, SessionLog

from mcm_jax import config as config_lib
from mcm_jax import distributed, files, sharding, version
from mcm_jax.base import load_base
from mcm_jax.data.pipeline import InMemory, training_batches
from mcm_jax.data.scenes import Scenes
from mcm_jax.draws import Draws
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.pipeline import Pipeline
from mcm_jax.trained import Trained
from mcm_jax.training import RunSettings, caching, loop, parts, state, step, train_and_evaluate
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.logs import Log
from mcm_jax.training.optimizer import make_optimizer, make_schedule

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

DRAWS = Draws(seed=0, count=5, density=(1,), total=1000)
METRICS = {"mse", "mse_of_base", "modulation", "loss", "gradient_norm", "learning_rate", *tiny.PACE}


@pytest.fixture(scope="module")
def modulator(base, base_path):
    return tiny.modulator_of(tiny.make_config(base_path), base)


@pytest.fixture(scope="module")
def params(base, modulator):
    """An MCM with no parameter at zero, so that every one has a gradient."""
    initial = jax.jit(lambda key: modulator.init(key, base.latent_shape))(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), initial)


@pytest.fixture(scope="module")
def source():
    rendered = InMemory.render(Scenes("train", 12, tiny.SIZE, tiny.SIZE, 2)).arrays
    return InMemory({name: rendered[name] for name in ("image", "segmentation", "sketch")})


@pytest.fixture(scope="module")
def batch(source):
    return training_batches(lambda index, draw: source[index], len(source), 4, 0)[0]


def make_predict_step(base, modulator):
    """``predict_step(base_params, batch) -> record``: noise, then the base's prediction, as the feed has them."""
    noise_step = step.make_noise_step(modulator, DRAWS, seed=0, drop_rate=0.3)
    predict = jax.jit(base.predict)

    def predict_step(base_params, batch):
        record = noise_step(batch)
        return record | {"eps": predict(base_params, record["x_t"], record["t"])}

    return predict_step


@pytest.fixture(scope="module")
def predict_step(base, modulator):
    return make_predict_step(base, modulator)


@pytest.fixture(scope="module")
def record(base, predict_step, batch):
    return predict_step(base.params, batch)


@pytest.fixture(scope="module")
def adam(modulator):
    """(optimizer, train_step) that the tests of single steps share."""
    schedule = make_schedule("cosine", steps=60, learning_rate=3e-3, warmup_steps=0, decay_steps=0)
    optimizer = make_optimizer("adamw", schedule, weight_decay=0.0, clip_norm=1.0)
    return optimizer, step.make_train_step(modulator, optimizer, weighting="v", l1=0.01, ema_decay=0.999)


def fresh(params, optimizer):
    """A state whose buffers may be donated."""
    return state.init_state(jax.tree.map(jnp.array, params), optimizer)


# --- the base is out of reach ---------------------------------------------------------------------------------------


def test_base_is_bit_identical_after_training(trained, base_path):
    tiny.assert_same_bits(trained.base.params, load_base(base_path).params)
    assert load_base(base_path).fingerprint == trained.base.fingerprint


def test_train_step_holds_nothing_of_the_base(base, params, adam, record):
    optimizer, train_step = adam
    assert list(inspect.signature(train_step).parameters) == ["state", "record"]
    begin = fresh(params, optimizer)
    closed = jax.make_jaxpr(train_step)(begin, record)
    assert len(closed.jaxpr.invars) == len(jax.tree.leaves((begin, record)))

    def constants(jaxpr):
        """Arrays that a program or one nested in it has closed over."""
        found = list(jaxpr.consts)
        for equation in jaxpr.jaxpr.eqns:
            nested = [p for p in equation.params.values() if isinstance(p, jax.extend.core.ClosedJaxpr)]
            found += [c for inner in nested for c in constants(inner)]
        return found

    seen = {v.aval.shape for v in closed.jaxpr.invars} | {np.shape(c) for c in constants(closed)}
    of_base = {leaf.shape for leaf in jax.tree.leaves(base.params)}
    assert not seen & of_base
    assert (3, 3, 20, 20) in of_base and (3, 3, 8, 8) in seen  # the shapes do tell the two apart


def test_a_base_without_derivatives_can_be_trained_on(base, modulator, params, adam, batch):
    """Whoever differentiated the base, with respect to anything, would get an error here."""
    optimizer, train_step = adam

    @jax.custom_jvp
    def opaque(base_params, x_t, t):
        return base.predict(base_params, x_t, t)

    @opaque.defjvp
    def _(primals, tangents):
        raise AssertionError("the base was differentiated")

    black_box = types.SimpleNamespace(
        predict=opaque, encode=base.encode, schedule=base.schedule, latent_shape=base.latent_shape
    )
    predict_step = make_predict_step(black_box, modulator)
    with pytest.raises(AssertionError, match="the base was differentiated"):
        jax.grad(lambda p: predict_step(p, batch)["eps"].sum())(base.params)
    now, metrics = train_step(fresh(params, optimizer), predict_step(base.params, batch))
    assert float(metrics["gradient_norm"]) > 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), now.params, params)
    assert all(jax.tree.leaves(changed))


def test_optimizer_and_files_hold_the_mcm_alone(trained):
    size = tiny.count(trained.state.params)
    arrays = [leaf for leaf in jax.tree.leaves(trained.state) if leaf.ndim]
    assert sum(a.size for a in arrays) == 4 * size  # params, average, Adam's two moments
    saved = ocp.StandardCheckpointer().restore(trained.workdir / "checkpoints/6/state")
    assert sum(leaf.size for leaf in jax.tree.leaves(saved) if leaf.ndim) == 4 * size
    weights = load_file(trained.workdir / "mcm.safetensors")
    assert sum(w.size for w in weights.values()) == size
    assert f"MCM of {size:,} parameters" in trained.printed


# --- single steps ---------------------------------------------------------------------------------------------------


def test_an_examples_noise_does_not_depend_on_its_batch(base, predict_step, batch, record):
    order = np.array([2, 0, 3, 1])
    other = predict_step(base.params, {key: value[order] for key, value in batch.items()})
    for key in ("t", "noise", "present", "x_t"):
        np.testing.assert_array_equal(other[key], record[key][order], err_msg=key)
    np.testing.assert_allclose(other["eps"], record["eps"][order], atol=1e-5)
    again = predict_step(base.params, batch | {"draw": batch["draw"] + 1})
    assert not np.isclose(again["noise"], record["noise"]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(again["present"], record["present"])
    later = predict_step(base.params, batch | {"seen": batch["seen"] + 5})
    np.testing.assert_array_equal(later["noise"], record["noise"])  # which modalities are hidden is drawn anew


def test_the_loss_of_any_density_is_that_of_uniform_timesteps(base, modulator, params, record):
    """Twice as many late timesteps at half the weight: the mean over all timesteps is the same."""
    optimizer = optax.sgd(0.0)
    train_step = step.make_train_step(modulator, optimizer, weighting="v", l1=0.1, ema_decay=0.9)
    single = [jax.tree.map(lambda a, i=i: a[i : i + 1].repeat(4, 0), jax.device_get(record)) for i in range(4)]
    means = [jax.device_get(train_step(fresh(params, optimizer), one)[1]) for one in single]
    weights = np.array([2.0, 1.0, 0.5, 0.5], np.float32)
    _, found = train_step(fresh(params, optimizer), record | {"importance": weights})
    for key in ("loss", "mse", "mse_of_base", "modulation"):
        expected = np.mean([w * float(m[key]) for w, m in zip(weights, means, strict=True)])
        np.testing.assert_allclose(float(found[key]), expected, rtol=1e-4)


def test_two_devices_train_as_one(base, modulator, params, predict_step, batch):
    if jax.device_count() < 2:
        pytest.skip("one device")
    # SGD: Adam would blow up rounding errors where a gradient is near zero.
    train_step = step.make_train_step(modulator, optax.sgd(0.1), weighting="v", l1=0.01, ema_decay=0.9)
    ends = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        now = sharding.replicate(fresh(params, optax.sgd(0.1)), mesh)
        base_params = sharding.replicate(base.params, mesh)
        for _ in range(2):
            record = predict_step(base_params, sharding.split_batch(batch, mesh))
            assert len(record["eps"].sharding.device_set) == len(devices)
            now, metrics = train_step(now, record)
        ends.append(jax.device_get((now, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *ends)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ends[0][0].params, jax.device_get(params))
    assert max(jax.tree.leaves(moved)) > 1e-2


def test_loss_falls_on_a_fixed_batch(params, adam, record):
    optimizer, train_step = adam
    now, losses = fresh(params, optimizer), []
    for _ in range(60):
        now, metrics = train_step(now, record)
        losses.append(float(metrics["loss"]))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]
    assert np.mean(losses[-10:]) < np.mean(losses[20:30]) < np.mean(losses[:10])


def test_average_is_the_moving_average_of_the_params(params, adam, record):
    optimizer, train_step = adam
    now = fresh(params, optimizer)
    expected = jax.tree.map(np.float64, jax.device_get(params))
    for k in range(4):
        now, _ = train_step(now, record)
        decay = min(0.999, (1 + k) / (10 + k))
        expected = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, expected, jax.device_get(now.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(now.ema_params), expected)
    assert int(now.step) == 4


@pytest.mark.parametrize(
    "at, decay, expected", [(0, 0.999, 0.1), (10**6, 0.999, 0.999), (10**6, 0.5, 0.5), (5, 0.0, 0)]
)
def test_average_forgets_its_start(at, decay, expected):
    ema = state.update_ema({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, jnp.int32(at), decay)
    np.testing.assert_allclose(ema["w"], expected, atol=1e-4)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_workdir_of_a_run(trained):
    workdir = trained.workdir
    assert {p.name for p in workdir.iterdir()} == {
        "config.json",
        "checkpoints",
        "mcm.safetensors",
        "metrics.jsonl",
        "tensorboard",
        "validation",
    }
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    assert config_lib.load(RunSettings, workdir) == tiny.settings_of(trained.config)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(set(line) == METRICS | {"step"} and np.isfinite(list(line.values())).all() for line in lines)
    assert all(line["images_per_second"] > 0 and line["mse_of_base"] > 0 for line in lines)

    events = [p.read_bytes() for p in (workdir / "tensorboard").iterdir()]
    assert len(events) == 1 and all(name.encode() in events[0] for name in METRICS)
    shown = [(line["step"], key, np.float32(line[key])) for line in lines for key in METRICS]
    assert _events(workdir) == sorted(shown)

    pictures = sorted((workdir / "validation").iterdir())
    assert [p.name for p in pictures] == ["step_0000003.png", "step_0000006.png"]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
        # Two modalities, the base alone, the base under control; eight scenes; 6 times as large; white gaps.
        assert picture.format == "PNG" and picture.size == (6 * (8 * 17 + 1), 6 * (4 * 17 + 1))
        assert np.asarray(picture).std() > 10
    assert int(trained.state.step) == 6


def assert_same_weights(workdir, other):
    """mcm.safetensors of two workdirs: tensors and header (whose order in the file is a matter of chance)."""
    paths = [w / "mcm.safetensors" for w in (workdir, other)]
    tiny.assert_same_bits(*map(load_file, paths))
    headers = [safe_open(path, "numpy").metadata() for path in paths]
    assert headers[0] == headers[1]


def _events(workdir):
    """(step, tag, value) of every scalar that the workdir's TensorBoard files show, as TensorBoard reads them."""
    shown = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                shown = [s for s in shown if s[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return sorted(shown)


def test_a_log_that_begins_anew_hides_what_was_logged_before(tmp_path):
    """A run that was killed before its first checkpoint begins again at step 0."""
    for value in (1.0, 2.0):
        log = Log(tmp_path, 0)
        log.write(1, {"loss": value})
        log.close()
        time.sleep(0.01)  # files are told by their times
    assert _events(tmp_path) == [(1, "loss", 2.0)]
    assert tiny.metrics_of(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_the_held_out_loss_is_of_each_example_once(small_path, tmp_path):
    """Whatever fills up the last batch: 5 examples of 5 draws are 25 rows, and 30 or 32 of them in whole batches."""
    changes = {
        **tiny.SMALL,
        "train.validate_every": 0,
        "train.evaluate_every": 1,
        "train.held_out": 5,
        "train.steps": 1,
    }
    changes |= {"draws.count": 5, "train.batch_size": 8, "train.learning_rate": 1e-12}
    found = []
    for count in (1, 2):
        train_and_evaluate(tiny.make_config(small_path, changes | {"train.accumulate": count}), tmp_path / str(count))
        (line,) = (line for line in tiny.metrics_of(tmp_path / str(count)) if "held_out_loss" in line)
        found.append(line)
    for key in ("held_out_loss", "held_out_mse"):
        np.testing.assert_allclose(found[0][key], found[1][key], rtol=1e-5)


def test_a_full_disk_is_told_from_a_full_accelerator():
    full = "RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"
    wrapped = RuntimeError("checkpoint failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert all(files.is_disk_error(e) for e in (ValueError(full), OSError(27, "File too large"), wrapped))
    assert files.is_disk_error(RuntimeError(f"cannot write: [Errno {errno.EDQUOT}] Disk quota exceeded"))
    assert not files.is_disk_error(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        TimeoutError("timed out"),
        RuntimeError("<urlopen error [Errno 111] Connection refused>"),
    ],
)
def test_a_full_disk_is_told_from_a_network(error, tmp_path):
    with pytest.raises(type(error)), workdirs.disk_errors(tmp_path):
        raise error


def test_a_full_disk_stops_the_log_at_once(tmp_path):
    """In the run's own thread: no report is lost in silence, nothing hangs, and closing raises nothing more."""
    resource = pytest.importorskip("resource")
    log = Log(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size + 10, before[1]))
    try:
        for _ in range(30):
            with pytest.raises(OSError):
                log.write(2, {"loss": 2.0})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _events(tmp_path)[0] == (1, "loss", 1.0)


class _Killed(BaseException):
    """Stands for a process that is gone."""


def _hook(monkeypatch, at, action):
    """Runs ``action`` in the middle of step ``at``, before anything of that step is reported or saved."""

    class Bar(loop.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == at:
                action()

    monkeypatch.setattr(loop, "tqdm", Bar)


def _signal(number):
    return lambda: os.kill(os.getpid(), number)


def _kill():
    raise _Killed


def test_float16_is_refused_for_training(base_path, tmp_path):
    config = tiny.make_config(base_path, {"mcm.dtype": "float16"})
    with pytest.raises(UserError, match="config.mcm.dtype: found float16, expected float32 or bfloat16"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path, monkeypatch, capsys):
    """Stopped between two reports, at a checkpoint, and killed: bit for bit the same params, moments and metrics."""
    workdir, original = tmp_path / "run", loop.tqdm
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    for at, action, error in (
        (1, _signal(signal.SIGINT), Interrupted),
        (3, _signal(signal.SIGTERM), Interrupted),
        (5, _kill, _Killed),
    ):
        _hook(monkeypatch, at, action)
        with pytest.raises(error) as stopped:
            train_and_evaluate(trained.config, workdir)
        if error is Interrupted:
            assert f"step {at} of 6" in str(stopped.value) and str(workdir) in str(stopped.value)
        monkeypatch.setattr(loop, "tqdm", original)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [line["step"] for line in tiny.metrics_of(workdir)] == [2, 4]
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by the kill
    capsys.readouterr()
    end = train_and_evaluate(trained.config, workdir)
    assert "going on from step 3" in capsys.readouterr().out

    tiny.assert_same_bits(jax.device_get(end), jax.device_get(trained.state))
    assert tiny.metrics_of(workdir) == tiny.metrics_of(trained.workdir)
    found, expected = tiny.contents(workdir), tiny.contents(trained.workdir)
    for name in expected:
        if name.startswith("validation") or name == "config.json":
            assert found[name] == expected[name], name
    assert_same_weights(workdir, trained.workdir)
    events = [[e for e in _events(w) if e[1] not in tiny.PACE] for w in (workdir, trained.workdir)]
    assert events[0] == events[1]


def test_a_resumed_run_is_the_uninterrupted_one_from_a_cache(base_path, tmp_path, monkeypatch):
    config = tiny.make_config(base_path, {"cache.mode": "build", "draws.count": 1, "train.validate_every": 0})
    whole = train_and_evaluate(config, tmp_path / "whole")
    _hook(monkeypatch, 4, _signal(signal.SIGINT))  # in the second epoch of three batches
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "resumed")
    monkeypatch.undo()
    resumed = train_and_evaluate(config, tmp_path / "resumed")
    tiny.assert_same_bits(jax.device_get(resumed), jax.device_get(whole))
    assert tiny.metrics_of(tmp_path / "resumed") == tiny.metrics_of(tmp_path / "whole")


def test_another_number_of_held_out_examples_on_the_way(base_path, tmp_path, capsys):
    """Each number has its own predictions in the cache; those of a time when folders had no number still count."""

    def make(held_out):
        changes = {"train.held_out": held_out, "train.evaluate_every": 2, "draws.count": 1}
        config = tiny.make_config(base_path, changes)
        caching.precompute(config, tmp_path)
        found = caching.open_held_out(tiny.settings_of(config), tmp_path)
        return found.folder.name, len(found), {p.name for p in (tmp_path / "cache").glob("held_out*")}

    assert make(4) == ("held_out-4", 4, {"held_out-4"})
    (tmp_path / "cache/held_out-4").rename(tmp_path / "cache/held_out")
    assert make(4) == ("held_out", 4, {"held_out"})
    assert make(2) == ("held_out-2", 2, {"held_out", "held_out-2"})
    capsys.readouterr()
    settings = tiny.settings_of(tiny.make_config(base_path, {"train.held_out": 3}))
    assert caching.open_held_out(settings, tmp_path) is None
    assert "no predictions for 3 held-out examples" in capsys.readouterr().out


def test_killed_between_its_two_files_a_run_still_ends_with_both(trained, tmp_path, monkeypatch):
    """The last checkpoint is there or not, mcm.safetensors is there or not: the same command completes the workdir."""
    workdir = trained.copy(tmp_path / "run")
    (workdir / "checkpoints/6").rename(tmp_path / "6")
    (workdir / "mcm.safetensors").unlink()
    save = Checkpoints.save

    def save_and_die(self, *args):
        save(self, *args)
        raise _Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(_Killed):
        train_and_evaluate(trained.config, workdir)
    monkeypatch.undo()
    train_and_evaluate(trained.config, workdir)
    assert_same_weights(workdir, trained.workdir)


def test_a_finished_run_stays_as_it_is(trained, tmp_path, capsys):
    workdir = trained.copy(tmp_path / "run")
    before = tiny.contents(workdir)
    end = train_and_evaluate(trained.config, workdir)
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out
    assert tiny.contents(workdir) == before
    tiny.assert_same_bits(jax.device_get(end), jax.device_get(trained.state))


def test_a_profile_of_steps_that_are_done_is_refused(trained, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    before = tiny.contents(workdir)
    with pytest.raises(UserError, match="--profile=1:3: none of these .*: 3 of 6 are done"):
        train_and_evaluate(trained.config, workdir, profile=(1, 3))
    assert tiny.contents(workdir) == before


def test_a_checkpoint_that_was_cut_off_does_not_count(trained, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    tiny_copy = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    (workdir / "checkpoints/6").rename(tiny_copy)
    (tiny_copy / "_CHECKPOINT_METADATA").unlink()
    checkpoints = Checkpoints(workdir, create=False)
    assert checkpoints.latest_step() == 3
    meta = {"base": "tiny", "fingerprint": trained.base.fingerprint}
    restored, _ = checkpoints.restore(trained.state, meta)
    checkpoints.close()
    assert int(restored.step) == 3


def test_no_checkpoint_yet(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoints.restore(trained.state, {"base": "", "fingerprint": ""})
    checkpoints.close()


def test_another_seed_is_another_run(trained, base_path, tmp_path):
    config = tiny.make_config(base_path, {"seed": 1, "train.validate_every": 0})
    other = train_and_evaluate(config, tmp_path / "run")
    kernels = [s.params["unet"]["conv_in"]["kernel"] for s in (other, trained.state)]
    assert not np.isclose(*kernels).any(axis=(0, 1)).all()
    pairs = zip(tiny.metrics_of(tmp_path / "run"), tiny.metrics_of(trained.workdir), strict=True)
    assert all(a["mse_of_base"] != b["mse_of_base"] for a, b in pairs)  # other noise, other order
    assert not (tmp_path / "run/validation").exists()


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, monkeypatch):
    make = step.make_noise_step

    def broken(*args, **kwargs):
        noise_step = make(*args, **kwargs)
        return lambda *a: (r := noise_step(*a)) | {"noise": r["noise"] * np.float32("nan")}

    monkeypatch.setattr(step, "make_noise_step", broken)
    with pytest.raises(UserError, match=r"the loss is nan at step 1, .*; lower train.learning_rate.*diverged.json"):
        train_and_evaluate(trained.config, tmp_path / "run")
    assert not (tmp_path / "run/mcm.safetensors").exists() and not (tmp_path / "run/metrics.jsonl").exists()
    batch = json.loads((tmp_path / "run/diverged.json").read_text())
    assert batch["step"] == 1 and batch["loss"] == "nan"
    assert batch["examples"] == training_batches(lambda i, d: {}, 12, 4, 0)[0]["index"].tolist()


def test_the_files_of_a_batch_are_known_with_a_cache_too(base_path, tmp_path):
    names = ("ash", "birch", "cedar")
    pictures = {"image": (tiny.SIZE, tiny.SIZE, 3), "segmentation": (tiny.SIZE,) * 2, "sketch": (tiny.SIZE,) * 2}
    for folder, shape in pictures.items():
        (tmp_path / "train" / folder).mkdir(parents=True)
        for name in names:
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "train" / folder / f"{name}.png")
    changes = {"data.name": "folder", "data.path": str(tmp_path), "cache.mode": "build", "draws.count": 1}
    changes |= {"data.held_out_share": 0.0, "train.validate_every": 0}
    settings = tiny.settings_of(tiny.make_config(base_path, changes))
    assembled = parts.assemble(settings, tmp_path / "run", sharding.make_mesh())
    assert assembled.feed.repeat == 1 and assembled.feed.names == names  # what diverged.json names examples by
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert parts.assemble(settings, tmp_path / "run", sharding.make_mesh()).feed.names == ()


def test_the_base_for_pictures_must_fit_in_every_process_split_as_it_is(base_path, monkeypatch):
    if jax.device_count() != 2:
        pytest.skip("as conftest.py sets it up, there are two devices")
    settings = tiny.settings_of(tiny.make_config(base_path, {"mesh.fsdp": 2}))
    mesh, shapes = sharding.make_mesh(settings.mesh), settings.base.outline()
    modulator = parts.fitting_modulator(settings, shapes.card)
    needed = Pipeline(shapes, Trained(modulator), settings.sampling, mesh).sampling_bytes(8)
    assert needed != Pipeline(shapes, Trained(modulator), settings.sampling).sampling_bytes(8)  # whole on each device
    for free, fits in (({0: needed}, True), ({0: needed, 1: None}, True), ({0: needed, 1: needed - 1}, False)):
        monkeypatch.setattr(distributed, "everyones", lambda own, free=free: free)
        base, _ = parts._base_for_pictures(settings, modulator, mesh, settings.sampling, 0)
        assert (base is not None) == fits
        assert not fits or sharding.mesh_of(base.params) == mesh

    asked = []
    monkeypatch.setattr(Pipeline, "sampling_bytes", lambda self, count: asked.append(count) or count)
    monkeypatch.setattr(distributed, "everyones", lambda own: {0: 10})
    for every, size, judged, counts in (
        (2, 16, 6, [8]),  # pictures, or control's batch where that is more
        (2, 16, 20, [16, 8]),  # and does it not fit, as few as pictures are
        (0, 16, 6, [6]),
        (2, 16, 0, [8]),
        (2, 4, 20, [4]),
        (0, 64, 64, [64, 8]),
    ):
        asked.clear()
        settings = tiny.settings_of(tiny.make_config(base_path, {"mesh.fsdp": 2, "train.validate_every": every}))
        sampling = settings.sampling.but(batch_size=size)
        base, sampling = parts._base_for_pictures(settings, modulator, mesh, sampling, judged)
        assert base is not None and asked == counts and sampling.batch_size == counts[-1]


def test_what_is_hidden_does_not_depend_on_the_noise(base, modulator):
    """Keys of different streams are different: `fold_in(k, 1)` is `split(k)[1]`, so one key must not serve both."""
    count = 1024
    image = np.zeros((count, *base.image_shape), np.uint8)
    maps = {m.name: m.null(count, *base.image_shape[:2]) for m in modulator.modalities}
    index = np.arange(count, dtype=np.int32)
    noise_step = step.make_noise_step(modulator, DRAWS, seed=0, drop_rate=0.5)
    never = np.zeros_like(index)
    out = jax.device_get(noise_step({"image": image, "index": index, "draw": never, "seen": never, **maps}))
    shown = out["present"].astype(np.float32) - out["present"].mean(0)
    first_values = out["noise"].reshape(count, -1)[:, :8]
    correlation = np.abs(shown.T @ first_values) / count
    assert correlation.max() < 0.1  # the error that was here once gave 0.4


def test_processes_compare_their_source_files(base_path, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(distributed, "agree", said.append)
    caching.agree_on(tiny.settings_of(tiny.make_config(base_path)))
    package = tmp_path / "mcm_jax"
    shutil.copytree(tiny.ROOT / "mcm_jax", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").mkdir()
    shutil.copy(tiny.ROOT / "mcm_jax/assets/__init__.py", package / "assets")
    digest = version.source_digest(package)
    assert said[0]["source files of mcm-jax"] == digest[:16] and said[0]["config.seed"] == "0"
    with (package / "training/step.py").open("a") as file:
        file.write("# edited\n")
    edited = version.source_digest(package)
    (package / "training/step.py").rename(package / "training/steps.py")
    assert len({digest, edited, version.source_digest(package)}) == 3


HANGS = """
import sys, threading
from mcm_jax import cli, distributed
from mcm_jax.distributed import watch
from mcm_jax.errors import UserError
from mcm_jax.training import assembly

def main(_):
    distributed.synchronise("begun")
    if distributed.is_first():
        distributed.synchronise("never")
    with assembly.closed(threading.Event().wait):
        raise UserError("a picture is damaged")

watch._SILENCE = 4
cli.define_distributed_flags()
cli.run(main)
"""


def test_an_error_is_told_though_closing_hangs(tmp_path):
    """As a checkpoint's does where another process does not come."""
    (tmp_path / "program.py").write_text(HANGS)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, tmp_path / "program.py", f"--coordinator=localhost:{port}", "--num_processes=2"]
    how = dict(cwd=tiny.ROOT, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)}, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, f"--process_id={i}"], **how) for i in range(2)]
    try:
        said = [process.communicate(timeout=120)[1].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert said[0].startswith("error: process 1 failed: a picture is damaged; all processes have stopped"), said[0]
    assert said[1] == "error: a picture is damaged"
