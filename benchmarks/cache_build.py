"""Building a cache: pictures and predictions a second, and how much of the device's arithmetic the networks use.

python -m benchmarks.cache_build --examples=4 --draws=2 --batch=2 --out=benchmarks/results/cache_build_cpu.json
python -m benchmarks.cache_build --size=sd15 --dtype=bfloat16 --examples=1000 --draws=10 --batch=64 \
    --out=benchmarks/results/cache_build_h200.json

Stable Diffusion 1.5's networks with random weights (60m: shrunk), pictures of 512x512, latents of 64x64x4, through the
code that precompute.py runs: autoencoder, text encoder, U-Net, float16 shards on disk. The first build of a few shards
compiles; the median of those after it counts, each whole. Model FLOP utilisation takes the networks' multiplications
and additions, by XLA's count for batch 1, against --peak_tflops.
"""

import argparse
import pathlib
import shutil
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks import common
from mcm_jax.base import Base
from mcm_jax.cache import Cache, build, store
from mcm_jax.draws import Draws


def build_cache(
    folder: pathlib.Path,
    base: Base,
    examples: int,
    draws: int,
    batch: int,
    made_of: Callable[[Base, int], dict[str, str]] = common.made_of,
) -> tuple[Cache, float]:
    """A cache of random pictures, through the real builder, and the seconds that it took."""
    recipe = build.Recipe(
        base=base,
        source=common.Noise(examples, base.image_shape),
        modalities=common.MODALITIES,
        draws=Draws(0, draws, (1.0,), base.schedule.num_train_timesteps, 0.1),
        dtype="float16",
        batch_size=batch,
    )
    plan = store.Manifest(
        made_of=made_of(base, draws),
        base=base.card.to_json(),
        stamps={"base": "", "data": ""},
        examples=examples,
        views=1,
        draws=draws,
        shard_examples=max(1, 1_024 // draws),
        versions={},
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    build.build(folder, plan, recipe)
    return Cache(folder), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "60m", "tiny"), default="60m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed builds")
    parser.add_argument("--peak_tflops", type=float, help="of the device; H200, bfloat16, dense: 989")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/cache_build"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    base = common.make_base(args.size, args.dtype)
    few = -(-args.batch // args.draws)
    build_cache(args.workdir / "warm", base, min(few, args.examples), args.draws, args.batch)
    cache_folder = args.workdir / "cache"
    built = [build_cache(cache_folder, base, args.examples, args.draws, args.batch) for _ in range(args.rounds)]
    cache, times = built[-1][0], [took for _, took in built]
    took = common.median(times)

    one, shape = jnp.float32, jax.ShapeDtypeStruct
    context = jax.eval_shape(base.encode_tokens, base.params, shape((1, base.tokenizer.length), jnp.int32))
    latent = shape((1, *base.latent_shape), one)
    ids = shape((1, base.tokenizer.length), jnp.int32)
    gflop = {
        "unet": common.gflop(base.predict, base.params, latent, shape((1,), jnp.int32), context),
        "autoencoder": common.gflop(base.encode, base.params, shape((1, *base.image_shape), one)),
        "text_encoder": common.gflop(base.encode_tokens, base.params, ids),
    }
    # The U-Net's own pace, without the rest of the pipeline, in the same process.
    x = jnp.zeros((args.batch, *base.latent_shape))
    t, contexts = jnp.zeros(args.batch, jnp.int32), jnp.zeros((args.batch, *context.shape[1:]))
    predict = jax.jit(base.predict)
    alone = common.median(common.seconds(lambda: predict(base.params, x, t, contexts), 3), 5) / args.batch
    achieved = None
    if None not in gflop.values():
        per_example = args.draws * gflop["unet"] + gflop["autoencoder"] + gflop["text_encoder"]
        achieved = round(args.examples * per_example / took / 1e3, 4)
    size = sum(s["bytes"] for s in cache.manifest.shards.values())
    report = {
        "base": {"size": args.size, "dtype": args.dtype, "unet_parameters": base.card.unet_parameters},
        "examples": args.examples,
        "draws": args.draws,
        "batch_size": args.batch,
        "seconds": round(took, 2),
        "seconds_of_each_build": [round(s, 2) for s in times],
        "images_per_second": round(args.examples / took, 3),
        "predictions_per_second": round(args.examples * args.draws / took, 3),
        "unet_alone_predictions_per_second": round(1 / alone, 3),
        "gflop_per_image": gflop,
        "achieved_tflops": achieved,
        "mfu": achieved and args.peak_tflops and round(achieved / args.peak_tflops, 4),
        "cache_mib": round(size / 2**20, 1),
        "cache_kib_per_example": round(size / 2**10 / args.examples, 1),
        "peak_memory": common.peak_memory(),
    }
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
