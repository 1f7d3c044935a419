"""Several processes: two real ones, each with two devices, on this machine."""

import concurrent.futures
import contextlib
import dataclasses
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tiny

from mcm_jax import distributed
from mcm_jax.distributed.ending import may_follow
from mcm_jax.errors import UserError

# tests/cluster_program.py says what happens in each.
SCENES = (
    "killed-barrier-1",  # this and the next one take longest
    "killed-collective-1",
    "agrees",
    "killed-collective-0",
    "fails-collective",
    "first-fails-collective",
    "paused",
    "differs",
    "interrupted",
)


@dataclasses.dataclass
class Ended:
    """A process that came to its end."""

    status: int
    out: str
    err: str
    at: float


class Process:
    """A process whose output is read as it comes."""

    def __init__(self, command, env):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.started = subprocess.Popen(command, cwd=tiny.ROOT, env=env, text=True, **pipes)
        self.ready, self.out, self.err = threading.Event(), [], []
        self._readers = [
            threading.Thread(target=self._read, args=(self.started.stdout, self.out)),
            threading.Thread(target=self._read, args=(self.started.stderr, self.err)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines):
        for line in stream:
            lines.append(line)
            if line == "ready\n":
                self.ready.set()

    def end(self):
        """Waits for it."""
        try:
            status = self.started.wait(120)
        except subprocess.TimeoutExpired:  # its stacks are on stderr
            raise AssertionError(f"no end within 120 s:\n{''.join(self.out)}\n{''.join(self.err)}") from None
        finally:
            self.started.kill()
        at = time.monotonic()
        for reader in self._readers:
            reader.join()
        return Ended(status, "".join(self.out), "".join(self.err).strip(), at)


def free_port():
    """Below the range that the system takes from: no other scene's connection may come by it meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def both(*processes):
    """Their ends, in this order."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(Process.end, processes))


def play(scene):
    """The ends of both processes, and when one was killed."""
    port, killed = free_port(), None
    command = [sys.executable, "tests/cluster_program.py"]
    env = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    processes = [Process([*command, scene, str(port), str(i)], env) for i in range(2)]
    if scene.startswith("killed"):
        for process in processes:
            assert process.ready.wait(150), process.err
        time.sleep(1)
        processes[int(scene[-1])].started.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    return both(*processes), killed


@pytest.fixture(scope="module")
def ends():
    """What comes of each scene; they mostly wait, so some are played side by side."""
    pool = concurrent.futures.ThreadPoolExecutor(4)
    played = {scene: pool.submit(play, scene) for scene in SCENES}
    yield lambda scene: played[scene].result(timeout=240)
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
def test_processes_agree_stop_at_one_step_and_leave_together(ends):
    (first, second), _ = ends("agrees")
    assert [(one.status, one.err) for one in (first, second)] == [(0, "")] * 2
    stops = [re.findall(r"stopped.*", one.out) for one in (first, second)]
    assert len(stops[0]) == 2 and stops[0] == stops[1], stops
    for one in (first, second):
        assert "another process is training in this workdir" in one.out and "\nheld" not in one.out
        assert "finished" in one.out and "done" in one.out


@pytest.mark.slow
def test_processes_that_differ_all_say_in_what(ends):
    for one in ends("differs")[0]:
        assert one.status == 1
        assert one.err == (
            "error: the processes do not agree on version, code. All of them need the same:\n"
            "  version: process 0 '0.0', process 1 '0.1'\n"
            "  code: process 0 '0', process 1 '1'"
        )


@pytest.mark.slow
def test_a_saved_stop_is_no_failure(ends):
    assert [(one.status, one.err) for one in ends("interrupted")[0]] == [(130, "saved")] * 2


@pytest.mark.slow
def test_a_pause_of_some_seconds_is_no_death(ends):
    assert [(one.status, one.err) for one in ends("paused")[0]] == [(0, "")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("scene", [s for s in SCENES if "fails" in s])
def test_an_error_in_one_process_ends_the_other(ends, scene):
    processes, _ = ends(scene)
    failing = 0 if scene.startswith("first") else 1
    bad, other = processes[failing], processes[1 - failing]
    assert (bad.status, bad.err) == (1, "error: a picture is damaged\nand more")
    assert other.status == 1
    assert other.err.startswith(f"error: process {failing} failed: a picture is damaged; all processes have stopped")
    assert len(other.err.splitlines()) == 1
    assert abs(other.at - bad.at) < 15


@pytest.mark.slow
@pytest.mark.parametrize("scene", [s for s in SCENES if "killed" in s])
def test_the_death_of_one_process_ends_the_other(ends, scene):
    processes, killed = ends(scene)
    dead = int(scene[-1])
    other = processes[1 - dead]
    assert processes[dead].status == -signal.SIGKILL
    assert other.status == 1
    assert other.err.startswith("error: process 1 has not been heard of for 20 s" if dead else "error: process 0 is go")
    assert len(other.err.splitlines()) == 1
    assert other.at - killed < 40  # some 22 s on an idle machine; at once for process 0
    cost = float(re.search(r"any_process (.*) us", other.out)[1])
    assert cost < 50


@pytest.mark.slow
def test_a_build_that_fails_in_one_process_ends_in_all(base_path, tmp_path):
    program = """
import runpy, sys
from mcm_jax.cache import store
if "--process_id=1" in sys.argv:
    def fail(*_):
        raise OSError(28, "No space left on device")
    store.write_shard = fail
runpy.run_path("precompute.py", run_name="__main__")
"""
    flags = tiny.config_flags(base_path, {"data.size": 8, "cache.shard_draws": 4})
    flags += [f"--workdir={tmp_path}", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    command = [sys.executable, "-c", program, *flags]
    env = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    good, bad = both(*(Process([*command, f"--process_id={i}"], env) for i in range(2)))
    assert (good.status, bad.status) == (1, 1)
    assert "the disk is full" in bad.err.splitlines()[-1] and "Traceback" not in bad.err
    assert "error: process 1 failed: " in good.err.splitlines()[-1] and "the disk is full" in good.err.splitlines()[-1]
    assert abs(good.at - bad.at) < 15


def test_a_process_by_itself_has_nothing_to_wait_for():
    with distributed.cluster(None):
        distributed.synchronise("alone")
        distributed.agree({"config": "any"})
        assert distributed.is_first()
        assert [distributed.any_process(flag) for flag in (False, True, False)] == [False, True, False]
        distributed.fail(ValueError())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None), "--num_processes and --process_id go with --coordinator"),
        ((None, None, 0), "--num_processes and --process_id go with --coordinator"),
        (("host:1234", None, None), "needs --num_processes=N and --process_id=I"),
        (("host:1234", 2, 2), "with I in 0..N-1"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:http", 2, 0), "expected HOST:PORT"),
        (("auto", 2, 0), "leave them out"),
        (("auto", None, None), "JAX finds no cluster.*Slurm.*--coordinator=HOST:PORT"),
    ],
)
def test_flags_that_lead_to_no_cluster_are_refused(arguments, message):
    with pytest.raises(UserError, match=message), distributed.cluster(*arguments):
        pass


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="cannot listen there"), distributed.cluster(f"localhost:{port}", 2, 0):
            pass


def test_the_errors_that_may_follow_from_another_process_end():
    import jax

    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    wrapped = UserError("a checkpoint could not be written")
    wrapped.__cause__ = lost
    assert may_follow(lost) and may_follow(wrapped)
    assert not may_follow(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not may_follow(UserError("a picture is damaged"))
