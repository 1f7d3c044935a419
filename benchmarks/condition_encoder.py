"""What conditions at the pictures' resolution buy (`mcm.conditions`): thin lines and small objects on scenes-sd.

python -m benchmarks.condition_encoder --out=benchmarks/results/condition_encoder.json

The MCM of configs/scenes_sd.py with conditions on the grid of 16x16 and with the encoder from 64x64 (1% more
parameters). Of each seed the two begin and train side by side on the same batches, timesteps, noise, hidden modalities
and predictions, then sample the same held-out scenes with their captions from the same noise, by the net's own steps
and guidance. The judges are the evaluation's: mean IoU, IoU of the sun or moon and of trees (the smallest objects), F1
of edges against the sketch (lines of one pixel of 64x64).
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from tqdm import tqdm

from benchmarks import common
from configs import default, scenes_sd
from mcm_jax import sampling
from mcm_jax.config import read
from mcm_jax.data.inputs import prepare
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Row, Sampler
from mcm_jax.mcm import CONDITIONS, parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh
from mcm_jax.trained import Trained
from mcm_jax.training import RunSettings, feed, step

NUMBERS = ("miou", "class_iou.sun", "class_iou.tree", "edge_f1.f1", "edge_f1.precision", "edge_f1.recall")
GIVEN = {"both": ("segmentation", "sketch"), "segmentation": ("segmentation",), "sketch": ("sketch",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--pictures", type=int, default=1_500)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", choices=default.SIZES, default="medium")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = scenes_sd.get_config()
    config.mcm.update(default.SIZES[args.size])
    config.data.size, config.train.steps, config.cache.mode = args.pictures, args.steps, "off"
    settings = {}
    for conditions in CONDITIONS:
        config.mcm.conditions = conditions
        settings[conditions] = read(RunSettings, config)
    one = settings["grid"]
    t, names = one.train, one.modalities.shown
    mesh = make_mesh()
    base = one.base.load(mesh)
    rendered = one.data.open("train", names, base.card)
    modulators = {name: s.mcm.modulator(names, base) for name, s in settings.items()}
    draws, feeds = one.draws_for(base.card), {}
    for name, modulator in modulators.items():
        inputs = prepare(base, rendered, names, mesh, modulator.grid(base))
        feeds[name] = feed.online(base, inputs, draws, 1, {}, mesh)
    # The second one's records have the predictions of the first one's.
    feeds["encoder"] = dataclasses.replace(feeds["encoder"], predict=lambda batch, record: None)

    held_out = HeldOut(one.data, base.card, names, args.maps)
    judges = judges_of(held_out, {})
    which, keys = np.arange(args.maps), sampling.sample_keys(0, args.maps)
    found: dict[str, list[dict[str, float]]] = {f"{name}, {given}": [] for name in CONDITIONS for given in GIVEN}
    sizes, losses = {}, {name: [] for name in CONDITIONS}
    for seed in range(args.seeds):
        runs, records = {}, {}
        for name, modulator in modulators.items():
            runs[name] = common.begin_run(settings[name], modulator, base, seed, mesh)
            sizes[name] = parameter_count(runs[name][0].params)
            noise_step = step.make_noise_step(modulator, draws, seed=seed, drop_rate=one.modalities.drop_rate)
            records[name] = feeds[name].records(
                noise_step, batch_size=t.batch_size, seed=seed, steps=range(args.steps), mesh=mesh
            )
        last: dict[str, list[float]] = {name: [] for name in CONDITIONS}
        pairs = zip(*(records[name] for name in CONDITIONS), strict=True)
        for number, pair in enumerate(tqdm(pairs, total=args.steps, desc=f"seed {seed}")):
            eps = pair[0]["eps"]
            for name, record in zip(CONDITIONS, pair, strict=True):
                runs[name][0], metrics = runs[name][1](runs[name][0], record | {"eps": eps})
                if number >= args.steps - 100:
                    last[name].append(metrics["mse"])
        for name, modulator in modulators.items():
            losses[name].append(round(float(np.mean(last[name])), 5))
            pipeline = Pipeline(base, Trained(modulator, runs[name][0].ema_params, args.steps), one.sampling, mesh)
            sampler = Sampler(pipeline, held_out, pipeline.settings)
            for given, shown in GIVEN.items():
                images = sampler(Row(given, shown, pipeline.settings.guidance), keys, which)
                numbers = common.numbers_of(judges, images, which)
                kept = {k: numbers[k] for k in NUMBERS if k in numbers}
                found[f"{name}, {given}"].append(kept)
                print(name, given, json.dumps(kept), flush=True)
    rows = {name: {k: [numbers[k] for numbers in each] for k in each[0]} for name, each in found.items()}
    report = {k: v for k, v in vars(args).items() if k != "out"}
    report |= {"batch_size": t.batch_size, "parameters": sizes, "mse_of_the_last_100_steps": losses, "rows": rows}
    report |= {"real_pictures": real(held_out, judges), "sampling": dataclasses.asdict(one.sampling)}
    common.write_report(args.out, __doc__, report)


def real(held_out: HeldOut, judges: list) -> dict[str, float]:
    """What the judges say of the held-out pictures themselves: no sample can be expected to have more."""
    numbers = common.numbers_of(judges, held_out.images, np.arange(len(held_out)))
    return {k: numbers[k] for k in NUMBERS}


if __name__ == "__main__":
    main()
