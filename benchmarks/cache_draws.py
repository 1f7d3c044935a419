"""Control and held-out loss against K, the cached draws of each image: the table of docs/cache.md.

python -m benchmarks.cache_draws --out=benchmarks/results/cache_draws.json

Each variant is a run of train.py's own function with the settings of configs/demo.py but for the MCM (small, 2.9% of
the base), the number of steps, the images, K and the storage type; all take the same number of steps. Workdirs stay in
runs/cache_draws: a script that was stopped goes on.
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

from configs import default, demo
from mcm_jax import config as config_lib
from mcm_jax import losses, sampling
from mcm_jax.data.inputs import prepare
from mcm_jax.data.pipeline import InMemory, to_float
from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation import confusion_matrix, load_segmenter, mean_iou
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh
from mcm_jax.training import RunSettings, feed, step, train_and_evaluate


def variants(images: list[int], draws: list[int], steps: int) -> dict:
    """Name to config."""
    found = {}
    for size in images:
        kinds = [(k, "build", "float16") for k in draws] + [(5, "off", "float16")]
        kinds += [(5, "build", dtype) for dtype in ("bfloat16", "int8") if size == images[-1]]
        for count, mode, dtype in kinds:
            c = demo.get_config()
            c.mcm.update(default.SIZES["small"])
            c.data.size, c.draws.count, c.cache.mode, c.cache.dtype = size, count, mode, dtype
            c.train.steps = c.train.checkpoint_every = steps
            name = f"{size} images, {'online' if mode == 'off' else f'K={count}'}"
            found[name + (f", {dtype}" if dtype != "float16" else "")] = c
    return found


def held_out(config, base, examples: int, seed: int = 1):
    """Records of test scenes with draws that no run has seen, and a jitted ``loss(modulator)(params, record)``."""
    settings = config_lib.read(RunSettings, config)
    modulator = settings.mcm.modulator(settings.modalities.shown, base)
    source = settings.data.open("test", modulator.modalities, base.card, size=examples)
    draws = dataclasses.replace(settings.draws_for(base.card), seed=seed)
    inputs = prepare(base, source, modulator.modalities, make_mesh())
    noise_step = step.make_noise_step(modulator, draws, seed=seed, drop_rate=0.0)
    fresh = feed.online(base, inputs, draws, 1, {}, make_mesh())
    batches = fresh.records(
        noise_step, batch_size=64, seed=0, steps=range(examples * draws.count // 64), mesh=make_mesh()
    )
    return list(batches)


def loss_of(modulator, weighting: str):
    """Jitted ``(params, record) -> (weighted loss, plain error)``, means over a batch."""

    @jax.jit
    def loss(params, record):
        modulated = modulator(
            params, record["x_t"], record["eps"], record["t"], record["conditions"], record["present"]
        )[0]
        weight = losses.weight(weighting, modulator.schedule.alpha(record["t"]), modulator.schedule.sigma(record["t"]))
        error = losses.prediction_error(modulated, record["noise"])
        return (weight * error).mean(), error.mean()

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 2_000])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2, 5, 20])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--sampling_steps", type=int, default=12)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/cache_draws"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((args.workdir / "compiled").absolute()))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    segmenter, keys, rows, records = load_segmenter(), sampling.sample_keys(0, args.maps), {}, None
    for name, config in variants(args.images, args.draws, args.steps).items():
        workdir = args.workdir / name.replace(", ", "-").replace(" ", "-")
        train_and_evaluate(config, workdir)
        pipeline = Pipeline.from_folder(workdir)
        base = pipeline.base
        if records is None:
            records = held_out(config, base, 512)
            height, width, _ = base.image_shape
            tests = InMemory.render(Scenes("test", args.maps, height, width, config.data.seed)).arrays
            examples = to_float(tests, ["sketch"])
        loss = loss_of(pipeline.mcms[0].modulator, config.loss.weighting)
        found = np.array([loss(pipeline.mcms[0].params, record) for record in records], np.float64).mean(0)
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])

        def miou(given, pipeline=pipeline, examples=examples):
            images = pipeline({n: examples[n] for n in given}, keys, guidance=1.0, steps=args.sampling_steps)
            labels = segmenter.predict(np.clip(images, -1, 1))
            return round(float(mean_iou(confusion_matrix(labels, examples["segmentation"], len(CLASSES)))), 4)

        rows[name] = {
            "held_out_loss": round(float(found[0]), 5),
            "held_out_mse": round(float(found[1]), 6),
            "training_loss": round(last["loss"], 5),
            "miou": {"both": miou(["segmentation", "sketch"]), "sketch": miou(["sketch"])},
            "epochs": round(args.steps * config.train.batch_size / config.data.size, 1),
        }
        print(name, rows[name], flush=True)
        report = {
            "what": __doc__.splitlines()[0],
            "steps": args.steps,
            "batch_size": config.train.batch_size,
            "maps": args.maps,
            "sampling_steps": args.sampling_steps,
            "guidance": 1.0,
            "rows": rows,
            "hardware": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind} device(s)",
            "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
            "commit": commit,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
