"""MCMs trained by train.py from a cache for the seconds that another method's steps take, judged as the peers are.

python -m benchmarks.equal_time --config=scenes_sd --methods mcm-slim --as=full --as_steps=500 --text_guidance=1 \
    --cost=benchmarks/results/peers_cost_of_equal_time.json --workdir=runs/equal_time
python -m benchmarks.peers.table --config=scenes_sd --methods mcm-slim --steps=STEPS --workdir=runs/equal_time \
    --out=benchmarks/results/equal_time_scenes_sd.json

Seconds are those of a training step as :mod:`benchmarks.peers.cost` measured them; the cache's predictions, one for
each picture and draw, are taken off the MCM's. A loop has some overhead beyond its steps, which is in neither. Rates
are bracketed and maps divided as in :mod:`benchmarks.peers.run`, whose files these are, too.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from benchmarks import common
from benchmarks.peers import run
from benchmarks.peers.judging import Drawer
from benchmarks.peers.methods import METHODS, SIZES, make_method
from benchmarks.peers.train import decay_steps
from benchmarks.peers.world import open_world
from mcm_jax.errors import UserError
from mcm_jax.mcm import parameter_count
from mcm_jax.trained import WEIGHTS
from mcm_jax.training.actions import DIVERGED


def steps_of(cost: dict, name: str, other: str, other_steps: int, pairs: int, draws: int) -> int:
    """Steps of an MCM, and its cache, in the seconds of another method's steps.

    Raises:
      UserError: a method was not measured, or the cache alone takes longer.
    """
    rows, batch = cost["rows"], cost["batch"]
    if absent := [method for method in (name, other) if method not in rows]:
        raise UserError(f"--cost: {absent[0]} was not measured there; known are {', '.join(rows)}")
    cache = pairs * draws / batch * cost["base"]["seconds"]
    budget = other_steps * rows[other]["training_seconds"]
    if (steps := int((budget - cache) / rows[name]["training_seconds"])) < 1:
        raise UserError(
            f"{other_steps} steps of {other} take {budget:.0f} s, and a cache of --draws={draws} takes {cache:.0f} s"
        )
    return steps


def train_py(
    args: argparse.Namespace, name: str, shapes: Any, steps: int, rate: float, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Params, which have these shapes, and what there is to say of a run of train.py."""
    kept = args.workdir / args.config / f"pairs={args.pairs},draws={args.draws}"
    workdir = kept / f"{name},steps={steps},batch={args.batch_size},rate={rate:.3g},seed={seed}"
    size = name.removeprefix("mcm-")
    changes = {f"mcm.{k}": v for k, v in SIZES[size].items()}
    changes |= {"data.size": args.pairs, "draws.count": args.draws, "cache.mode": "build", "seed": seed}
    changes |= {"cache.path": kept / "cache", "cache.load_base": False, "train.batch_size": args.batch_size}
    changes |= {"train.steps": steps, "train.learning_rate": rate, "train.schedule": args.schedule}
    changes |= {"train.optimizer": args.optimizer}
    if args.schedule == "wsd":
        changes["train.decay_steps"] = decay_steps(steps)
    changes |= {"train.validate_every": 0, "train.checkpoint_every": steps}
    flags = [f"--config.{k}={v}" for k, v in changes.items()]
    began, finished = time.perf_counter(), (workdir / WEIGHTS).exists()  # as far as it had come before
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    command = [sys.executable, "train.py", f"--config=configs/{args.config}.py", *flags, f"--workdir={workdir}"]
    if subprocess.run(command, check=False).returncode and not (workdir / DIVERGED).exists():
        raise SystemExit(f"{workdir}: train.py failed")
    took = None if finished else round(time.perf_counter() - began, 1)
    if (workdir / DIVERGED).exists():  # it has no score
        params = jax.tree.map(lambda s: np.full(s.shape, np.nan, np.float32), shapes)
    else:
        params = traverse_util.unflatten_dict(safetensors.numpy.load_file(workdir / WEIGHTS), sep="/")
    said = {"rate": rate, "steps": steps, "seed": seed, "parameters": parameter_count(params), "draws": args.draws}
    return params, said | {"seconds": took, "weighting": "the config's", "trained_by": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes_sd", help="a file in configs/, of a shipped base")
    mine = [name for name in METHODS if name.removeprefix("mcm-") in SIZES]
    parser.add_argument("--methods", nargs="+", default=["mcm-slim"], choices=mine, metavar="METHOD")
    parser.add_argument("--as", dest="other", default="full", help="the method whose seconds they have")
    parser.add_argument("--as_steps", type=int, default=500)
    parser.add_argument("--cost", type=pathlib.Path, required=True, help="what benchmarks.peers.cost wrote")
    parser.add_argument("--draws", type=int, default=8, help="of the cache")
    run.add_optimizer(parser, "of the MCMs, as --cost measured it")
    run.add_selection(parser)
    parser.add_argument("--pairs", type=int, default=1_500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--select", type=int, default=64)
    parser.add_argument("--report", type=int, default=128)
    parser.add_argument("--references", type=int, default=1_000)
    parser.add_argument("--sampling_steps", type=int, default=16)
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--text_guidance", type=float)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/equal_time"))
    args = parser.parse_args()
    cost = json.loads(args.cost.read_text())
    measured = {"config": cost["config"], "batch_size": cost["batch"], "size": cost["size"]}
    measured["optimizer"] = cost.get("optimizer", "adamw")
    asked = {"config": args.config, "batch_size": args.batch_size, "size": None, "optimizer": args.optimizer}
    if measured != asked:
        raise SystemExit(f"{args.cost} is of {measured}, but {asked} was asked for")
    sizes = {k: getattr(args, k) for k in ("pairs", "select", "report", "references")}
    world = open_world(args.config, **sizes, text_guidance=args.text_guidance)
    common.use_compilation_cache(args.workdir)
    for name in args.methods:
        args.steps = steps = steps_of(cost, name, args.other, args.as_steps, args.pairs, args.draws)
        settings = sizes | {"draws": args.draws, "text_guidance": world.run.sampling.text_guidance}
        settings |= {"sampling_steps": args.sampling_steps, "guidances": args.guidances, "batch_size": args.batch_size}
        settings |= {
            "base": world.base.fingerprint,
            "config": dataclasses.asdict(world.run),
            "as": [args.other, args.as_steps, cost["commit"]],
        }
        settings |= run.trained_with(args) | run.selected_at(args)
        run.check_settings(run.folder_of(args, "settings.json"), settings)
        print(f"{name}: {steps} steps in the seconds of {args.as_steps} of {args.other}", flush=True)
        method = make_method(name, world.base, world.modalities, world.run.mcm)
        shapes = method.modulator.shapes(world.base)
        train = functools.partial(train_py, args, name, shapes, steps)
        draw = Drawer(world, method, args.sampling_steps)
        cells = run.Cells(run.folder_of(args, name), name, world, method, train, draw, args.select_guidance)
        cells.finish(cells.best_rate(2e-3, args.seeds), args.seeds, args.guidances)


if __name__ == "__main__":
    with common.plain_errors():
        main()
