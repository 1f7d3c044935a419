"""A program for several processes, which tests/test_distributed.py starts: what it does is its first argument.

python cluster_program.py SCENE PORT PROCESS
"""

import faulthandler
import os
import pathlib
import signal
import sys
import tempfile
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from mcm_jax import cli, distributed, files
from mcm_jax.distributed import joining
from mcm_jax.errors import Busy, Interrupted, UserError
from mcm_jax.training.assembly import lock_once

SCENE, PORT, PROCESS = sys.argv[1], sys.argv[2], int(sys.argv[3])
SLOW, FAILS = 0.02, 1


def say(*words):
    """In one write: two processes may share the stream. A script's own, where cli.run keeps all but the first quiet."""
    sys.__stdout__.write(" ".join(map(str, words)) + "\n")
    sys.__stdout__.flush()


def collective():
    """Something that waits for the other process' devices."""
    return multihost_utils.process_allgather(np.ones(()))


def agrees():
    """Agreement, steps that stop together twice, a late one's end."""
    assert distributed.is_first() == (PROCESS == 0) and jax.process_index() == PROCESS
    distributed.agree({"config": "a", "data": "b"})
    distributed.agree({"config": "a"})
    for round_ in range(2):
        for step in range(10_000):
            time.sleep(SLOW * (1 + PROCESS))  # without a collective each has its own pace
            if distributed.any_process(step >= 20 and 1 - round_ == PROCESS):
                say("stopped at", step)
                break
        distributed.synchronise("stopped")
    if PROCESS:
        distributed.synchronise("last")
    if distributed.any_process(PROCESS == 1):  # asked after the other's last call: nobody gets it
        say("stopped again")
    if not PROCESS:
        distributed.synchronise("last")
    began = time.perf_counter()
    rounds = 10
    for _ in range(rounds):
        distributed.synchronise("timed")
    say("barrier", f"{(time.perf_counter() - began) / rounds * 1e6:.0f} us")
    finds_it_held()
    time.sleep(3 * PROCESS)
    say("done")


def finds_it_held():
    """A workdir that another program holds, which the first process alone asks for."""
    with tempfile.TemporaryDirectory() as folder, files.lock(folder, "training in this workdir", "--workdir"):
        try:
            with lock_once(pathlib.Path(folder), finished=False):
                say("held")
        except Busy as e:
            say("busy:", e)
        with lock_once(pathlib.Path(folder), finished=True):
            say("finished")


def steps(wait):
    """Trains, so to speak, until something happens to one of the processes."""
    say("ready")
    began = time.perf_counter()
    for _ in range(1000):
        distributed.any_process(False)
    say("any_process", f"{(time.perf_counter() - began) * 1e3:.2f} us")
    while True:
        wait()
        time.sleep(SLOW)


def main(_):
    """The scene."""
    if SCENE == "agrees":
        agrees()
    elif SCENE == "differs":
        distributed.agree({"config": "same", "version": f"0.{PROCESS}", "data": "same", "code": f"{PROCESS:x}"})
    elif SCENE == "interrupted":
        time.sleep(PROCESS)
        raise Interrupted("saved")
    elif SCENE in ("fails-barrier", "fails-collective", "first-fails-collective"):
        collective()
        if (0 if SCENE.startswith("first") else FAILS) == PROCESS:
            time.sleep(1)
            raise UserError("a picture is damaged\nand more")
        collective() if "collective" in SCENE else distributed.synchronise("never")
    elif SCENE.startswith("killed"):
        collective()
        if int(SCENE[-1]) == PROCESS:
            say("ready")
            signal.pause()
        steps(collective if "collective" in SCENE else lambda: distributed.synchronise("step"))
    elif SCENE == "paused":  # one that holds the GIL for some seconds
        collective()
        if PROCESS == 1:
            ctypes_sleep(8)
        distributed.synchronise("after")
        say("done")


def ctypes_sleep(seconds):
    """Sleeps with the GIL held."""
    import ctypes

    ctypes.PyDLL(None).sleep(seconds)


if __name__ == "__main__":
    joining._TOGETHER = 4 if SCENE == "alone" else 60
    cli.define_distributed_flags()
    sys.argv = [sys.argv[0], f"--coordinator=localhost:{PORT}", "--num_processes=2", f"--process_id={PROCESS}"]
    faulthandler.dump_traceback_later(100)  # before the test gives up: where it hangs
    say("pid", os.getpid())
    cli.run(main)
