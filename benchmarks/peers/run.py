"""Trains and judges the methods on one base: each at its own best learning rate, on the same pairs and steps.

python -m benchmarks.peers.run --config=scenes_sd --steps=500 --text_guidance=1 --workdir=runs/peers
python -m benchmarks.peers.table --config=scenes_sd --steps=500 --workdir=runs/peers \
    --out=benchmarks/results/peers_scenes_sd.json

A method that needs no gradient through the base is trained here by predictions as they are needed; what a cache saves
is measured by :mod:`.cost`. Of each method the learning rate is doubled or halved until the best of three neighbours is
the middle one, by the mean IoU over the first held-out maps (all subsets of the modalities, seed 0). Other seeds are
trained at that rate, and what is reported is of other held-out maps. A cell, one training, is kept as soon as it is
done: the same command goes on.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np

from benchmarks import common
from benchmarks.peers.method import Method
from benchmarks.peers.methods import METHODS, make_method
from benchmarks.peers.train import Trainer
from benchmarks.peers.world import Drawer, World, judged, open_world, score
from mcm_jax import sharding
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically

DEFAULT = (
    *("mcm-tiny", "mcm-slim", "mcm-medium", "mcm-tiny-paper", "mcm-slim-paper", "mcm-medium-paper"),
    *("full", "full-eps", "controlnet", "controlnet-eps", "adapter", "lora", "judge"),
)
# Where a sweep of rates begins, else at 2e-3.
FIRST = {"judge": 0.1} | {name: 5e-4 for name in METHODS if name.startswith(("full", "controlnet"))}
REFUSED = "refused.txt"


@dataclasses.dataclass
class Cells:
    """The cells of one method: each a training, kept in files of its name.

    Attributes:
      folder: of the files.
      name: of the method.
      world: see there.
      train: gives params and what there is to say, of a rate and a seed.
      draw: samples.
    """

    folder: pathlib.Path
    name: str
    world: World
    train: Trainer
    draw: Drawer

    def cell(self, rate: float, seed: int) -> dict:
        """One training, judged on the maps that rates are chosen by; from its file if it is done."""
        file = self._file(rate, seed, "json")
        if file.exists():
            return json.loads(file.read_text())
        params, said = self.train(rate, seed)
        if seed == 0:
            said["select"] = judged(self.world, self.draw, params, np.arange(self.world.select))
            said["score"] = round(score(said["select"]), 5)
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = flax.serialization.to_bytes(jax.device_get(params))
        write_atomically(self._file(rate, seed, "msgpack"), stored)
        write_atomically(file, (json.dumps(said | {"commit": common.COMMIT}, indent=2) + "\n").encode())
        numbers = {row: found.get("miou") for row, found in said.get("select", {}).items()}
        print(self.name, {k: said.get(k) for k in ("rate", "seed", "score", "seconds")}, numbers, flush=True)
        return said

    def report(self, rate: float, seed: int, method: Method, guidances: Sequence[float]) -> None:
        """Judges a cell on the maps that are reported on; of another guidance than 1 rows are ``ROW@GUIDANCE``."""
        file = self._file(rate, seed, "report.json")
        if file.exists():
            return
        empty = jax.eval_shape(method.init, jax.random.key(0), self.world.base.params)
        stored = flax.serialization.from_bytes(empty, self._file(rate, seed, "msgpack").read_bytes())
        params = sharding.replicate(stored, self.world.mesh)
        which = np.arange(self.world.select, len(self.world.held_out))
        rows = {}
        for scale in guidances:
            found = judged(self.world, self.draw, params, which, seed, whole=True, guidance=scale)
            rows |= found if scale == 1 else {f"{row}@{scale:g}": numbers for row, numbers in found.items()}
        write_atomically(file, (json.dumps({"rate": rate, "seed": seed, "rows": rows}, indent=2) + "\n").encode())
        print(self.name, "report", {row: found.get("miou") for row, found in rows.items()}, flush=True)

    def _file(self, rate: float, seed: int, suffix: str) -> pathlib.Path:
        return self.folder / f"rate={rate:.3g},seed={seed}.{suffix}"


def best_rate(measure: Callable[[float], float], first: float, factor: float = 2.0, most: int = 12) -> float:
    """The rate whose neighbours, a factor above and below, are no better; says so where so many tries find none.

    Of equals, as diverged ones are, the lowest.
    """
    scores: dict[int, float] = {}
    best, tried = 0, None
    while best != tried and len(scores) < most:
        tried = best
        for i in (best, best + 1, best - 1):
            if i not in scores:
                scores[i] = measure(first * factor**i)
        best = max(scores, key=lambda i: (scores[i], -i))
    if not {best - 1, best + 1} <= scores.keys():
        print(f"{len(scores)} rates tried, and {first * factor**best:.3g} is at the end of them", flush=True)
    return first * factor**best


def arguments() -> argparse.ArgumentParser:
    """What :mod:`.run` and :mod:`.table` share."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes_sd", help="a file in configs/, of a shipped base")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/peers"))
    return parser


def folder_of(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where the cells of a method are."""
    return args.workdir / args.config / f"steps={args.steps}" / name


def teacher_of(args: argparse.Namespace, name: str, world: World) -> Any:
    """Params of a method's cell that is best on the maps that rates are chosen by, which are of seed 0."""
    cells = [json.loads(file.read_text()) for file in folder_of(args, name).glob("rate=*,seed=0.json")]
    if not cells:
        raise UserError(f"{name}-distilled learns of {name}, of which there is no training; add it to --methods")
    rate = max(cells, key=lambda cell: cell["score"])["rate"]
    shapes = make_method(name, world.base, world.modalities, world.run.mcm).modulator.shapes(world.base)
    stored = (folder_of(args, name) / f"rate={rate:.3g},seed=0.msgpack").read_bytes()
    return flax.serialization.from_bytes(shapes, stored)


def fingerprint() -> str:
    """SHA-256 of this package: cells of other code are no part of one sweep."""
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    own = [file.read_bytes() for file in files if file.name not in ("cost.py", "table.py")]
    return hashlib.sha256(b"".join(own)).hexdigest()[:16]


def check_settings(file: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes what all cells of a folder share; raises UserError where it holds others: what differs."""
    now = json.loads(json.dumps(settings))
    if file.exists() and (before := json.loads(file.read_text())) != now:
        keys = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        said = "; ".join(f"{k}: {str(before.get(k))[:80]} there, {str(now.get(k))[:80]} now" for k in keys)
        raise UserError(f"{file.parent} holds cells of other settings ({said}); take another --workdir")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(now, indent=2) + "\n").encode())


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--pairs", type=int, default=1_500, help="of a drawn data set; others are taken whole")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--select", type=int, default=64, help="held-out maps that rates are chosen by")
    parser.add_argument("--report", type=int, default=128, help="other held-out maps, for what is reported")
    parser.add_argument("--references", type=int, default=1_000, help="training pictures for KID")
    parser.add_argument("--sampling_steps", type=int, default=16)
    parser.add_argument(
        "--guidances", type=float, nargs="+", default=[1.0, 1.5], help="modality guidance of the report"
    )
    parser.add_argument("--text_guidance", type=float, help="of all sampling; default: the config's")
    parser.add_argument("--guide", help="the net of judge and -judged, a folder; default: the data set's own, shipped")
    args = parser.parse_args()
    fixed = {k: getattr(args, k) for k in ("pairs", "batch_size", "select", "report", "references", "sampling_steps")}
    fixed["guidances"] = args.guidances
    sizes = {k: fixed[k] for k in ("pairs", "select", "report", "references")}
    world = open_world(args.config, **sizes, text_guidance=args.text_guidance)
    guide = args.guide or f"{world.run.data.name}-segmenter"
    settings = fixed | {"guide": guide, "base": world.base.fingerprint, "code": fingerprint()}
    settings |= {"held_out": len(world.held_out), "config": dataclasses.asdict(world.run)}
    check_settings(folder_of(args, "settings.json"), settings)
    common.use_compilation_cache(args.workdir)
    refused = {}
    for name in args.methods:
        folder = folder_of(args, name)
        try:
            given = {"guide": guide, "text_guidance": world.run.sampling.text_guidance}
            if name.endswith("-distilled"):
                given["teacher"] = teacher_of(args, name.removesuffix("-distilled"), world)
            method = make_method(name, world.base, world.modalities, world.run.mcm, **given)
            trainer = Trainer(name, world, method, args.steps, args.batch_size)
            cells = Cells(folder, name, world, trainer, Drawer(world, method, args.sampling_steps))
            rate = best_rate(lambda rate, cells=cells: cells.cell(rate, 0)["score"], FIRST.get(name, 2e-3))
            for seed in range(args.seeds):
                cells.cell(rate, seed)
                cells.report(rate, seed, method, [1.0] if method.guides_text else args.guidances)
        except UserError as e:  # the others go on
            refused[name] = str(e)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REFUSED, f"{e}\n".encode())
    if refused:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in refused.items()))


if __name__ == "__main__":
    main()
