"""Control of a sweep's trials by every subset of the modalities: what hiding them in training, or a size, buys.

python -m benchmarks.sweep_subsets --sweep=runs/modality_drop --axis=drop_rate \
    --out=benchmarks/results/modality_drop.json
python -m benchmarks.sweep_subsets --sweep=runs/size --axis size learning_rate --trials 2 3 8 9 --guidances 1 1.5 \
    --skip=64 --maps=128 --out=benchmarks/results/size.json

Mean IoU and edge F1 over the same held-out maps and noise for all, sampled by the trials' own config but for the
modality guidance.
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
    m, base = pipeline.mcms[0].modulator, pipeline.base
    return base.fingerprint, base.dtype, m.module, m.modalities, m.shift_space, m.residual_scale, m.x0_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=pathlib.Path, required=True, help="the sweep's workdir")
    parser.add_argument(
        "--axis", nargs="+", required=True, help="what is compared; numbers of trials that agree are listed"
    )
    parser.add_argument(
        "--trials", type=int, nargs="+", help="their numbers, e.g. those at their best rate; default: all"
    )
    parser.add_argument("--guidances", type=float, nargs="+", help="modality guidance; default: the config's")
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument(
        "--skip", type=int, default=0, help="held-out maps before them, as those that rates are chosen by"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    judges, pipeline = [], None
    trials = done_trials(args.sweep, args.axis, args.trials)
    if diverged := [trial["trial"] for trial in trials if trial["status"] == "diverged"]:
        raise SystemExit(f"trials {', '.join(diverged)} diverged; name the others by --trials")
    for trial in trials:
        workdir, label = args.sweep / trial["workdir"], ", ".join(trial[axis] for axis in args.axis)
        made = Pipeline.from_folder(workdir)
        if pipeline is None:
            settings = config.load(RunSettings, workdir)
            held_out = HeldOut(settings.data, made.base.card, made.modalities, args.skip + args.maps)
            which = np.arange(args.skip, len(held_out))
            judges, pipeline = judges_of(held_out, {}), made
        elif _form(made) != _form(pipeline):
            pipeline = made  # another network, which is compiled anew
        pipeline.update(made.mcms[0].params)
        sampler, keys = Sampler(pipeline, held_out, made.settings), sampling.sample_keys(0, len(which))
        found: dict[str, float] = {}
        for scale in args.guidances or [made.settings.guidance]:
            for name, given in subsets([m.name for m in pipeline.modalities]).items():
                numbers = common.numbers_of(judges, sampler(Row(name, given, scale), keys, which), which)
                row = f"{name}@{scale:g}" if args.guidances else name
                found |= {f"{row}.{key}": numbers[key] for key in NUMBERS}
        for key, value in found.items():
            rows.setdefault(label, {}).setdefault(key, []).append(value)
        print(trial["trial"], label, found, flush=True)
    what = {"axis": ", ".join(args.axis), "maps": len(which), "skipped": args.skip, "rows": rows}
    common.write_report(args.out, __doc__, what)


if __name__ == "__main__":
    main()
