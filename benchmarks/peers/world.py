"""What all methods share: base, pairs, held-out maps and judges; how they are sampled and judged."""

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.peers.method import Given, Method
from mcm_jax import sampling, sharding
from mcm_jax.base import Base
from mcm_jax.config import read
from mcm_jax.data.inputs import Inputs, prepare
from mcm_jax.errors import UserError
from mcm_jax.evaluation import diversity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, judges_of
from mcm_jax.evaluation.rows import subsets
from mcm_jax.modalities import Modality
from mcm_jax.sharding import make_mesh
from mcm_jax.training import RunSettings

_SEEDS = 4  # of the diversity
_MAPS = 16


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


def open_world(
    config: str, *, pairs: int, select: int, report: int, references: int, text_guidance: float | None = None
) -> World:
    """Loads base, data and judges of a file in ``configs/``; text guidance is the config's where none is given."""
    settings = importlib.import_module(f"configs.{config}").get_config()
    if text_guidance is not None:
        settings.sampling.text_guidance = text_guidance
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


class Drawer:
    """Samples of a method for held-out maps, by the config's own sampling but for the modality guidance.

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

        @functools.partial(jax.jit, static_argnums=0)
        def run(guidance, params, base_params, keys, conditions, present, context, negative):
            twice = (conditions, present)
            if guided and not method.guides_text:
                twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), twice)
            prepared = method.prepare(params, base_params, Given(None, None, *twice))

            def control(given):
                if guidance == 1:
                    return method(params, base_params, given, prepared)
                eps = base.predict(base_params, given.x_t, given.t, given.context, given.level)
                given = given._replace(eps=eps if method.needs_eps else None)
                return sampling.guide(eps, method(params, base_params, given, prepared), guidance)

            def denoise(x, at):
                level = at.alpha, at.sigma
                if not guided or method.guides_text:
                    return control(Given(x, at.t, *twice, context, level, negative=negative if guided else None))
                x, t, level = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x, at.t, level))
                given = Given(x, t, *twice, jnp.concatenate([negative, context]), level)
                return sampling.guide(*jnp.split(control(given), 2), settings.text_guidance)

            noise = sampling.initial_noise(keys, base.latent_shape)
            return base.decode(base_params, sampling.sample(denoise, noise, keys, table))

        self._run = run
        held_out = world.held_out
        self._maps = {m.name: m.resize_all(held_out.conditions[m.name], *method.grid) for m in world.modalities}
        self._captions = held_out.captions if base.is_text_conditional else None

    def __call__(
        self, params: Any, given: Sequence[str], which: np.ndarray, keys: jax.Array, guidance: float = 1.0
    ) -> np.ndarray:
        """Pictures ``[N, H, W, 3]`` in [-1, 1] for the held-out maps `which`, told those of the modalities `given`.

        Modality guidance other than 1 asks the base alone, too: what an MCM does anyway.
        """
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
            images = np.asarray(self._run(guidance, params, world.base.params, *batch), np.float32)
            parts.append(np.clip(images[: len(which) - start], -1, 1))
        return np.concatenate(parts)


def judged(
    world: World,
    draw: Drawer,
    params: Any,
    which: np.ndarray,
    seed: int = 0,
    whole: bool = False,
    guidance: float = 1.0,
) -> dict[str, dict[str, float]]:
    """Numbers of each subset of the modalities, none where a picture is not finite.

    Mean IoU and F1 alone unless the `whole` is asked for.
    """
    found: dict[str, dict[str, float]] = {}
    names = [m.name for m in world.modalities]
    for row, given in subsets(names).items():
        images = draw(params, given, which, sampling.sample_keys(2 * seed, len(which)), guidance)
        found[row] = {}
        if not np.isfinite(images).all():  # which judges refuse
            continue
        judges = [judge for judge in world.judges if whole or judge.conditional]
        found[row] = common.numbers_of(judges, images, which, 5)
        if whole and len(given) == len(names):
            few = np.tile(which[:_MAPS], _SEEDS)
            many = draw(params, given, few, sampling.sample_keys(2 * seed + 1, len(few)), guidance)
            if np.isfinite(many).all():
                spread = float(diversity(many.reshape(_SEEDS, -1, *many.shape[1:])))
                found[row]["diversity"] = round(spread, 5)
    return found


def score(rows: dict[str, dict[str, float]]) -> float:
    """What rates are chosen by: mean IoU, mean over the subsets; -1 where one has none."""
    values = [row.get("miou", np.nan) for row in rows.values()]
    return float(np.mean(values)) if np.isfinite(values).all() else -1.0
