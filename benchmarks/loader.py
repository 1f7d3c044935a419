"""Reading a folder of pairs for each batch: images a second, memory over a whole pass, what training eats beside it.

python -m benchmarks.loader --out=benchmarks/results/loader.json

Random pictures, which no codec makes small: 64x64 PNGs for a base that works on pixels, 512x512 JPEGs with conditions
brought to a latent grid of 64x64. Each has a label map and a sketch as PNGs. They are read as ``data.stream`` reads
them: shuffled, by the same threads, to the same batches. Training is that of the shipped base (32x32) on the first
folder, streamed, with the share of its time that it waits for batches.
"""

import argparse
import json
import os
import pathlib
import shutil
import time
import types

import grain
import numpy as np
from PIL import Image

from benchmarks import common
from configs import scenes
from mcm_jax.data.folder import Folder
from mcm_jax.data.inputs import Streamed
from mcm_jax.data.pipeline import training_batches
from mcm_jax.modalities import Modality
from mcm_jax.sharding import make_mesh
from mcm_jax.training import train_and_evaluate

_BATCH = 32
_MODALITIES = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
_DISTINCT = 500  # pictures; the others are links to them


def write(folder: pathlib.Path, count: int, size: int, ending: str) -> int:
    """A training split of pairs; returns the mean bytes of a picture."""
    rng = np.random.default_rng(0)
    for name in ("image", "segmentation", "sketch"):
        (folder / "train" / name).mkdir(parents=True)
        for i in range(count):
            suffix = ending if name == "image" else ".png"
            path = folder / "train" / name / f"{i:06d}{suffix}"
            if i >= _DISTINCT:
                path.hardlink_to(folder / "train" / name / f"{i % _DISTINCT:06d}{suffix}")
                continue
            coarse = rng.integers(0, 6 if name == "segmentation" else 256, (8, 8, 3)).astype(np.uint8)
            how = Image.Resampling.NEAREST if name == "segmentation" else Image.Resampling.BICUBIC
            picture = Image.fromarray(coarse if name == "image" else coarse[..., 0]).resize((size, size), how)
            if name == "image":
                noisy = np.asarray(picture) + rng.normal(0, 12, (size, size, 3))
                picture = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
            picture.save(path)
    return sum(p.stat().st_size for p in (folder / "train/image").iterdir()) // count


def memory() -> float:
    """MiB that this process has in memory now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def read(folder: pathlib.Path, size: int, grid: int, images: int) -> dict:
    """So many images in training order; memory at every tenth of them."""
    source = Folder(folder, "train", _MODALITIES, size, size)
    # What reading asks of a base; its nets have no part in this.
    base = types.SimpleNamespace(latent_shape=(grid, grid, 3), is_latent=False, is_text_conditional=False)
    streamed = Streamed(base, source, _MODALITIES, make_mesh())
    batches = training_batches(lambda index, draw: streamed.read(index), len(source), _BATCH, seed=0)
    total = images // _BATCH
    ready = iter(batches[:total].to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)))
    held, began = [], time.perf_counter()
    for i in range(total):
        next(ready)
        if (i + 1) % max(1, total // 10) == 0:
            held.append(memory())
    seconds = time.perf_counter() - began
    return {"images": total * _BATCH, "images_per_second": round(total * _BATCH / seconds, 1), "memory_mib": held}


def train(folder: pathlib.Path, workdir: pathlib.Path, steps: int) -> dict:
    """The shipped base on a folder, streamed."""
    config = scenes.get_config()
    changes = {"data.name": "folder", "data.path": str(folder), "data.stream": "on", "cache.mode": "off"}
    changes |= {"data.held_out_share": 0.0, "train.steps": steps, "train.log_every": max(1, steps // 2)}
    changes |= {"train.batch_size": _BATCH, "train.validate_every": 0, "train.evaluate_every": 0, "train.best": ""}
    config.update_from_flattened_dict(changes)
    train_and_evaluate(config, workdir)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])  # its first half compiled
    return {key: round(last[key], 3) for key in ("images_per_second", "input_wait")} | {"memory_mib": memory()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000, help="in each folder, and read of it")
    parser.add_argument("--steps", type=int, default=60, help="of training; 0 leaves it out")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/loader"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    shutil.rmtree(args.workdir, ignore_errors=True)
    report = {"batch_size": _BATCH, "threads": 8, "cpus": len(os.sched_getaffinity(0))}
    for name, size, grid, ending in (("png_64", 64, 64, ".png"), ("jpeg_512", 512, 64, ".jpg")):
        each = write(args.workdir / name, args.images, size, ending)
        report[name] = {"bytes_of_a_picture": each, **read(args.workdir / name, size, grid, args.images)}
    if args.steps:
        report["training"] = train(args.workdir / "png_64", args.workdir / "run", args.steps)
    common.write_report(args.out, __doc__, report, ("grain", "pillow"))
    shutil.rmtree(args.workdir)


if __name__ == "__main__":
    main()
