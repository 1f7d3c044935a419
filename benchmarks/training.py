"""One training step with the base (online) and without it (cached), in the same process: images a second and waiting.

python -m benchmarks.training --size=60m --batch=2 --out=benchmarks/results/training_cpu.json
python -m benchmarks.training --size=sd15 --dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=1000 --draws=5 \
    --steps=200 --out=benchmarks/results/training_h200.json

Stable Diffusion 1.5's networks with random weights (60m: shrunk), latents of 64x64x4, for each of the MCM's sizes. A
real cache is built first. Blocks of steps alternate between the two, through the iterators that train.py uses, after a
block that warms up. `idle` is the share of a cached step by which it takes longer than the same step on a record that
lies on the device already: reading, transfer and noise. With --only, one kind alone in a process of its own, whose peak
of memory then counts.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import jax

from benchmarks import common
from benchmarks.cache_build import build_cache
from configs import default
from mcm_jax import config as config_lib
from mcm_jax import sharding
from mcm_jax.cache import Cache
from mcm_jax.data.inputs import prepare
from mcm_jax.draws import Draws
from mcm_jax.training import RunSettings, feed, state, step
from mcm_jax.training.optimizer import make_optimizer, make_schedule


def make_modulator(card, size: str, dtype: str):
    """The MCM of configs/default.py in one of its sizes; "paper" also has the paper's form."""
    c = default.get_config()
    c.mcm.update(default.SIZES[size] | {"dtype": dtype, "conditions": "grid"})
    c.modalities.segmentation.channels = 150
    c.data.name, c.data.path = "folder", "random-pictures"  # neither is there, nor needed
    if size == "paper":
        default.paper_form(c)
    settings = config_lib.read(RunSettings, c)
    return settings.mcm.modulator(settings.modalities.shown, card)


class Runner:
    """Steps of one kind, with a state of its own."""

    def __init__(self, source: feed.Feed, modulator, draws: Draws, batch: int):
        self.mesh = sharding.make_mesh()
        schedule = make_schedule("cosine", steps=100_000, learning_rate=1e-4, warmup_steps=0, decay_steps=0)
        optimizer = make_optimizer("adamw", schedule, weight_decay=0.01, clip_norm=1.0)
        self.step = step.make_train_step(modulator, optimizer, weighting="eps", l1=0.0, ema_decay=0.999)
        params = jax.jit(lambda key: modulator.init(key, source.card.latent_shape))(jax.random.key(0))
        self.state = sharding.replicate(state.init_state(params, optimizer), self.mesh)
        noise_step = step.make_noise_step(modulator, draws, seed=0, drop_rate=0.3)
        self.records = source.records(noise_step, batch_size=batch, seed=0, steps=range(1_000_000), mesh=self.mesh)
        self.record = None

    def block(self, steps: int, *, fixed: bool = False) -> float:
        """Seconds a step over some steps; with `fixed`, all on the last record."""
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        for _ in range(steps):
            if not fixed:
                self.record = next(self.records)
            self.state, _ = self.step(self.state, self.record)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - began) / steps


def peak_memory_alone(kind: str, mcm: str) -> dict | str:
    """Of one kind of training, in a process that does nothing else; its last words where it failed."""
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], f"--only={kind}"]
    command += ["--rounds=1", "--steps=1", f"--mcm={mcm}"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the caller holds a part of the device
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return f"failed with status {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])["peak_memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "60m", "tiny"), default="60m")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--mcm", nargs="+", default=["medium", "paper"], choices=tuple(default.SIZES))
    parser.add_argument("--mcm_dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of a block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("online", "cached"), help="print this one's pace and peak memory")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/training_benchmark"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    folder = args.workdir / f"cache-{args.size}-{args.examples}x{args.draws}"
    base = None
    if args.only != "cached":
        base = common.make_base(args.size, args.dtype)
    if not args.only:
        build_cache(folder, base, args.examples, args.draws, max(args.batch, 4))
    alone = {} if args.only else {kind: peak_memory_alone(kind, args.mcm[-1]) for kind in ("online", "cached")}
    cache = Cache(folder)
    mesh, feeds = sharding.make_mesh(), {}
    draws = Draws(0, args.draws, (1.0,), cache.card.schedule.num_train_timesteps, 0.1)
    if args.only != "online":
        feeds["cached"] = feed.cached(cache)
    if base:
        inputs = prepare(base, common.Noise(args.examples, base.image_shape), common.MODALITIES, mesh)
        feeds["online"] = feed.online(base, inputs, draws, 1, {}, mesh)
    rows = {}
    for size in args.mcm:
        modulator = make_modulator(cache.card, size, args.mcm_dtype)
        runners = {name: Runner(source, modulator, draws, args.batch) for name, source in feeds.items()}
        taken: dict[str, list[float]] = {name: [] for name in [*runners, "on_device"]}
        for runner in runners.values():
            runner.block(1)
        for _ in range(args.rounds):
            for name, runner in runners.items():
                # The base's step takes long enough: fewer of them.
                taken[name].append(runner.block(args.steps if name == "cached" else max(1, args.steps // 10)))
            if "cached" in runners:
                taken["on_device"].append(runners["cached"].block(args.steps, fixed=True))
        row = {f"{name}_seconds": [round(t, 5) for t in times] for name, times in taken.items() if times}
        pace = {name: common.median(times, 6) for name, times in taken.items() if times}
        row |= {f"{name}_images_per_second": round(args.batch / t, 2) for name, t in pace.items()}
        if "cached" in pace:
            row["idle"] = round(max(0.0, 1 - pace["on_device"] / pace["cached"]), 3)
        if len(runners) == 2:
            row["times_faster_cached"] = round(pace["online"] / pace["cached"], 2)
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(next(iter(runners.values())).state.params))
        rows[size] = row
        print(size, row, flush=True)
    report = {
        "base": {"size": args.size, "dtype": args.dtype, "unet_parameters": cache.card.unet_parameters},
        "mcm_dtype": args.mcm_dtype,
        "batch_size": args.batch,
        "examples": args.examples,
        "draws": args.draws,
        "steps_of_a_block": args.steps,
        "rows": rows,
        "peak_memory": common.peak_memory(),
    }
    if args.only:
        print(json.dumps(report))
        return
    report.pop("peak_memory")  # of both together, and of the build
    report["peak_memory_alone"] = alone
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
