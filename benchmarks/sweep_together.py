"""Trials of a sweep in one program against one after the other: seconds, reads of the cache, and whether curves agree.

python -m benchmarks.sweep_together --out=benchmarks/results/sweep_together_cpu.json

Learning rates by two seeds on scenes-ddpm, one cache, both ways in one process in turn, `--repeats` times. Compiling
counts, since each run of a sweep compiles: each time begins without compiled programs, and keeps what it compiles on
disk, as train.py does. Losses are those of each step's report.
"""

import argparse
import importlib
import json
import pathlib
import shutil
import statistics
import time
import unittest.mock

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import common
from configs import default
from mcm_jax import config as config_lib
from mcm_jax.cache import Cache
from mcm_jax.training import RunSettings, train_and_evaluate
from mcm_jax.training.together import train_together

RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def trials_of(args: argparse.Namespace, size: str, cache: pathlib.Path, count: int) -> list[RunSettings]:
    trials = []
    for i in range(count):
        config = importlib.import_module(f"configs.{args.config}").get_config()
        config.mcm.update(default.SIZES[size])
        config.data.size = args.examples
        config.cache.update(path=str(cache), load_base=False)
        config.train.update(steps=args.steps, log_every=args.log_every, checkpoint_every=args.steps, validate_every=0)
        config.train.update(batch_size=args.batch_size, learning_rate=RATES[i // 2 % len(RATES)] * (1 + i // 8 / 100))
        config.seed = i % 2
        trials.append(config_lib.read(RunSettings, config))
    return trials


def serial(trials: list[tuple[RunSettings, pathlib.Path]]) -> None:
    for settings, workdir in trials:
        train_and_evaluate(config_lib.to_dict(settings), workdir)


def measure(way, settings: list[RunSettings], root: pathlib.Path) -> tuple[float, int, np.ndarray]:
    """Seconds, records read, and losses ``[trials, steps]``."""
    shutil.rmtree(root, ignore_errors=True)
    read, original = [], Cache.read

    def counting(self, index, draw):
        read.append(len(index))
        return original(self, index, draw)

    folders = [root / f"{i:03d}" for i in range(len(settings))]
    jax.clear_caches()
    common.use_compilation_cache(root, shared=False)
    compilation_cache.reset_cache()
    began = time.perf_counter()
    with unittest.mock.patch.object(Cache, "read", counting):
        way(list(zip(settings, folders, strict=True)))
    seconds = time.perf_counter() - began
    reports = [map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) for folder in folders]
    return seconds, sum(read), np.array([[line["loss"] for line in lines] for lines in reports])


def peak_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--sizes", nargs="*", default=["tiny", "medium"])
    parser.add_argument("--trials", type=int, nargs="*", default=[8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--log_every", type=int, default=1, help="steps; each line waits for the device")
    parser.add_argument("--no_serial", action="store_true", help="together alone, e.g. for 128 trials")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/sweep_together"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    cache, rows = args.workdir / "cache", []
    # Builds the cache, and warms what neither way shall pay for.
    measure(serial, trials_of(args, args.sizes[0], cache, 1), args.workdir / "warm")
    for size in args.sizes:
        for count in args.trials:
            settings = trials_of(args, size, cache, count)
            ways = {"together": train_together} | ({} if args.no_serial else {"serial": serial})
            found = {name: [] for name in ways}
            for _ in range(args.repeats):
                for name, way in ways.items():
                    found[name].append(measure(way, settings, args.workdir / name))
            row = {"size": size, "trials": count}
            for name, runs in found.items():
                seconds = [run[0] for run in runs]
                row[name] = {
                    "seconds": round(statistics.median(seconds), 2),
                    "all": [round(s, 2) for s in seconds],
                    "trials_a_minute": round(60 * count / statistics.median(seconds), 2),
                    "records_read": runs[0][1],
                }
            row["peak_bytes"] = peak_bytes()
            if "serial" in found:
                pairs = zip(found["serial"], found["together"], strict=True)
                row["serial_over_together"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 3)
                losses = [found[name][0][2][:, :30] for name in ("serial", "together")]
                row["largest_difference_of_losses"] = float(np.abs(losses[0] - losses[1]).max())
            rows.append(row)
            what = {"config": args.config, "steps": args.steps, "batch_size": args.batch_size, "rows": rows}
            common.write_report(args.out, __doc__, what)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
