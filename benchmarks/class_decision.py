"""Where in t is the class of a region decided, by whom, and can the MCM still change it?

python -m benchmarks.class_decision --workdir=runs/emoji --out=benchmarks/results/class_decision.json

Two kinds of tables over the timesteps of DDIM, all modalities given, mean IoU by the data set's own judge of labels:

* ``on_real``: of x0-hat at real held-out pictures with noise, as training sees them; the base's and the MCM's.
* ``only_before`` and ``only_from``: of samples that the MCM leads only until, or only from, so many of the steps on.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from mcm_jax import assets, config, predictions, sampling
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--maps", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    pipeline = Pipeline.from_folder(args.workdir)
    base, modulator = pipeline.base, pipeline.mcms[0].modulator
    schedule, settings = base.schedule, config.load(RunSettings, assets.resolve(args.workdir))
    held_out = HeldOut(settings.data, base.card, modulator.modalities, args.maps)
    labels = next(m.name for m in held_out.judged if m.kind == "labels")
    none = {m.name: "none" for m in held_out.judged if m.name != labels}
    judge = judges_of(held_out, settings.evaluation.judges | none)[0]
    count = len(held_out) // BATCH * BATCH
    if not count or base.is_text_conditional:
        raise SystemExit(f"{args.workdir}: an unconditional base and at least {BATCH} held-out maps are needed")
    grid = schedule.timesteps(args.steps)

    def both(x, t, conditions):
        """The base's eps and the MCM's, at its guidance."""
        eps = base.predict(base.params, x, t, None).astype(jnp.float32)
        present = jnp.ones((len(x), len(modulator.modalities)), bool)
        changed = modulator(pipeline.mcms[0].params, x, eps, t, conditions, present)[0]
        return eps, sampling.guide(eps, changed, args.guidance)

    def x0_of(eps, x, t):
        return jnp.clip(predictions.eps_to_x0(eps, x, schedule.alpha(t), schedule.sigma(t)), -1, 1)

    @jax.jit
    def estimates(x, t, conditions):
        return [x0_of(eps, x, t) for eps in both(x, t, conditions)]

    def miou(images):
        return round(float(judge(np.clip(np.concatenate(images), -1, 1), np.arange(count)).numbers["miou"]), 4)

    parts = [np.arange(i, i + BATCH) for i in range(0, count, BATCH)]
    given = [{m.name: held_out.conditions[m.name][rows] for m in modulator.modalities} for rows in parts]
    keys = sampling.sample_keys(0, count)
    noise = np.random.default_rng(0).standard_normal((count, *base.latent_shape)).astype(np.float32)
    result = {"timesteps": [int(t) for t in grid], "real": miou([held_out.images[:count]])}
    result["on_real"] = []
    for t in grid:
        ts = jnp.full(BATCH, t, jnp.int32)
        noised = [schedule.add_noise(held_out.images[rows], noise[rows], ts) for rows in parts]
        found = [estimates(x, ts, c) for x, c in zip(noised, given, strict=True)]
        result["on_real"].append({"base": miou([f[0] for f in found]), "mcm": miou([f[1] for f in found])})
        print(int(t), result["on_real"][-1], flush=True)
    for name in ("only_before", "only_from"):
        result[name] = {}
        for tenth in range(11):
            window = {"end" if name == "only_before" else "start": tenth / 10}
            how = {"steps": args.steps, "guidance": args.guidance, "batch_size": BATCH, **window}
            images = [pipeline(c, keys[rows], **how) for rows, c in zip(parts, given, strict=True)]
            result[name][f"{tenth / 10:.1f}"] = miou(images)
            print(name, tenth / 10, result[name][f"{tenth / 10:.1f}"], flush=True)
    common.write_report(args.out, __doc__, {"workdir": args.workdir, "maps": count, "guidance": args.guidance} | result)


if __name__ == "__main__":
    main()
