"""How all methods are sampled and judged, and how their modality guidance is chosen."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.peers.method import Given, Method
from benchmarks.peers.world import World
from mcm_jax import sampling, sharding
from mcm_jax.evaluation import diversity
from mcm_jax.evaluation.rows import subsets

_SEEDS = 4  # of the diversity
_MAPS = 16
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the modality guidance, of which the best is chosen for each method."""


class Guidance(NamedTuple):
    """Modality guidance: ``without + scale (controlled - without)``.

    Attributes:
      scale: 1 is none.
      own: whether ``without`` is the method's own prediction when it is shown nothing, as classifier-free guidance has
        it; else the frozen base's, which is what an MCM has at hand.
    """

    scale: float = 1.0
    own: bool = False

    def __str__(self) -> str:
        return f"{self.scale:g}" + " own" * self.own


NONE = Guidance()


def guidances_of(method: Method) -> list[Guidance]:
    """Those that are tried: of a method whose guidance is its own, none; an MCM that is shown nothing is the base."""
    if method.guides_text:
        return [NONE]
    kinds = (False,) if method.needs_eps else (False, True)
    return [Guidance(scale, own) for scale in SCALES for own in kinds if scale != 1 or not own]


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
            prepare = lambda *shown: method.prepare(params, base_params, Given(None, None, *shown))  # noqa: E731
            prepared, nothing = prepare(*twice), jnp.zeros_like(twice[1])
            unshown = prepare(twice[0], nothing) if guidance.own else None

            def control(given):
                if guidance.scale == 1:
                    return method(params, base_params, given, prepared)
                if guidance.own:
                    eps = method(params, base_params, given._replace(present=nothing), unshown)
                else:
                    eps = base.predict(base_params, given.x_t, given.t, given.context, given.level)
                    given = given._replace(eps=eps if method.needs_eps else None)
                return sampling.guide(eps, method(params, base_params, given, prepared), guidance.scale)

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
        self, params: Any, given: Sequence[str], which: np.ndarray, keys: jax.Array, guidance: Guidance = NONE
    ) -> np.ndarray:
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
    guidance: Guidance = NONE,
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
