"""Trains and judges the methods on one base: each at its own best learning rate, on the same pairs and steps.

python -m benchmarks.peers.run --config=scenes_sd --steps=500 --text_guidance=1 --workdir=runs/peers
python -m benchmarks.peers.table --config=scenes_sd --steps=500 --workdir=runs/peers \
    --out=benchmarks/results/peers_scenes_sd.json

A method that needs no gradient through the base is trained here by predictions as they are needed; what a cache saves
is measured by :mod:`.cost`. Of each method the learning rate is doubled or halved until the best of three neighbours is
the middle one, by the mean IoU over the first held-out maps (all subsets of the modalities, seed 0, at the modality
guidance ``--select_guidance``); where a neighbour
has less than half of the best, as one that fell back to the base, the rate between the two is tried, too. Other seeds
are trained at the best rate; where one of them falls back so, the search goes on. By the same maps the modality
guidance is chosen of :data:`.judging.SCALES`, for a method that is no MCM from the base's prediction or from its own
when it is shown nothing. What is reported is of other held-out maps. A cell, one training, is kept as soon as it is
done: the same command goes on.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import common
from benchmarks.peers.judging import NONE, Drawer, Guidance, guidances_of, judged, score
from benchmarks.peers.method import Method
from benchmarks.peers.methods import METHODS, make_method
from benchmarks.peers.train import Trainer
from benchmarks.peers.world import World, open_world
from mcm_jax import sharding
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.training.optimizer import OPTIMIZERS, SCHEDULES

DEFAULT = (
    *("mcm-tiny", "mcm-slim", "mcm-medium", "mcm-tiny-paper", "mcm-slim-paper", "mcm-medium-paper"),
    *("full", "full-eps", "controlnet", "controlnet-eps", "adapter", "lora", "judge"),
)
# Where a sweep of rates begins, else at 2e-3: below the cliff of those that change the base itself.
FIRST = {"judge": 0.1} | {name: 1e-3 for name in METHODS if name.startswith(("full", "controlnet"))}
REFUSED = "refused.txt"
GUIDANCE = "guidance.json"
_NO_TRAINING = ("cost.py", "table.py", "run.py", "judging.py")


@dataclasses.dataclass
class Cells:
    """The cells of one method: each a training, kept in files of its name.

    Attributes:
      folder: of the files.
      name: of the method.
      world: see there.
      method: which.
      train: gives params and what there is to say, of a rate and a seed.
      draw: samples.
      select: the modality guidance at which trainings are judged to choose rates, from the base's prediction.
    """

    folder: pathlib.Path
    name: str
    world: World
    method: Method
    train: Trainer
    draw: Drawer
    select: float = 1.0

    def cell(self, rate: float, seed: int) -> dict:
        """One training, judged on the maps that rates are chosen by; from its file if it is done."""
        file = self._file(rate, seed, "json")
        said = json.loads(file.read_text()) if file.exists() else {}
        if "score" in said:
            return said
        if said:  # trained, not judged yet
            params = self._params(rate, seed)
        else:
            params, said = self.train(rate, seed)
            said["commit"] = common.COMMIT
            self.folder.mkdir(parents=True, exist_ok=True)
            stored = flax.serialization.to_bytes(jax.device_get(params))
            write_atomically(self._file(rate, seed, "msgpack"), stored)
            write_atomically(file, (json.dumps(said, indent=2) + "\n").encode())
        # What follows a judge is guided already.
        guidance = NONE if self.method.guides_text else Guidance(self.select)
        said["select"] = judged(self.world, self.draw, params, np.arange(self.world.select), guidance=guidance)
        said["score"] = round(score(said["select"]), 5)
        write_atomically(file, (json.dumps(said, indent=2) + "\n").encode())
        numbers = {row: found.get("miou") for row, found in said["select"].items()}
        print(self.name, {k: said.get(k) for k in ("rate", "seed", "score", "seconds")}, numbers, flush=True)
        return said

    def holds(self, rate: float, seeds: int) -> bool:
        """Whether no seed falls back at a rate, where another one does not; trains them all."""
        return holds([self.cell(rate, seed)["score"] for seed in range(seeds)])

    def best_rate(self, first: float, seeds: int) -> float:
        """See :func:`best_rate`; at it, all seeds are trained."""
        return best_rate(lambda rate: self.cell(rate, 0)["score"], first, keeps=lambda rate: self.holds(rate, seeds))

    def finish(self, rate: float, seeds: int, scales: Sequence[float]) -> None:
        """Chooses the guidance at a rate, trains the other seeds, and judges all on the maps that are reported on.

        Args:
          rate: the best.
          seeds: how many.
          scales: guidances from the base's prediction that are reported besides 1 and the best.
        """
        self.cell(rate, 0)
        best = self._guidance(rate)
        shown = [Guidance(scale) for scale in scales if not self.method.guides_text]
        for seed in range(seeds):
            self.cell(rate, seed)
            self._report(rate, seed, dict.fromkeys([NONE, *shown, best]))

    def _params(self, rate: float, seed: int) -> Any:
        empty = jax.eval_shape(self.method.init, jax.random.key(0), self.world.base.params)
        stored = flax.serialization.from_bytes(empty, self._file(rate, seed, "msgpack").read_bytes())
        return sharding.replicate(stored, self.world.mesh)

    def _guidance(self, rate: float) -> Guidance:
        """The best by the maps that choose, at a rate and seed 0; from its file if it is known."""
        file = self.folder / GUIDANCE
        known = json.loads(file.read_text()) if file.exists() else {}
        scores = known.get("scores", {}) if known.get("rate") == rate else {}
        candidates, params = guidances_of(self.method), None
        for guidance in candidates:
            if str(guidance) not in scores and len(candidates) > 1:
                params = self._params(rate, 0) if params is None else params
                found = judged(self.world, self.draw, params, np.arange(self.world.select), guidance=guidance)
                scores[str(guidance)] = round(score(found), 5)
                print(self.name, "guidance", guidance, scores[str(guidance)], flush=True)
                said = {"rate": rate, "scores": scores, "commit": common.COMMIT}  # the best is not known yet
                write_atomically(file, (json.dumps(said, indent=2) + "\n").encode())
        best = max(candidates, key=lambda guidance: scores.get(str(guidance), 0.0))
        said = {"rate": rate, "scores": scores, "best": str(best), "commit": common.COMMIT}
        write_atomically(file, (json.dumps(said, indent=2) + "\n").encode())
        return best

    def _report(self, rate: float, seed: int, guidances: Iterable[Guidance]) -> None:
        """Numbers on the maps that are reported on; of another guidance than none rows are ``ROW@GUIDANCE``."""
        file = self._file(rate, seed, "report.json")
        rows = json.loads(file.read_text())["rows"] if file.exists() else {}
        params, which = None, np.arange(self.world.select, len(self.world.held_out))
        for guidance in guidances:
            suffix = "" if guidance == NONE else f"@{guidance}"
            if any(row.partition("@")[2] == suffix[1:] for row in rows):
                continue
            params = self._params(rate, seed) if params is None else params
            found = judged(self.world, self.draw, params, which, seed, whole=True, guidance=guidance)
            rows |= {f"{row}{suffix}": numbers for row, numbers in found.items()}
            said = {"rate": rate, "seed": seed, "rows": rows, "commit": common.COMMIT}
            write_atomically(file, (json.dumps(said, indent=2) + "\n").encode())
        print(self.name, "report", {row: found.get("miou") for row, found in rows.items()}, flush=True)

    def _file(self, rate: float, seed: int, suffix: str) -> pathlib.Path:
        return self.folder / f"rate={rate:.3g},seed={seed}.{suffix}"


def holds(scores: Sequence[float]) -> bool:
    """Whether no seed has less than half of the best one's score: it fell back to the base.

    That of the base is below it where captions do not say what is where, as at text guidance 1.
    """
    return max(scores) <= 0 or min(scores) >= max(scores) / 2


def best_rate(
    measure: Callable[[float], float],
    first: float,
    factor: float = 2.0,
    most: int = 12,
    keeps: Callable[[float], bool] = lambda rate: True,
) -> float:
    """The rate whose neighbours, a factor above and below, are no better; says so where so many tries find none.

    Of equals, as diverged ones are, the lowest. Where a neighbour has less than half of the best one's score, the rate
    between them is tried, too: there is a cliff, before which the best may be. A best one that does not keep, as other
    seeds show, counts as fallen, and the search goes on.
    """
    scores: dict[float, float] = {0: measure(first)}  # by powers of the factor
    rate = lambda i: first * factor**i  # noqa: E731
    best_of = lambda powers: max(powers, key=lambda i: (scores[i], -i))  # noqa: E731
    fallen: list[float] = []
    while True:
        best, tried = best_of(i for i in scores if i % 1 == 0), None
        while best != tried and len(scores) < most:
            tried = best
            for i in (best + 1, best - 1):
                if i not in scores:
                    scores[i] = measure(rate(i))
            best = best_of(i for i in scores if i % 1 == 0)
        if not {best - 1, best + 1} <= scores.keys():
            print(f"{len(scores)} rates tried, and {rate(best):.3g} is at the end of them", flush=True)
        for i in (best - 1, best + 1):
            between = (best + i) / 2
            if scores[best] > 0 and scores.get(i, scores[best]) < scores[best] / 2 and between not in scores:
                scores[between] = measure(rate(between))
        best = best_of(scores)
        if scores[best] <= 0:  # nothing holds
            return rate(fallen[0] if fallen else best)
        if keeps(rate(best)):
            return rate(best)
        fallen.append(best)
        scores[best] = -1.0


def arguments() -> argparse.ArgumentParser:
    """What :mod:`.run` and :mod:`.table` share."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes_sd", help="a file in configs/, of a shipped base")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/peers"))
    return parser


def add_optimizer(parser: argparse.ArgumentParser, whose: str) -> None:
    """The flags ``--optimizer`` and ``--schedule``."""
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=whose)
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help=f"{whose}; wsd decays over the last fifth"
    )


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The flag ``--select_guidance``."""
    parser.add_argument(
        "--select_guidance",
        type=float,
        default=1.0,
        help="modality guidance, from the base's prediction, at which rates are chosen: more where little controls",
    )


def selected_at(args: argparse.Namespace) -> dict[str, Any]:
    """What a folder's settings say of it: nothing of 1, as folders of before this flag."""
    return {} if args.select_guidance == 1 else {"select_guidance": args.select_guidance}


def trained_with(args: argparse.Namespace) -> dict[str, Any]:
    """What a folder's settings say of them: nothing of AdamW by cosine, as folders of before these flags."""
    how = [args.optimizer, args.schedule]
    return {} if how == ["adamw", "cosine"] else {"trained_with": how}


def folder_of(args: argparse.Namespace, name: str) -> pathlib.Path:
    """Where the cells of a method are."""
    return args.workdir / args.config / f"steps={args.steps}" / name


def read_cells(folder: pathlib.Path) -> tuple[dict[tuple[float, int], dict], dict[tuple[float, int], dict]]:
    """Trainings and reports of a method, by rate and seed."""
    cells, reports = {}, {}
    for file in sorted(folder.glob("rate=*.json")):
        found = json.loads(file.read_text())
        (reports if file.name.endswith(".report.json") else cells)[found["rate"], found["seed"]] = found
    return cells, reports


def scores_of(cells: dict[tuple[float, int], dict]) -> dict[float, list[float]]:
    """By rate, those of seed 0 first; no rate of which seed 0 has none."""
    rates = sorted(rate for rate, seed in cells if seed == 0 and "score" in cells[rate, 0])
    having = [key for key in sorted(cells) if "score" in cells[key]]
    return {rate: [cells[key]["score"] for key in having if key[0] == rate] for rate in rates}


def best_of(scores: dict[float, list[float]]) -> float:
    """The rate that is best with seed 0, of those at which no seed falls back, if there are such."""
    kept = [rate for rate, of in scores.items() if holds(of)] or list(scores)
    return max(kept, key=lambda rate: scores[rate][0])


def teacher_of(args: argparse.Namespace, name: str, world: World, seed: int) -> Any:
    """Params of a cell of a method and seed, at the rate that is best on the maps that choose."""
    scores = scores_of(read_cells(folder_of(args, name))[0])
    if not scores:
        raise UserError(f"{name}-distilled learns of {name}, of which there is no training; add it to --methods")
    rate = best_of(scores)
    shapes = make_method(name, world.base, world.modalities, world.run.mcm).modulator.shapes(world.base)
    stored = folder_of(args, name) / f"rate={rate:.3g},seed={seed}.msgpack"
    if not stored.exists():
        raise UserError(f"{name}-distilled learns of {name}, of which seed {seed} is not trained yet: run it first")
    return flax.serialization.from_bytes(shapes, stored.read_bytes())


def fingerprint() -> str:
    """SHA-256 of what trains in this package: cells of other code are no part of one sweep.

    Of mcm_jax itself each cell and report says the commit.
    """
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    own = [file.read_bytes() for file in files if file.name not in _NO_TRAINING]
    return hashlib.sha256(b"".join(own)).hexdigest()[:16]


def check_settings(file: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes what all cells of a folder share; raises UserError where it holds others: what differs."""
    now = json.loads(json.dumps(settings))
    if file.exists() and (before := json.loads(file.read_text())) != now:
        there, here = (flatten_dict(one, sep=".") for one in (before, now))
        keys = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        said = "; ".join(f"{k}: {str(there.get(k))[:80]} there, {str(here.get(k))[:80]} now" for k in keys)
        raise UserError(f"{file.parent} holds cells of other settings ({said}); take another --workdir")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(now, indent=2) + "\n").encode())


def _make(args: argparse.Namespace, name: str, world: World, guide: str, seed: int) -> tuple[Method, Trainer]:
    """A method and what trains it; of a seed where each seed has a teacher of its own."""
    given = {"guide": guide, "text_guidance": world.run.sampling.text_guidance}
    if name.endswith("-distilled"):
        given["teacher"] = teacher_of(args, name.removesuffix("-distilled"), world, seed)
    method = make_method(name, world.base, world.modalities, world.run.mcm, **given)
    return method, Trainer(name, world, method, args.steps, args.batch_size, args.optimizer, args.schedule)


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--pairs", type=int, default=1_500, help="of a drawn data set; others are taken whole")
    parser.add_argument("--batch_size", type=int, default=32)
    add_optimizer(parser, "of all methods")
    add_selection(parser)
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
    fixed |= {"guidances": args.guidances} | trained_with(args) | selected_at(args)
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
            make = functools.cache(functools.partial(_make, args, name, world, guide))
            method, has_teachers = make(0)[0], name.endswith("-distilled")
            train = lambda rate, seed, make=make, has=has_teachers: make(seed * has)[1](rate, seed)  # noqa: E731
            draw = Drawer(world, method, args.sampling_steps)
            cells = Cells(folder, name, world, method, train, draw, args.select_guidance)
            rate = cells.best_rate(FIRST.get(name, 2e-3), args.seeds)
            cells.finish(rate, args.seeds, args.guidances)
        except UserError as e:  # the others go on
            refused[name] = str(e)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REFUSED, f"{e}\n".encode())
    if refused:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in refused.items()))


if __name__ == "__main__":
    with common.plain_errors():
        main()
