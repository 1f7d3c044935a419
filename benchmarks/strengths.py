"""Strength of a modality against what it controls: mean IoU and edge F1 of the shipped MCM of scenes.

python -m benchmarks.strengths --out=benchmarks/results/strengths.json

Each modality alone, and beside the other one at strength 1; held-out maps, 8 steps of dpm++2m, guidance 1, one seed.
"""

import argparse
import pathlib

import numpy as np

from benchmarks import common
from mcm_jax import sampling
from mcm_jax.data import DataSettings
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.pipeline import Pipeline

HOW = {"sampler": "dpm++2m", "spacing": "trailing", "steps": 8, "guidance": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=16)
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    pipeline = Pipeline.from_folder("scenes-mcm")
    modalities = pipeline.modalities
    held_out = HeldOut(DataSettings(), pipeline.base.card, modalities, args.maps)
    judges = judges_of(held_out, {})
    keys, which = sampling.sample_keys(0, args.maps), np.arange(args.maps)
    conditions = {m.name: m.resize_all(held_out.conditions[m.name], *pipeline.grid) for m in modalities}
    rows = {}
    for name in conditions:
        for beside in (False, True):
            given = conditions if beside else {name: conditions[name]}
            for strength in args.strengths:
                images = pipeline(given, keys, strength={name: strength}, batch_size=args.maps, **HOW)
                found = {}
                for judge in judges:
                    found |= {k: round(v, 4) for k, v in judge.watch(np.clip(images, -1, 1), which).items()}
                row = f"{name}{' beside the other' if beside else ' alone'}, strength {strength:g}"
                rows[row] = found
                print(row, found, flush=True)
    common.write_report(args.out, __doc__, {"maps": args.maps, "how": HOW, "rows": rows})


if __name__ == "__main__":
    main()
