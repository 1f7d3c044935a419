"""Run by test_sharding.py in a process of its own with eight devices: a base split over four of them, and a whole one.

The arguments are a text-conditional base and one that works on pixels. Prints JSON: bytes, and differences as parts of
what they are differences of.
"""

import collections
import dataclasses
import functools
import json
import sys
import types

import jax
import numpy as np
import tiny
from jax.sharding import AxisType

from mcm_jax import assets, sampling, sharding
from mcm_jax.base import load_base
from mcm_jax.cache import build
from mcm_jax.data.inputs import prepare
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.scenes import Scenes
from mcm_jax.draws import Draws
from mcm_jax.pipeline import Pipeline
from mcm_jax.trained import Trained
from mcm_jax.training import feed, step

BATCH = 8


def bytes_per_device(arrays):
    """By device: what the arrays take on it."""
    found = collections.Counter()
    for array in arrays:
        part = int(np.prod(array.sharding.shard_shape(array.shape))) * array.dtype.itemsize
        found.update({device.id: part for device in array.sharding.device_set})
    return found


def load_split(path, mesh):
    """The base, put on the mesh tensor by tensor, and the most that lived on any device beside its own parts."""
    before, excess, own = set(map(id, jax.live_arrays())), [], []

    def put(tensor):
        own.append(sharding.place(tensor, mesh))
        live = bytes_per_device(a for a in jax.live_arrays() if id(a) not in before)
        mine = bytes_per_device(own)
        excess.append(max(live[d] - mine[d] for d in live))
        return own[-1]

    return load_base(path, put=put), max(excess)


def run_all(base, mesh, config, source):
    """What a build, a training and a sampling make of the same, as numpy arrays; and whether predictions are split."""
    modulator = tiny.modulator_of(config, base)
    modalities = modulator.modalities
    draws = Draws(seed=0, count=2, density=(1,), total=base.schedule.num_train_timesteps, prompt_drop_rate=0.3)
    plan = types.SimpleNamespace(views=1, draws=2, shard_count=1, rows=lambda number: range(len(source)))
    recipe = build.Recipe(base, source, modalities, draws, dtype="float32", batch_size=BATCH, mesh=mesh)
    ((_, shard),) = build._shards(plan, recipe, [0])

    inputs = prepare(base, source, modalities, mesh)
    noise_step = step.make_noise_step(modulator, draws, seed=0, drop_rate=0.3)
    online = feed.online(base, inputs, draws, 1, {}, mesh)
    (record,) = online.records(noise_step, batch_size=BATCH, seed=0, steps=range(1), mesh=mesh)
    split = record["eps"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)

    shapes = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.1 * rng.normal(size=p.shape).astype(np.float32), shapes)
    pipeline = Pipeline(base, Trained(modulator, params), mesh=mesh)
    conditions = {m.name: inputs.source.arrays[m.name][:BATCH] for m in modalities}
    conditions = {k: v.astype(np.float32) / 255 if k == "sketch" else v for k, v in conditions.items()}
    keys, prompts = sampling.sample_keys(0, BATCH), ["a mountain lake at sunset"] * BATCH
    images = pipeline(conditions, keys, prompts=prompts, steps=2, text_guidance=3.0, batch_size=BATCH)
    found = {"latent": shard["latent"].astype(np.float32), "cached": shard["eps"], "noise": np.asarray(record["noise"])}
    return found | {"online": np.asarray(record["eps"]), "contexts": inputs.contexts, "images": images}, split


def main(path, pixels_path):
    mesh = sharding.make_mesh(sharding.MeshSettings(fsdp=4))
    alone = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 2)
    base, excess = load_split(assets.resolve_base("scenes-sd"), mesh)
    shares = bytes_per_device(jax.tree.leaves(base.params))
    report = {"share": max(shares.values()) / base.card.parameter_bytes, "excess": excess, "devices": len(shares)}

    config = tiny.make_config(path)
    base, whole = (load_base(path, put=functools.partial(sharding.place, mesh=m)) for m in (mesh, alone))
    source = InMemory.render(Scenes("train", BATCH, *base.image_shape[:2], seed=2))
    found, split = run_all(base, mesh, config, source)
    expected, _ = run_all(whole, alone, config, source)
    scale = {name: float(np.abs(value).max()) for name, value in expected.items()}
    report["differences"] = {k: float(np.abs(found[k] - expected[k]).max()) / scale[k] for k in expected}

    pixels = load_base(pixels_path)
    x = np.random.default_rng(0).normal(size=(BATCH, *pixels.latent_shape)).astype(np.float32)
    t = np.arange(BATCH, dtype=np.int32) * 100
    unsplit = np.asarray(jax.jit(pixels.predict)(pixels.params, x, t))
    pixels = dataclasses.replace(pixels, params=sharding.place(pixels.params, mesh))
    program = jax.jit(pixels.predict).lower(pixels.params, *sharding.split_batch((x, t), mesh)).compile()
    pixel_eps = program(pixels.params, *sharding.split_batch((x, t), mesh))
    report["differences"]["pixels"] = float(np.abs(np.asarray(pixel_eps) - unsplit).max() / np.abs(unsplit).max())
    text = program.as_text()
    report["collectives"] = sorted(
        {name for name in ("all-reduce", "all-to-all", "collective-permute", "all-gather") if f" {name}" in text}
    )
    report["split"] = split and pixel_eps.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
