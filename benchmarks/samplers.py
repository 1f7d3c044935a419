"""Control against sampler and steps: mean IoU and edge F1 of the shipped MCMs, every condition given.

python -m benchmarks.samplers --out=benchmarks/results/samplers.json

One compiled program an MCM draws everything, for the same held-out maps and the same noise. A row is kept as soon as
it is measured: the same command goes on.
"""

import argparse
import itertools
import json
import pathlib
import time

import numpy as np

from benchmarks import common
from mcm_jax import assets, config, sampling
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Row, Sampler
from mcm_jax.files import write_atomically
from mcm_jax.pipeline import Pipeline
from mcm_jax.samplers import SAMPLERS
from mcm_jax.training import RunSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        keys, which = sampling.sample_keys(0, len(held_out)), np.arange(len(held_out))
        for name, spacing, steps in itertools.product(args.samplers, args.spacings, args.steps):
            key = f"{workdir} {name} {spacing} {steps}"
            if key in rows:
                continue
            how = settings.sampling.but(sampler=name, steps=steps, spacing="" if spacing == "base" else spacing)
            row = Row("all", tuple(m.name for m in pipeline.modalities), how.guidance)
            calls, began = int(how.table(pipeline.base.schedule).count), time.perf_counter()
            images = Sampler(pipeline, held_out, how)(row, keys, which)
            seconds = time.perf_counter() - began
            found = {k: round(float(v), 4) for judge in judges for k, v in judge.watch(images, which).items()}
            rows[key] = {"calls": calls, "guidance": how.guidance, **found, "seconds": round(seconds, 1)}
            print(key, rows[key], flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.out, (json.dumps({"maps": args.maps, "rows": rows}, indent=2) + "\n").encode())
    common.write_report(args.out, __doc__, {"maps": args.maps, "rows": rows})


if __name__ == "__main__":
    main()
