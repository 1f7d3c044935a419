"""Trains and judges the methods on one base: each at its own best learning rate, on the same pairs and steps.

python -m benchmarks.peers.run --config=scenes_sd --steps=500 --workdir=runs/peers
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
import functools
import hashlib
import importlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import common
from benchmarks.peers.methods import METHODS, Distilled, Given, Judged, Method, make_method
from mcm_jax import losses, sampling, sharding
from mcm_jax.base import Base
from mcm_jax.config import read
from mcm_jax.data.inputs import Inputs, prepare
from mcm_jax.errors import UserError
from mcm_jax.evaluation import diversity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, flatten, judges_of
from mcm_jax.evaluation.rows import subsets
from mcm_jax.files import write_atomically
from mcm_jax.mcm import parameter_count
from mcm_jax.modalities import Modality
from mcm_jax.schedules import Schedule
from mcm_jax.sharding import make_mesh
from mcm_jax.training import RunSettings, feed, state, step
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.optimizer import make_optimizer, make_schedule

DEFAULT = (
    *("mcm-tiny", "mcm-slim", "mcm-medium", "mcm-tiny-paper", "mcm-slim-paper", "mcm-medium-paper"),
    *("full", "full-eps", "controlnet", "controlnet-eps", "adapter", "lora", "judge"),
)
# Where a sweep of rates begins, else at 2e-3.
FIRST = {"judge": 0.1} | {name: 5e-4 for name in METHODS if name.startswith(("full", "controlnet"))}
SEEDS_OF_DIVERSITY = 4
REFUSED = "refused.txt"


@dataclasses.dataclass
class World:
    """What all methods share: base, pairs, held-out maps, judges.

    Attributes:
      run: the config's settings.
      base: the frozen model, on the mesh.
      held_out: maps to choose rates by, then those that are reported on.
      select: how many of the maps choose.
    """

    run: RunSettings
    base: Base
    mesh: jax.sharding.Mesh
    held_out: HeldOut
    judges: list[Judge]
    select: int
    _inputs: dict[tuple[int, int], Inputs] = dataclasses.field(default_factory=dict)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return self.run.modalities.shown

    @functools.cached_property
    def _source(self) -> Any:
        return self.run.data.open("train", self.modalities, self.base.card)

    def inputs(self, grid: tuple[int, int]) -> Inputs:
        """The training pairs with conditions on a grid."""
        if grid not in self._inputs:
            self._inputs[grid] = prepare(self.base, self._source, self.modalities, self.mesh, grid)
        return self._inputs[grid]


def open_world(config: str, *, pairs: int, select: int, report: int, references: int) -> World:
    """Loads base, data and judges of a file in ``configs/``."""
    settings = importlib.import_module(f"configs.{config}").get_config()
    settings.data.size, settings.cache.mode = pairs, "off"
    run = read(RunSettings, settings)
    mesh = make_mesh()
    base = run.base.load(mesh)
    held_out = HeldOut(run.data, base.card, run.modalities.shown, select + report)
    if run.loss.l1:
        raise UserError(f"{config}: loss.l1 is {run.loss.l1:g}; the peers have no scale and shift that it pulls, so 0")
    if len(held_out) <= select:
        raise UserError(f"{config}: {len(held_out)} held-out maps, of which --select={select} leaves none to report on")
    return World(run, base, mesh, held_out, judges_of(held_out, {}, references), select)


def weighting_of(name: str, world: World) -> str:
    """Of the loss: the paper's form of an MCM, and the peers as they were published, have eps; others the config's."""
    return "eps" if name.endswith(("-paper", "-eps")) else world.run.loss.weighting


def make_step(
    method: Method, optimizer: Any, schedule: Schedule, weighting: str, ema_decay: float, snr_gamma: float = 5.0
) -> Any:
    """``(state, base_params, record, rate) -> (state, loss)``, jitted; the state is donated.

    Every update of the optimizer is multiplied by the rate: one program serves all rates.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(
        now: state.TrainState, base_params: Any, record: dict, rate: jax.Array
    ) -> tuple[state.TrainState, jax.Array]:
        t = record["t"]
        weight = losses.weight(weighting, schedule.alpha(t), schedule.sigma(t), snr_gamma)

        def loss_of(params: Any) -> jax.Array:
            told = {"eps" if method.needs_eps else "context": record["eps"]}
            given = Given(record["x_t"], t, record["conditions"], record["present"], **told)
            eps = method(params, base_params, given, method.prepare(params, base_params, given))
            target = method.target(given) if isinstance(method, Distilled) else record["noise"]
            loss = weight * losses.prediction_error(eps, target)
            if isinstance(method, Judged):
                loss = loss + method.penalty(base_params, given, eps)
            return (record["importance"] * loss).mean()

        loss, gradient = jax.value_and_grad(loss_of)(now.params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, now.opt_state, now.params)
        params = jax.tree.map(lambda p, u: p + rate * u, now.params, updates)
        ema = state.update_ema(now.ema_params, params, now.step, ema_decay)
        return state.TrainState(now.step + 1, params, ema, opt_state), loss

    return train_step


def frozen_params(method: Method, base: Base) -> Any:
    """What a training step has of the base: all of it, or for a method that needs no gradient through it nothing."""
    if isinstance(method, Judged):
        return {name: params for name, params in base.params.items() if name in ("vae", "vqvae")}
    return {} if method.needs_eps else base.params


def records_of(method: Method, world: World, seed: int, steps: int, batch_size: int) -> Any:
    """The feed's records; where a method needs no prediction, ``eps`` is the context that the base would see."""
    run, base = world.run, world.base
    draws, inputs = run.draws_for(base.card), world.inputs(method.grid)
    source = feed.online(base, inputs, draws, run.data.views, {}, world.mesh)
    if not method.needs_eps:
        dropped = jax.jit(draws.prompt_is_dropped)

        def context(batch: dict, record: dict) -> jax.Array | None:
            if not base.is_text_conditional:
                return None
            found = inputs.context(batch, np.asarray(dropped(batch["index"], batch["draw"])))
            return sharding.split_batch(found, world.mesh)

        source = dataclasses.replace(source, predict=context)
    example = run.mcm.modulator(world.modalities, base.schedule)
    noise_step = step.make_noise_step(example, draws, seed=seed, drop_rate=run.modalities.drop_rate)
    return source.records(noise_step, batch_size=batch_size, seed=seed, steps=range(steps), mesh=world.mesh)


def check_memory(name: str, needed: int | None, available: int | None) -> None:
    """Raises UserError where a step's memory, by the compiler's count, is more than there is."""
    if needed and available and needed > available:
        raise UserError(
            f"{name}: a training step takes {needed / 2**30:.2f} GiB, and there are {available / 2**30:.2f} GiB; take "
            f"a smaller --batch_size, or a method that needs no gradient through the base (mcm-*)"
        )


def compile_step(
    name: str, train_step: Any, method: Method, optimizer: Any, base: Base, record: dict, rate: jax.Array
) -> CompiledStep:
    """The training step, compiled before anything of it is in memory.

    Raises:
      UserError: the device's memory does not hold it: says how much it takes.
    """
    begin = lambda key, base_params: state.init_state(method.init(key, base_params), optimizer)  # noqa: E731
    shapes = jax.eval_shape(begin, jax.random.key(0), base.params)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rate.sharding), shapes)
    own = frozen_params(method, base)
    compiled = CompiledStep(train_step, shapes, own, record, rate)
    free, there = sharding.free_memory(), sum(leaf.nbytes for leaf in jax.tree.leaves((own, record)))
    check_memory(name, compiled.bytes, None if free is None else free + there)
    return compiled


class Trainer:
    """Trains one method; what is compiled serves all rates and seeds.

    Args:
      name: of the method.
      world: see there.
      steps: of a training, the learning rate falling to zero by half a cosine.
      batch_size: pairs a step.
    """

    def __init__(self, name: str, world: World, method: Method, steps: int, batch_size: int):
        self._name, self._world, self._method = name, world, method
        self._steps, self._batch_size, self._compiled = steps, batch_size, None

    def __call__(self, rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
        """Averaged params, and what there is to say of the training."""
        world, method, steps, t = self._world, self._method, self._steps, self._world.run.train
        init = jax.jit(method.init)
        begin = lambda: sharding.replicate(init(jax.random.key(seed), world.base.params), world.mesh)  # noqa: E731
        said: dict[str, Any] = {"rate": rate, "steps": steps, "seed": seed, "parameters": 0}
        if self._name == "judge":
            return jax.tree.map(lambda p: p * rate, begin()), said
        warmup = min(t.warmup_steps, steps // 10)
        schedule = make_schedule("cosine", steps=steps, learning_rate=1.0, warmup_steps=warmup, decay_steps=1)
        optimizer = make_optimizer("adamw", schedule, weight_decay=t.weight_decay, clip_norm=t.clip_norm)
        weighting, gamma = weighting_of(self._name, world), world.run.loss.snr_gamma
        base_params, found, now = frozen_params(method, world.base), [], None
        speed = sharding.replicate(jnp.float32(rate), world.mesh)
        records = records_of(method, world, seed, steps, self._batch_size)
        for record in tqdm(records, total=steps, desc=f"{self._name} {rate:.3g} {seed}"):
            if self._compiled is None:
                train_step = make_step(method, optimizer, world.base.schedule, weighting, t.ema_decay, gamma)
                self._compiled = compile_step(self._name, train_step, method, optimizer, world.base, record, speed)
            if now is None:
                now, began = state.init_state(begin(), optimizer), time.perf_counter()
            now, loss = self._compiled(now, base_params, record, speed)
            found.append(loss)
        curve = np.asarray(jax.device_get(found))
        said |= {
            "parameters": parameter_count(now.params),
            "seconds": round(time.perf_counter() - began, 1),
            "loss_of_the_last_tenth": round(float(curve[-max(1, steps // 10) :].mean()), 5),
            "step_bytes": self._compiled.bytes,
            "weighting": weighting,
        }
        if not np.isfinite(curve).all():
            said["diverged_at"] = int(np.argmin(np.isfinite(curve)))
        return now.ema_params, said


class Drawer:
    """Samples of a method for held-out maps, by the config's own sampling, without modality guidance.

    Args:
      world: see there.
      method: compiled once for all its params.
      steps: sampling steps.
    """

    def __init__(self, world: World, method: Method, steps: int):
        self._world, base, settings = world, world.base, world.run.sampling
        self._settings = settings.but(steps=steps)
        table = self._settings.table(base.schedule)
        guided = base.is_text_conditional and settings.text_guidance != 1

        @jax.jit
        def run(params, base_params, keys, conditions, present, context, negative):
            twice = (conditions, present)
            if guided and not method.guides_text:
                twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
            prepared = method.prepare(params, base_params, Given(None, None, *twice))

            def denoise(x, at):
                level = at.alpha, at.sigma
                if not guided or method.guides_text:
                    given = Given(x, at.t, *twice, context, level, negative=negative if guided else None)
                    return method(params, base_params, given, prepared)
                x, t, level = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, at.t, level))
                given = Given(x, t, *twice, jnp.concatenate([negative, context]), level)
                eps = method(params, base_params, given, prepared)
                return sampling.guide(*jnp.split(eps, 2), settings.text_guidance)

            noise = sampling.initial_noise(keys, base.latent_shape)
            return base.decode(base_params, sampling.sample(denoise, noise, keys, table))

        self._run = run
        held_out = world.held_out
        self._maps = {m.name: m.resize_all(held_out.conditions[m.name], *method.grid) for m in world.modalities}
        self._captions = held_out.captions if base.is_text_conditional else None

    def __call__(self, params: Any, given: Sequence[str], which: np.ndarray, keys: jax.Array) -> np.ndarray:
        """Pictures ``[N, H, W, 3]`` in [-1, 1] for the held-out maps `which`, told those of the modalities `given`."""
        world, size, parts = self._world, self._settings.batch_size, []
        for start in range(0, len(which), size):
            rows = np.arange(start, start + size) % len(which)  # the last batch is filled up
            maps = {name: values[which[rows]] for name, values in self._maps.items()}
            has = [world.held_out.present[m.name][which[rows]] & (m.name in given) for m in world.modalities]
            shown = np.stack(has, 1)
            texts = [None, None]
            if self._captions is not None:
                told = [self._captions[i] for i in which[rows]]
                texts = [world.base.embed_text(world.base.params, prompts) for prompts in (told, [""] * size)]
            batch = sharding.split_batch((keys[rows], maps, shown, *texts), world.mesh)
            images = np.asarray(self._run(params, world.base.params, *batch), np.float32)
            parts.append(np.clip(images[: len(which) - start], -1, 1))
        return np.concatenate(parts)


def judged(
    world: World, draw: Drawer, params: Any, which: np.ndarray, seed: int = 0, whole: bool = False
) -> dict[str, dict[str, float]]:
    """Numbers of each subset of the modalities, none where a picture is not finite.

    Mean IoU and F1 alone unless the `whole` is asked for.
    """
    found: dict[str, dict[str, float]] = {}
    names = [m.name for m in world.modalities]
    for row, given in subsets(names).items():
        images = draw(params, given, which, sampling.sample_keys(2 * seed, len(which)))
        found[row] = {}
        if not np.isfinite(images).all():  # which judges refuse
            continue
        numbers: dict[str, Any] = {}
        for judge in world.judges:
            if whole or judge.conditional:
                numbers |= flatten(judge(images, which).numbers)
        if whole and len(given) == len(names):
            few = np.tile(which[:16], SEEDS_OF_DIVERSITY)
            many = draw(params, given, few, sampling.sample_keys(2 * seed + 1, len(few)))
            if np.isfinite(many).all():
                numbers["diversity"] = float(diversity(many.reshape(SEEDS_OF_DIVERSITY, -1, *many.shape[1:])))
        found[row] = {k: round(float(v), 5) for k, v in numbers.items() if not isinstance(v, str)}
    return found


def score(rows: dict[str, dict[str, float]]) -> float:
    """What rates are chosen by: mean IoU, mean over the subsets; -1 where one has none."""
    values = [row.get("miou", np.nan) for row in rows.values()]
    return float(np.mean(values)) if np.isfinite(values).all() else -1.0


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

    def report(self, rate: float, seed: int, method: Method) -> None:
        """Judges a cell on the maps that are reported on."""
        file = self._file(rate, seed, "report.json")
        if file.exists():
            return
        empty = jax.eval_shape(method.init, jax.random.key(0), self.world.base.params)
        stored = flax.serialization.from_bytes(empty, self._file(rate, seed, "msgpack").read_bytes())
        params = sharding.replicate(stored, self.world.mesh)
        which = np.arange(self.world.select, len(self.world.held_out))
        rows = judged(self.world, self.draw, params, which, seed, whole=True)
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
    """Params of a method's cell that is best on the maps that rates are chosen by."""
    cells = [json.loads(f.read_text()) for f in folder_of(args, name).glob("rate=*.json") if "report" not in f.name]
    if not cells:
        raise UserError(f"{name}-distilled learns of {name}, of which there is no training; add it to --methods")
    best = max(cells, key=lambda cell: cell["score"])
    file = folder_of(args, name) / f"rate={best['rate']:.3g},seed={best['seed']}.msgpack"
    shapes = make_method(name, world.base, world.modalities, world.run.mcm).modulator.shapes(world.base)
    return flax.serialization.from_bytes(shapes, file.read_bytes())


def fingerprint() -> str:
    """SHA-256 of this package: cells of other code are no part of one sweep."""
    files = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    own = [file.read_bytes() for file in files if file.name in ("run.py", "methods.py", "nets.py", "unet.py")]
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
    parser.add_argument("--guide", help="the net of judge and -judged, a folder; default: the data set's own, shipped")
    args = parser.parse_args()
    fixed = {k: getattr(args, k) for k in ("pairs", "batch_size", "select", "report", "references", "sampling_steps")}
    world = open_world(args.config, **{k: fixed[k] for k in ("pairs", "select", "report", "references")})
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
                cells.report(rate, seed, method)
        except UserError as e:  # the others go on
            refused[name] = str(e)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REFUSED, f"{e}\n".encode())
    if refused:
        raise SystemExit("\n".join(f"{name}: {why}" for name, why in refused.items()))


if __name__ == "__main__":
    main()
