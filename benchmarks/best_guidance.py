"""Each method at its own best modality guidance: what trainings that benchmarks.peers.run or equal_time kept can do.

python -m benchmarks.best_guidance --config=scenes_sd --steps=500 --text_guidance=1 --methods mcm-slim full controlnet \
    --workdir=runs/peers --out=benchmarks/results/best_guidance_scenes_sd.json
python -m benchmarks.best_guidance --config=scenes_sd --steps=4176 --text_guidance=1 --methods mcm-slim \
    --workdir=runs/equal_time --out=benchmarks/results/best_guidance_scenes_sd.json

``base + s (controlled - base)``: a short training moves the base's prediction in the right direction, and not far
enough. Of the cells at a method's best learning rate s is raised until control falls, by the maps that rates are chosen
by (mean IoU, mean over the subsets, seed 0); what is reported is of the other held-out maps, all seeds. A method that
is in --out at these steps is kept; the same command goes on.
"""

import argparse
import json
import pathlib
from typing import Any

import flax.serialization
import jax
import numpy as np

from benchmarks import common
from benchmarks.peers import run, table
from benchmarks.peers.methods import make_method
from benchmarks.peers.world import Drawer, World, judged, open_world, score
from mcm_jax import sharding
from mcm_jax.evaluation.evaluate import interval

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def row_of(args: argparse.Namespace, name: str, world: World, sampling_steps: int) -> dict[str, Any]:
    """What is found of a method, all of whose cells at its best rate have to be there."""
    folder = run.folder_of(args, name)
    trained = table.row_of(folder, args.seeds)
    if trained["missing"]:
        raise SystemExit(f"{folder}: cells are missing: {'; '.join(trained['missing'])}")
    method = make_method(name, world.base, world.modalities, world.run.mcm)
    draw = Drawer(world, method, sampling_steps)
    empty = jax.eval_shape(method.init, jax.random.key(0), world.base.params)

    def params_of(seed: int) -> Any:
        stored = (folder / f"rate={trained['rate']:.3g},seed={seed}.msgpack").read_bytes()
        return sharding.replicate(flax.serialization.from_bytes(empty, stored), world.mesh)

    scores: dict[float, float] = {}
    first, chosen = params_of(0), np.arange(world.select)
    for scale in SCALES:
        scores[scale] = round(score(judged(world, draw, first, chosen, guidance=scale)), 5)
        print(name, scale, scores[scale], flush=True)
        if scores[scale] < max(scores.values()):
            break
    best = max(scores, key=scores.__getitem__)
    others, found = np.arange(world.select, len(world.held_out)), []
    for seed in range(args.seeds):
        found.append(judged(world, draw, params_of(seed), others, seed, whole=True, guidance=best))
        print(name, best, seed, {given: numbers.get("miou") for given, numbers in found[-1].items()}, flush=True)
    row = {"rate": trained["rate"], "parameters": trained["parameters"], "guidance": best, "scores": scores}
    for given in found[0]:
        for number in table.SHOWN:
            if values := [rows[given][number] for rows in found if number in rows[given]]:
                spread = round(interval(values), 4) if len(values) > 1 else None
                row[f"{given}.{number}"] = {"mean": round(float(np.mean(values)), 4), "interval": spread}
    return row


def main() -> None:
    parser = run.arguments()
    parser.description = __doc__
    parser.add_argument("--text_guidance", type=float)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    about = run.folder_of(args, "settings.json")
    if not about.exists():
        raise SystemExit(f"{about.parent}: nothing was trained there yet; benchmarks.peers.run comes first")
    settings = json.loads(about.read_text())
    sizes = {k: settings[k] for k in ("pairs", "select", "report", "references")}
    world = open_world(args.config, **sizes, text_guidance=args.text_guidance)
    if settings["base"] != world.base.fingerprint:
        raise SystemExit(f"{about.parent} was trained on another base; take another --workdir")
    common.use_compilation_cache(args.workdir)
    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    for name in args.methods:
        key = f"{name}, {args.steps} steps"
        if key not in report["rows"]:
            report["rows"][key] = row_of(args, name, world, settings["sampling_steps"])
            what = {"config": args.config, "maps": sizes, "text_guidance": world.run.sampling.text_guidance}
            common.write_report(args.out, __doc__, what | {"rows": report["rows"]})


if __name__ == "__main__":
    main()
