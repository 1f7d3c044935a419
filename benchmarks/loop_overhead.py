"""What the training loop costs beside the compiled step, and its pace beside that of another commit.

python -m benchmarks.loop_overhead --before=FOLDER --out=benchmarks/results/loop_overhead.json

`configs/demo.py` from its cache. First, in this process, blocks of steps alternate: the whole loop (reading, noise,
reports, a checkpoint) and the bare jitted step on one record that lies on the device. Then, with --before (a checkout
of another commit), its train.py and this one's alternate, images a second by their own reports.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import jax

from benchmarks import common
from configs import demo
from mcm_jax import sharding
from mcm_jax.config import read
from mcm_jax.training import RunSettings, precompute, step
from mcm_jax.training import parts as parts_lib
from mcm_jax.training.actions import Checkpoint, Report
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Clock, train
from mcm_jax.training.optimizer import make_optimizer, make_schedule
from mcm_jax.training.state import init_state


def in_this_process(config, workdir: pathlib.Path, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step: of the loop, and of the bare step."""
    settings, mesh = read(RunSettings, config), sharding.make_mesh()
    parts, t = parts_lib.assemble(settings, workdir, mesh), settings.train
    schedule = make_schedule("cosine", steps=10_000, learning_rate=1e-3, warmup_steps=0, decay_steps=1)
    optimizer = make_optimizer("adamw", schedule, weight_decay=t.weight_decay, clip_norm=t.clip_norm)
    params = jax.jit(lambda key: parts.modulator.init(key, parts.card.latent_shape))(jax.random.key(0))
    state = sharding.replicate(init_state(params, optimizer), mesh)
    noise_step = step.make_noise_step(
        parts.modulator, settings.draws_for(parts.card), seed=0, drop_rate=settings.modalities.drop_rate
    )
    how = dict(batch_size=t.batch_size, seed=0, mesh=mesh)
    (record,) = parts.feed.records(noise_step, steps=range(1), **how)
    jitted = step.make_train_step(parts.modulator, optimizer, weighting="v", l1=0.0, ema_decay=0.99)
    train_step = CompiledStep(jitted, state, record)
    log, checkpoints = Log(workdir, 0), Checkpoints(workdir, 1)
    report = Report(
        log, every=50, batch_size=t.batch_size, learning_rate=jax.jit(schedule), blame=lambda step: {}, workdir=workdir
    )
    save = Checkpoint(workdir, checkpoints, settings=settings, report=report, card=parts.card, meta={"fingerprint": ""})
    state, _ = train_step(state, record)
    taken, done = {"loop": [], "bare": []}, 1
    for _ in range(rounds):
        block, clock = range(done, done + steps), Clock()
        records = parts.feed.records(noise_step, steps=block, waited=clock.wait, **how)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state = train(state, train_step, records, block, [report, save], clock)
        jax.block_until_ready(state)
        taken["loop"].append((time.perf_counter() - began) / steps)
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = train_step(state, record)
        jax.block_until_ready(state)
        taken["bare"].append((time.perf_counter() - began) / steps)
        done += 2 * steps
    log.close()
    checkpoints.close()
    return taken


def by_command(folder: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path, steps: int) -> list[float]:
    """Images a second that a checkout's train.py reports, without the first report."""
    shutil.rmtree(workdir, ignore_errors=True)
    flags = {"cache.mode": "on", "cache.path": cache.absolute(), "train.steps": steps, "train.log_every": steps // 6}
    flags |= {"train.checkpoint_every": steps}
    command = [sys.executable, "train.py", "--config=configs/demo.py", f"--workdir={workdir.absolute()}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    env = os.environ | {"PYTHONPATH": str(folder.absolute())}
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [round(line["images_per_second"], 1) for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=pathlib.Path)
    parser.add_argument("--turns", type=int, default=2, help="of the two commits")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("runs/loop_overhead/cache"))
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/loop_overhead"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    config = demo.get_config()
    config.cache.path = str(args.cache)
    precompute(config, args.workdir)
    shutil.rmtree(args.workdir / "run", ignore_errors=True)
    taken = in_this_process(config, args.workdir / "run", args.steps, args.rounds)
    ratios = [a / b - 1 for a, b in zip(taken["loop"], taken["bare"], strict=True)]
    report = {
        "seconds_a_step": {k: [round(v, 4) for v in values] for k, values in taken.items()},
        "overhead": round(statistics.median(ratios), 4),
        "overheads": [round(r, 4) for r in ratios],
    }
    if args.before:
        found: dict[str, list[float]] = {"before": [], "after": []}
        for _ in range(args.turns):
            for name, folder in (("before", args.before), ("after", pathlib.Path.cwd())):
                found[name] += by_command(folder, args.workdir / name, args.cache, 60)
        commit = ["git", "rev-parse", "HEAD"]
        before = subprocess.run(commit, cwd=args.before, capture_output=True, text=True).stdout.strip()
        report |= {"images_per_second": found, "medians": {k: statistics.median(v) for k, v in found.items()}}
        report |= {"commit_before": before}
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
