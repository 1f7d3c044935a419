"""MCMs that were trained apart, composed while sampling, beside one that was trained on all: control on scenes.

python -m benchmarks.composed --out=benchmarks/results/composed.json

Three MCMs of one size for scenes-ddpm: of the segmentation, of the sketch, of both. Of each seed they begin and train
side by side on the same batches, timesteps, noise and predictions, then sample the same held-out scenes from the same
noise. Composed is ``eps + guidance sum_i w_i (eps'_i - eps)``. The judges are the evaluation's: mean IoU of the
segmentation, F1 of edges against the sketch.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from tqdm import tqdm

from benchmarks import common
from configs import default, scenes
from mcm_jax import sampling
from mcm_jax.config import read
from mcm_jax.data.inputs import prepare
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.mcm import parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh
from mcm_jax.trained import Trained
from mcm_jax.training import RunSettings, feed, step

NUMBERS = ("miou", "edge_f1.f1")
APART = ("segmentation", "sketch")
# Of each row: the MCMs, their weights, what is shown.
ROWS = {
    "one MCM of both": (["both"], [1.0], APART),
    "composed, weights 1, 1": (APART, [1.0, 1.0], APART),
    "composed, weights 0.5, 0.5": (APART, [0.5, 0.5], APART),
    "composed, weights 1, 0.5": (APART, [1.0, 0.5], APART),
    "composed, weights 0.5, 1": (APART, [0.5, 1.0], APART),
    "one MCM of both, segmentation shown": (["both"], [1.0], ["segmentation"]),
    "MCM of the segmentation": (["segmentation"], [1.0], ["segmentation"]),
    "one MCM of both, sketch shown": (["both"], [1.0], ["sketch"]),
    "MCM of the sketch": (["sketch"], [1.0], ["sketch"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--pictures", type=int, default=1_500)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", choices=default.SIZES, default="small")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = scenes.get_config()
    config.mcm.update(default.SIZES[args.size])
    config.data.size, config.train.steps, config.cache.mode = args.pictures, args.steps, "off"
    run = read(RunSettings, config)
    t, mesh = run.train, make_mesh()
    base = run.base.load(mesh)
    modalities = {m.name: m for m in run.modalities.shown}
    modulators = {name: run.mcm.modulator((modalities[name],), base) for name in APART}
    modulators["both"] = run.mcm.modulator(tuple(modalities[name] for name in APART), base)
    shown = modulators["both"].modalities
    draws = run.draws_for(base.card)
    inputs = prepare(base, run.data.open("train", shown, base.card), shown, mesh)
    source = feed.online(base, inputs, draws, 1, {}, mesh)
    held_out = HeldOut(run.data, base.card, shown, args.maps)
    judges = judges_of(held_out, {})
    which, keys = np.arange(args.maps), sampling.sample_keys(0, args.maps)
    found: dict[str, list[dict[str, float]]] = {}
    sizes = {}
    for seed in range(args.seeds):
        runs = {}
        for name, modulator in modulators.items():
            runs[name] = common.begin_run(run, modulator, base, seed, mesh)
            sizes[name] = parameter_count(runs[name][0].params)
        noise_step = step.make_noise_step(modulators["both"], draws, seed=seed, drop_rate=run.modalities.drop_rate)
        records = source.records(noise_step, batch_size=t.batch_size, seed=seed, steps=range(args.steps), mesh=mesh)
        for record in tqdm(records, total=args.steps, desc=f"seed {seed}"):
            for name in runs:
                columns = [i for i, m in enumerate(shown) if name in (m.name, "both")]
                conditions = {shown[i].name: record["conditions"][shown[i].name] for i in columns}
                own = record | {"conditions": conditions, "present": record["present"][:, np.array(columns)]}
                runs[name][0], _ = runs[name][1](runs[name][0], own)
        trained = {n: Trained(modulators[n], runs[n][0].ema_params, args.steps, n) for n in runs}
        pipelines = {
            tuple(names): Pipeline(base, [trained[n] for n in names], run.sampling, mesh) for names, *_ in ROWS.values()
        }
        conditions = {m.name: m.resize_all(held_out.conditions[m.name], *base.latent_shape[:2]) for m in shown}
        for row, (names, weights, given) in ROWS.items():
            for guidance in args.guidances:
                images = pipelines[tuple(names)](
                    {n: conditions[n] for n in given}, keys, weights=weights, guidance=guidance
                )
                numbers = common.numbers_of(judges, images, which)
                kept = {k: numbers[k] for k in NUMBERS}
                found.setdefault(f"{row} @{guidance:g}", []).append(kept)
                print(row, guidance, json.dumps(kept), flush=True)
    rows = {name: {k: [numbers[k] for numbers in each] for k in NUMBERS} for name, each in found.items()}
    report = {k: v for k, v in vars(args).items() if k != "out"}
    report |= {"parameters": sizes, "rows": rows, "sampling": dataclasses.asdict(run.sampling)}
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
