"""Control of a sweep's trials by every subset of the modalities: what hiding them in training buys.

python -m benchmarks.sweep_subsets --sweep=runs/modality_drop --axis=drop_rate \
    --out=benchmarks/results/modality_drop.json

Mean IoU and edge F1 over the same held-out maps and noise for all, sampled by the trials' own config.
"""

import argparse
import pathlib

import numpy as np

from benchmarks import common
from benchmarks.sweep_results import done_trials
from mcm_jax import config, sampling
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Row, Sampler, subsets
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings

NUMBERS = ("miou", "edge_f1.f1")


def _form(pipeline: Pipeline) -> tuple:
    """What a program is compiled for."""
    m = pipeline.mcms[0].modulator
    return m.module, m.modalities, m.shift_space, m.residual_scale, m.x0_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=pathlib.Path, required=True, help="the sweep's workdir")
    parser.add_argument("--axis", required=True, help="what is compared; trials that agree in it are averaged over")
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    judges, pipeline = [], None
    for trial in done_trials(args.sweep):
        workdir = args.sweep / trial["workdir"]
        made = Pipeline.from_folder(workdir)
        if pipeline is None:
            settings = config.load(RunSettings, workdir)
            held_out = HeldOut(settings.data, made.base.card, made.modalities, args.maps)
            judges, pipeline = judges_of(held_out, {}), made
        elif _form(made) != _form(pipeline):
            pipeline = made  # another network, which is compiled anew
        pipeline.update(made.mcms[0].params)
        sampler, which = Sampler(pipeline, held_out, pipeline.settings), np.arange(args.maps)
        for name, given in subsets([m.name for m in pipeline.modalities]).items():
            images = sampler(Row(name, given, pipeline.settings.guidance), sampling.sample_keys(0, args.maps), which)
            found = common.numbers_of(judges, images, which)
            for key in NUMBERS:
                rows.setdefault(trial[args.axis], {}).setdefault(f"{name}.{key}", []).append(found[key])
        print(trial["trial"], trial[args.axis], {k: v[-1] for k, v in rows[trial[args.axis]].items()}, flush=True)
    common.write_report(args.out, __doc__, {"axis": args.axis, "maps": args.maps, "rows": rows})


if __name__ == "__main__":
    main()
