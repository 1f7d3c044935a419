"""One training, whatever it runs on: devices, processes, machines that change on the way. Real loopback processes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

pytestmark = [pytest.mark.slow]

SAME = {
    **tiny.SMALL,
    **{"data.size": 12, "draws.count": 2, "cache.dtype": "float32", "cache.batch_size": 8, "loss.weighting": "eps"},
    **{"train.batch_size": 16, "train.accumulate": 2, "train.schedule": "constant", "train.warmup_steps": 0},
    **{"train.log_every": 1, "train.checkpoint_every": 100, "train.validate_every": 0},
}
STEPS = 15


def free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(root, base, plan, devices, processes=1):
    """The processes of a cluster, started."""
    env = tiny.environment(devices) | {"PYTHONPATH": f"{tiny.ROOT}:{tiny.ROOT / 'tests'}"}
    command = [sys.executable, str(tiny.ROOT / "tests/scale_program.py"), str(root), str(base), json.dumps(plan)]
    cluster = [f"localhost:{free_port()}", str(processes)]
    extra = [[*cluster, str(i)] if processes > 1 else [] for i in range(processes)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, *more], cwd=tiny.ROOT, env=env, **pipe) for more in extra]


def finish(started):
    said = [p.communicate(timeout=400)[0] for p in started]
    assert [p.returncode for p in started] == [0] * len(started), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def curves(small_path, tmp_path_factory):
    """Workdirs of the same training: on one device, on eight, on two processes with four each, and on all in turn."""
    root = tmp_path_factory.mktemp("scale")
    cached = SAME | {"cache.mode": "build", "cache.path": str(root / "cache")}
    steps = lambda n, changes: {**changes, "train.steps": n}  # noqa: E731
    finish(start(root, small_path, [("two_x_four", steps(STEPS, SAME)), ("mixed", steps(5, cached))], 4, 2))
    one = [("one", steps(STEPS, SAME)), ("one_cached", steps(STEPS, cached)), ("mixed", steps(10, cached))]
    finish(start(root, small_path, one, 1))
    finish(start(root, small_path, [("eight", steps(STEPS, SAME)), ("mixed", steps(STEPS, cached))], 8))
    return root


def losses(workdir):
    lines = tiny.metrics_of(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return np.array([line["loss"] for line in lines])


@pytest.mark.parametrize("name, reference", [("eight", "one"), ("two_x_four", "one"), ("mixed", "one_cached")])
def test_devices_and_processes_train_as_one(curves, name, reference):
    """15 steps, with accumulation, online and from a cache, float32; `mixed` changes the machine twice on the way."""
    found, expected = losses(curves / name), losses(curves / reference)
    print(f"{name}: largest difference {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-2


def test_processes_write_once(curves):
    names = {p.name for p in (curves / "two_x_four").iterdir()}
    assert names == {"config.json", "checkpoints", "mcm.safetensors", "metrics.jsonl", "tensorboard"}
    assert len(list((curves / "two_x_four/tensorboard").iterdir())) == 1
    assert [p.name for p in (curves / "two_x_four/checkpoints").iterdir()] == [str(STEPS)]


def _command(small_path, workdir, port, number, changes):
    flags = tiny.config_flags(small_path, SAME | {"train.steps": 4000, "train.log_every": 5} | changes)
    cluster = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
    return [sys.executable, "train.py", *flags, f"--workdir={workdir}", *cluster]


def _start_training(small_path, workdir, changes=((), ())):
    port, env = free_port(), tiny.environment(devices=1)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [_command(small_path, workdir, port, i, dict(changes[i])) for i in range(2)]
    return [subprocess.Popen(c, cwd=tiny.ROOT, env=env, **pipe) for c in commands]


def _wait_for_steps(processes, workdir):
    until = time.monotonic() + 240
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        if (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_size:
            return
        time.sleep(0.05)
    raise AssertionError([p.communicate() for p in processes])


def test_a_signal_to_one_process_saves_on_all(small_path, tmp_path):
    workdir = tmp_path / "run"
    processes = _start_training(small_path, workdir)
    try:
        _wait_for_steps(processes, workdir)
        processes[1].send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=60) for p in processes]
    finally:
        [p.kill() for p in processes]
    assert [p.returncode for p in processes] == [130, 130], said
    (stopped,) = {int(re.search(r"stopped by a signal at step (\d+)", err)[1]) for _, err in said}
    assert (workdir / f"checkpoints/{stopped}/state").is_dir() and "Traceback" not in said[0][1] + said[1][1]


def test_a_death_of_one_process_ends_the_other(small_path, tmp_path):
    workdir = tmp_path / "run"
    processes = _start_training(small_path, workdir)
    try:
        _wait_for_steps(processes, workdir)
        os.kill(processes[1].pid, signal.SIGKILL)
        began = time.monotonic()
        _, err = processes[0].communicate(timeout=60)
    finally:
        [p.kill() for p in processes]
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert processes[0].returncode == 1 and "error: process 1" in err and "Traceback" not in err, err


def test_processes_that_differ_are_refused(small_path, tmp_path):
    processes = _start_training(small_path, tmp_path / "run", ((), {"train.learning_rate": 0.5}.items()))
    said = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [1, 1], said
    assert all("config.train.learning_rate" in err and "0.5" in err for err in said), said
    assert not (tmp_path / "run").exists()
