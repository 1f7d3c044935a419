"""From pictures to a trained MCM: the build of a cache and a training from it, by train.py's own function, in seconds.

python -m benchmarks.whole_run --size=sd15 --dtype=bfloat16 --mcm_dtype=bfloat16 --batch=64 --examples=10000 --draws=5 \
    --steps=20000 --out=benchmarks/results/whole_run_h200.json

Stable Diffusion 1.5's networks with random weights (tiny, 60m: shrunk), random pictures of 512x512 with two conditions
and a caption, the paper's MCM. The base is freed before training begins.
"""

import argparse
import json
import pathlib
import shutil
import time

from benchmarks import common
from benchmarks.cache_build import build_cache
from configs import default
from mcm_jax import config as config_lib
from mcm_jax.mcm import parameter_count
from mcm_jax.training import RunSettings, caching, train_and_evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "60m", "tiny"), default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mcm_dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/whole_run"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    shutil.rmtree(args.workdir / "run", ignore_errors=True)

    config = default.get_config()
    default.paper(config)
    config.base.path, config.base.dtype = f"random-{args.size}", args.dtype
    config.data.name, config.data.path = "folder", "random-pictures"  # neither is there, nor needed any more
    config.modalities.segmentation.channels = 150
    config.mcm.update(dtype=args.mcm_dtype)
    config.draws.count, config.cache.mode = args.draws, "on"
    config.train.update(steps=args.steps, batch_size=args.batch, validate_every=0)
    config.train.update(log_every=max(1, args.steps // 20), checkpoint_every=args.steps)

    settings = config_lib.read(RunSettings, config)
    began = time.perf_counter()
    base = common.make_base(args.size, args.dtype)
    made = time.perf_counter() - began
    made_of = lambda base, draws: caching.made_of(settings, base.card, {"noise": "1"})  # noqa: E731
    folder = args.workdir / "run/cache"
    building = build_cache(folder, base, args.examples, args.draws, args.batch, made_of=made_of)[1]
    del base
    began = time.perf_counter()
    state = train_and_evaluate(config, args.workdir / "run")
    training = time.perf_counter() - began
    lines = [json.loads(line) for line in (args.workdir / "run/metrics.jsonl").read_text().splitlines()]
    report = {
        "size": args.size,
        "dtype": args.dtype,
        "mcm_dtype": args.mcm_dtype,
        "mcm_parameters": parameter_count(state.params),
        "batch_size": args.batch,
        "examples": args.examples,
        "draws": args.draws,
        "steps": args.steps,
        "seconds": {"build": round(building, 1), "training": round(training, 1), "both": round(building + training, 1)},
        "seconds_to_make_random_weights": round(made, 1),
        "images_per_second_of_training": [round(line["images_per_second"], 1) for line in lines],
        "peak_memory": common.peak_memory(),
    }
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
