"""What each method costs: a training step, a sampling step, memory; side by side in one process.

python -m benchmarks.peers.cost --config=scenes_sd --out=benchmarks/results/peers_cost_scenes_sd.json
python -m benchmarks.peers.cost --size=sd15 --dtype=bfloat16 --batch=8 --methods mcm-paper ... --out=...   # a GPU

A round has each call once, in an order by chance, as what ran before tells in a call's time, and the base, which all
are compared with, five times. Seconds are medians, ratios medians of the rounds' ratios. FLOPs are XLA's count of the
programs as they are written, memory the compiler's for a training step, arguments and all. A LoRA is trained as it is
sampled, merged into the kernels: a side branch would save their gradient, so its training is an upper bound. An MCM's
step reads its prediction from a cache; one that asks the base for it, ``online``, costs that much more, and the cache
itself one prediction a draw. A sampling step is one call for one prompt: with text guidance there are two, or one of
twice the batch. What does not depend on x_t is done ``once`` a picture (a T2I-Adapter's features, a LoRA's merged
weights).
"""

import argparse
import dataclasses
import importlib
import pathlib
import random
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.peers import run, train
from benchmarks.peers.method import Given
from benchmarks.peers.methods import METHODS, make_method
from mcm_jax.config import read
from mcm_jax.mcm import MCMSettings, parameter_count
from mcm_jax.sharding import make_mesh, place
from mcm_jax.training import RunSettings, state
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.optimizer import OPTIMIZERS, make_optimizer, make_schedule

_BASES = 5  # of a round


def given_for(base: Any, modalities: Any, grid: tuple[int, int], batch: int, seed: int = 0) -> Given:
    """Random latents and conditions."""
    rng = np.random.default_rng(seed)
    conditions = {}
    for m in modalities:
        if m.kind == "labels":
            conditions[m.name] = jnp.asarray(rng.integers(0, m.channels, (batch, *grid)), jnp.int32)
        else:
            conditions[m.name] = jnp.asarray(rng.random((batch, *grid)), jnp.float32)
    context = None
    if base.is_text_conditional:
        width = base.unet.config.cross_attention_dim
        context = jnp.asarray(rng.standard_normal((batch, base.tokenizer.length, width)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((batch, *base.latent_shape)), jnp.float32)
    t = jnp.asarray(rng.integers(0, base.schedule.num_train_timesteps, batch), jnp.int32)
    return Given(x, t, conditions, jnp.ones((batch, len(modalities)), bool), context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes_sd", help="a file in configs/, of a shipped base")
    parser.add_argument("--size", choices=tuple(common.UNETS), help="a base with random weights in place of --config's")
    parser.add_argument("--dtype", default="float32", help="of --size's networks")
    parser.add_argument("--methods", nargs="+", default=(*run.DEFAULT, "mcm-small", "mcm-large"), choices=METHODS)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of MCMs; others have adamw")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    mesh = make_mesh()
    settings = read(RunSettings, importlib.import_module(f"configs.{args.config}").get_config())
    if args.size:
        base, modalities, mcm = common.make_base(args.size, args.dtype), common.MODALITIES, MCMSettings()
        mcm = dataclasses.replace(mcm, dtype=args.dtype)
        base = dataclasses.replace(base, params=place(base.params, mesh))
    else:
        base, modalities, mcm = settings.base.load(mesh), settings.modalities.shown, settings.mcm
    schedule = make_schedule("constant", steps=100, learning_rate=1.0, warmup_steps=0, decay_steps=1)
    whole = base.card.unet_parameters
    predict = jax.jit(base.predict)
    rows: dict[str, dict[str, Any]] = {}
    training, sampling, once = {}, {}, {}
    for name in [m for m in args.methods if not m.endswith("-eps")]:  # another loss costs the same
        method = make_method(name, base, modalities, mcm, guide=f"{settings.data.name}-segmenter")
        given = given_for(base, modalities, method.grid, args.batch)
        params = jax.jit(method.init)(jax.random.key(0), base.params)
        rows[name] = {"parameters": parameter_count(params), "share": round(parameter_count(params) / whole, 4)}
        prepare, drawn = jax.jit(method.prepare), jax.jit(method.__call__)
        prepared = prepare(params, base.params, given)
        call = (params, base.params, given, prepared)
        once[name] = lambda prepare=prepare, call=call: prepare(*call[:3])
        sampling[name] = lambda drawn=drawn, call=call: drawn(*call)
        rows[name]["sampling_gflops"] = common.gflop(method.__call__, *call)
        if name == "judge":
            continue
        record = {
            "x_t": given.x_t,
            "t": given.t,
            "noise": given.x_t[::-1],
            "importance": jnp.ones(args.batch),
            "conditions": given.conditions,
            "present": given.present,
            "eps": given.x_t if method.needs_eps else given.context,
        }
        rule = args.optimizer if name.startswith("mcm-") else "adamw"
        rows[name]["optimizer"] = rule
        optimizer = make_optimizer(rule, schedule, weight_decay=0.0, clip_norm=1.0)
        train_step = train.make_step(method, optimizer, base.schedule, "v", 0.99)
        rate = jnp.float32(1e-5)
        base_params = train.frozen_params(method, base)
        now = state.init_state(jax.tree.map(jnp.copy, params), optimizer)  # a step takes its buffers
        rows[name]["training_gflops"] = common.gflop(train_step, now, base_params, record, rate)
        compiled = CompiledStep(train_step, now, base_params, record, rate)
        rows[name]["training_mib"] = round(compiled.bytes / 2**20)
        training[name] = [compiled, now, base_params, record, rate]

    given = given_for(base, modalities, base.latent_shape[:2], args.batch)

    def step(name: str, online: bool = False) -> None:
        compiled, now, base_params, record, rate = training[name]
        if online:
            record = record | {"eps": predict(base.params, record["x_t"], record["t"], given.context)}
        training[name][1], loss = compiled(now, base_params, record, rate)
        jax.block_until_ready(loss)

    alone = lambda: predict(base.params, given.x_t, given.t, given.context)  # noqa: E731
    calls = {f"train {name}": lambda name=name: step(name) for name in training}
    calls |= {f"online {name}": lambda name=name: step(name, True) for name in training if name.startswith("mcm-")}
    calls |= {f"sample {name}": call for name, call in sampling.items()} | {"base": alone}
    calls |= {f"once {name}": call for name, call in once.items()}
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}  # of each round
    shuffler = random.Random(0)
    for _ in range(args.rounds):
        order = [*calls, *["base"] * (_BASES - 1)]
        shuffler.shuffle(order)
        took: dict[str, list[float]] = {}
        for name in order:
            began = time.perf_counter()
            jax.block_until_ready(calls[name]())
            took.setdefault(name, []).append(time.perf_counter() - began)
        for name, each in took.items():
            seconds[name].append(statistics.median(each))
    ratio = lambda a, b: common.median([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])  # noqa: E731
    for name, row in rows.items():
        row["sampling_seconds"] = common.median(seconds[f"sample {name}"])
        row["sampling_over_base"] = ratio(f"sample {name}", "base")
        row["once_seconds"] = common.median(seconds[f"once {name}"])
        if name in training:
            row["training_seconds"] = common.median(seconds[f"train {name}"])
            row["training_images_per_second"] = round(args.batch / row["training_seconds"], 1)
            row["training_over_base"] = ratio(f"train {name}", "base")
        if f"online {name}" in calls:
            row["online_seconds"] = common.median(seconds[f"online {name}"])
            row["online_images_per_second"] = round(args.batch / row["online_seconds"], 1)
    gflop = common.gflop(base.predict, base.params, given.x_t, given.t, given.context)
    report = {k: v for k, v in vars(args).items() if k not in ("out", "methods")} | {
        "base": {
            "name": base.name,
            "parameters": whole,
            "gflops": gflop,
            "seconds": common.median(seconds["base"]),
        },
        "rows": rows,
        "process": common.peak_memory(),
    }
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    with common.plain_errors():
        main()
