"""Control against the MCM's size, and the paper's form beside ours: the table of docs/mcm.md.

python -m benchmarks.mcm_sizes --out=benchmarks/results/mcm_sizes.json

All variants train in one process on the same batches, timesteps and noise (the base predicts once for all of them),
with the settings of configs/demo.py but for the number of steps, the rate of the large one, and no cache.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import subprocess

import jax
import numpy as np
from tqdm import tqdm

from configs import default, demo
from mcm_jax import config as config_lib
from mcm_jax import sampling
from mcm_jax.data.inputs import prepare
from mcm_jax.data.pipeline import InMemory, to_float
from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation import confusion_matrix, load_segmenter, mean_iou
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh, replicate
from mcm_jax.trained import Trained
from mcm_jax.training import RunSettings, feed, state, step
from mcm_jax.training.optimizer import make_optimizer, make_schedule


def variants() -> dict:
    """Name to config."""
    found = {}
    for name in ("tiny", "small", "medium", "large", "medium, paper's form"):
        size = name.split(",")[0]
        c = demo.get_config()
        c.mcm.update(default.SIZES[size])
        if size != name:
            default.paper_form(c)
        c.cache.mode = "off"
        # At the others' rate the large one ended at the base's level (400 steps of batch 16).
        c.train.learning_rate = 1e-3 if size == "large" else 2e-3
        found[name] = c
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--sampling_steps", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    configs = {name: config_lib.read(RunSettings, c) for name, c in variants().items()}
    one = next(iter(configs.values()))
    base = one.base.load()
    height, width, _ = base.image_shape
    rendered = InMemory.render(Scenes("train", one.data.size, height, width, one.data.seed))
    mesh, draws = make_mesh(), one.draws_for(base.card)
    base = dataclasses.replace(base, params=replicate(base.params, mesh))
    inputs = prepare(base, rendered, one.modalities.shown, mesh)
    source = feed.online(base, inputs, draws, 1, {}, mesh)
    runs = {}
    for name, c in configs.items():
        t = c.train
        modulator = c.mcm.modulator(c.modalities.shown, base)
        schedule = make_schedule(
            "cosine", steps=args.steps, learning_rate=t.learning_rate, warmup_steps=t.warmup_steps, decay_steps=0
        )
        optimizer = make_optimizer("adamw", schedule, weight_decay=t.weight_decay, clip_norm=t.clip_norm)
        init = jax.jit(lambda key, modulator=modulator: modulator.init(key, base.latent_shape))
        params = init(jax.random.key(c.seed))
        train_step = step.make_train_step(
            modulator, optimizer, weighting=c.loss.weighting, l1=c.loss.l1, ema_decay=t.ema_decay
        )
        runs[name] = [state.init_state(params, optimizer), train_step]
    noise_step = step.make_noise_step(modulator, draws, seed=one.seed, drop_rate=one.modalities.drop_rate)
    batch_size = one.train.batch_size
    records = source.records(noise_step, batch_size=batch_size, seed=one.seed, steps=range(args.steps), mesh=mesh)
    for record in tqdm(records, total=args.steps):
        for run in runs.values():
            run[0], _ = run[1](run[0], record)
    examples = to_float(InMemory.render(Scenes("test", args.maps, height, width, one.data.seed)).arrays, ["sketch"])
    segmenter, keys, rows = load_segmenter(), sampling.sample_keys(0, args.maps), {}
    for name, c in configs.items():
        modulator = c.mcm.modulator(c.modalities.shown, base)
        pipeline = Pipeline(base, Trained(modulator, runs[name][0].ema_params, args.steps), c.sampling)

        def miou(given, guidance=1.0, pipeline=pipeline):
            images = pipeline({n: examples[n] for n in given}, keys, guidance=guidance, steps=args.sampling_steps)
            found = segmenter.predict(np.clip(images, -1, 1))
            return round(float(mean_iou(confusion_matrix(found, examples["segmentation"], len(CLASSES)))), 4)

        size = sum(x.size for x in jax.tree.leaves(pipeline.mcms[0].params))
        rows[name] = {
            "parameters": size,
            "learning_rate": c.train.learning_rate,
            "share_of_base": round(size / sum(x.size for x in jax.tree.leaves(base.params)), 4),
            "miou": {"both": miou(["segmentation", "sketch"]), "sketch": miou(["sketch"])},
        }
        print(name, rows[name], flush=True)
    alone = miou([], 0.0)
    report = {
        "what": __doc__.splitlines()[0],
        "steps": args.steps,
        "batch_size": one.train.batch_size,
        "training_images": one.data.size,
        "maps": args.maps,
        "sampling_steps": args.sampling_steps,
        "guidance": 1.0,
        "miou_of_base": alone,
        "rows": rows,
        "hardware": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind} device(s)",
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
        "commit": commit,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
