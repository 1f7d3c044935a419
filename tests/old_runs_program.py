"""Run by test_old_runs.py in a process of its own: what older versions wrote is gone on with, sampled from, evaluated.

old_runs_program.py FOLDER

FOLDER gets found.npz (params, their average, samples), the run, and the evaluation's metrics.json.
"""

import json
import pathlib
import shutil
import sys

import jax
import ml_collections
import numpy as np
import tiny
from flax import traverse_util
from jax.sharding import AxisType

from mcm_jax import sharding
from mcm_jax.evaluation.evaluate import evaluate
from mcm_jax.jobs import Drawer
from mcm_jax.training import train_and_evaluate

OLD = tiny.ROOT / "tests/fixtures/v0_1"
MAPS = {name: str(tiny.ROOT / f"docs/examples/{name}.png") for name in ("segmentation", "sketch")}


def main(folder):
    folder = pathlib.Path(folder)
    workdir = shutil.copytree(OLD / "workdir", folder / "run")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    end = jax.device_get(train_and_evaluate(config, workdir))
    found = traverse_util.flatten_dict({"params": end.params, "ema_params": end.ema_params}, sep="/")

    # On one device, as then: a batch over two is rounded otherwise.
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
    sharding.local_mesh = lambda settings=None: mesh
    drawer = Drawer(str(OLD / "mcm"), steps=3, batch_size=2)
    jobs = [drawer.job(f"{i}", {"conditions": MAPS, "seed": 5, "sample": i}) for i in range(2)]
    found["samples"] = drawer.sample(jobs)
    np.savez(folder / "found.npz", **found)
    evaluate(str(OLD / "mcm"), folder / "metrics.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
