"""Control and diversity of the shipped MCMs against solver and steps, modality guidance, and window.

python -m benchmarks.samplers --out=benchmarks/results/samplers.json

One compiled program an MCM draws everything, every condition given, for the same held-out maps and the same noise.
Diversity is the evaluation's: between four seeds of each of 16 maps. A row is kept as soon as it is measured: the same
command goes on.
"""

import argparse
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import common
from mcm_jax import assets, config, sampling
from mcm_jax.evaluation import diversity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Row, Sampler
from mcm_jax.files import write_atomically
from mcm_jax.pipeline import Pipeline
from mcm_jax.samplers import SAMPLERS
from mcm_jax.trained import WEIGHTS
from mcm_jax.training import RunSettings

SEEDS = 4
WINDOWS = ((0, 0.25), (0, 0.5), (0, 0.75), (0.25, 0.75), (0.25, 1), (0.5, 1), (0.75, 1), (0, 1))


def ways(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of each row."""
    if "solvers" in args.parts:
        for name, spacing, steps in itertools.product(args.samplers, args.spacings, args.steps):
            own = "" if spacing == "base" else spacing
            yield f"{name} {spacing} {steps}", {"sampler": name, "steps": steps, "spacing": own}
    if "guidance" in args.parts:
        for guidance in (0, 0.5, 1, 1.5, 2, 3, 4):
            yield f"guidance {guidance:g}", {"guidance": float(guidance)}
    if "windows" in args.parts:
        for start, end in WINDOWS:
            yield f"window {start:g} to {end:g}", {"start": float(start), "end": float(end)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["solvers", "guidance", "windows"])
    parser.add_argument("--workdirs", nargs="+", default=["scenes-mcm", "scenes-sd-mcm"])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--spacings", nargs="+", default=["base"], help="base is the base's own")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 12, 16, 25, 50])
    parser.add_argument("--maps", type=int, default=96)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = before.get("rows", {}) if before.get("maps") == args.maps else {}
    for workdir in args.workdirs:
        pipeline = Pipeline.from_folder(workdir)
        settings = config.load(RunSettings, assets.resolve(workdir))
        held_out = HeldOut(settings.data, pipeline.base.card, pipeline.modalities, args.maps)
        judges = judges_of(held_out, settings.evaluation.judges)
        digest = hashlib.sha256((assets.resolve(workdir) / WEIGHTS).read_bytes()).hexdigest()[:16]
        keys, which = sampling.sample_keys(0, len(held_out)), np.arange(len(held_out))
        several = np.tile(np.arange(min(16, args.maps)), SEEDS)
        for name, change in ways(args):
            key, how = f"{workdir} {name}", settings.sampling.but(**change)
            if rows.get(key, {}).get("mcm") == digest:
                continue
            row = Row("all", tuple(m.name for m in pipeline.modalities), how.guidance)
            calls, began = int(how.table(pipeline.base.schedule).count), time.perf_counter()
            sampler = Sampler(pipeline, held_out, how)
            images = sampler(row, keys, which)
            seconds = time.perf_counter() - began
            found = {k: round(float(v), 4) for judge in judges for k, v in judge.watch(images, which).items()}
            if "sampler" not in change:
                many = sampler(row, sampling.sample_keys(1, len(several)), several)
                found["diversity"] = round(float(diversity(many.reshape(SEEDS, -1, *many.shape[1:]))), 4)
            said = {
                "mcm": digest,
                "commit": common.COMMIT[:7],
                "calls": calls,
                "steps": how.steps,
                "guidance": how.guidance,
            }
            rows[key] = said | found | {"seconds": round(seconds, 1)}
            print(key, rows[key], flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, (json.dumps({"maps": args.maps, "rows": rows}, indent=2) + "\n").encode())
    common.write_report(args.out, __doc__, {"maps": args.maps, "rows": rows})


if __name__ == "__main__":
    main()
