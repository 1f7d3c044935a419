"""Methods over the modality guidance: what trainings that benchmarks.peers.run or equal_time kept do at more of it.

python -m benchmarks.peer_guidance --config=scenes_sd --steps=500 --methods mcm-slim full controlnet \
    --workdir=runs/peers --out=benchmarks/results/peer_guidance_scenes_sd.json
python -m benchmarks.peer_guidance --config=scenes_sd --steps=4176 --methods mcm-slim \
    --workdir=runs/equal_time --out=benchmarks/results/peer_guidance_scenes_sd.json

``base + s (controlled - base)``, or for methods that are no MCM with ``--own`` the method's own prediction when it is
shown nothing in the base's place. Cells at each method's best learning rate, all seeds, on the maps that are reported
on: a curve, of which no point is chosen here (benchmarks.peers.run chooses one, by other maps). A row that is in --out
is kept; the same command goes on.
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
from benchmarks.peers.judging import Drawer, Guidance, judged
from benchmarks.peers.methods import make_method
from benchmarks.peers.world import World, open_world
from mcm_jax import sharding


class Trained:
    """A method with its cells at the best rate, all of which have to be there."""

    def __init__(self, args: argparse.Namespace, name: str, world: World, sampling_steps: int):
        folder = run.folder_of(args, name)
        self.row = table.row_of(folder, args.seeds)
        if missing := [cell for cell in self.row["missing"] if cell != "guidance"]:
            raise SystemExit(f"{folder}: cells are missing: {'; '.join(missing)}")
        method = make_method(name, world.base, world.modalities, world.run.mcm)
        self._world, self._draw = world, Drawer(world, method, sampling_steps)
        empty = jax.eval_shape(method.init, jax.random.key(0), world.base.params)
        files = [folder / f"rate={self.row['rate']:.3g},seed={seed}.msgpack" for seed in range(args.seeds)]
        stored = [flax.serialization.from_bytes(empty, file.read_bytes()) for file in files]
        self._params = [sharding.replicate(params, world.mesh) for params in stored]

    def __call__(self, guidance: Guidance) -> dict[str, dict[str, float | None]]:
        """Means over the seeds, with intervals, by subset and number."""
        which, found = np.arange(self._world.select, len(self._world.held_out)), {}
        for seed, params in enumerate(self._params):
            for given, numbers in judged(self._world, self._draw, params, which, seed, True, guidance).items():
                for number in table.SHOWN.keys() & numbers.keys():
                    found.setdefault(f"{given}.{number}", []).append(numbers[number])
        return {key: table.over_seeds(values) for key, values in sorted(found.items())}


def main() -> None:
    parser = run.arguments()
    parser.description = __doc__
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--own", action="store_true", help="guided by the method's own prediction without conditions")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    about = run.folder_of(args, "settings.json")
    if not about.exists():
        raise SystemExit(f"{about.parent}: nothing was trained there yet; benchmarks.peers.run comes first")
    settings = json.loads(about.read_text())
    sizes = {k: settings[k] for k in ("pairs", "select", "report", "references")}
    text = settings["text_guidance"] if "text_guidance" in settings else settings["config"]["sampling"]["text_guidance"]
    world = open_world(args.config, **sizes, text_guidance=text)
    if settings["base"] != world.base.fingerprint:
        raise SystemExit(f"{about.parent} was trained on another base; take another --workdir")
    if odd := [name for name in args.methods if name == "judge" or name.endswith("-distilled")]:
        raise SystemExit(f"{odd[0]} is not guided further")
    common.use_compilation_cache(args.workdir)
    what = {"config": args.config, "maps": sizes, "text_guidance": text}
    before: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    if before and (differs := [k for k in what if before.get(k) != what[k]]):
        raise SystemExit(f"{args.out} has rows of another {differs[0]}; take another --out")
    rows = before.get("rows", {})
    for name in args.methods:
        key = ", ".join([name, f"{args.steps} steps", *settings.get("trained_with", [])])
        guidances = [Guidance(scale, args.own and scale != 1) for scale in args.guidances]
        left = [guidance for guidance in guidances if str(guidance) not in rows.get(key, {})]
        trained = Trained(args, name, world, settings["sampling_steps"]) if left else None
        for guidance in left:
            row = rows.setdefault(key, {"rate": trained.row["rate"], "parameters": trained.row["parameters"]})
            if row["rate"] != trained.row["rate"]:
                raise SystemExit(
                    f"{args.out}: {key} was at rate {row['rate']:g}, now the best is another; take another --out"
                )
            row[str(guidance)] = trained(guidance) | {"commit": common.COMMIT}
            print(key, guidance, {k: v["mean"] for k, v in row[str(guidance)].items() if k != "commit"}, flush=True)
            common.write_report(args.out, __doc__, what | {"rows": rows})


if __name__ == "__main__":
    with common.plain_errors():
        main()
