"""The step of several trials as one compiled program, and what goes into it.

Their states are stacked over a leading axis, the trials, over which a single run's step is vmapped; the axis is split
over the devices, so that a trial lies on one device. A batch is read, noised and given its prediction once for all
trials of a seed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mcm_jax import losses, sharding
from mcm_jax.mcm import Modulator
from mcm_jax.training import assembly
from mcm_jax.training import step as steps_lib
from mcm_jax.training.loop import Clock
from mcm_jax.training.optimizer import make_optimizer
from mcm_jax.training.parts import Parts
from mcm_jax.training.settings import RunSettings
from mcm_jax.training.state import TrainState
from mcm_jax.training.step import Record

TOGETHER_KEYS = frozenset(
    {
        *("seed", "train.learning_rate", "train.warmup_steps", "train.weight_decay", "train.ema_decay"),
        *("loss.weighting", "loss.l1", "loss.snr_gamma", "modalities.drop_rate"),
    }
)
"""Keys of a config, dotted, in which trials of one program may differ."""


class Hyper(NamedTuple):
    """What differs between trials, as inputs of the program: of one trial, or stacked over several.

    Attributes:
      learning_rate: of each step of the run, float32 ``[steps]``: whatever its schedule is.
      weight_decay: as in the config, like the next three; float32 ``[]``.
      ema_decay: of the averaged params.
      l1: of the loss.
      snr_gamma: of the loss.
      weighting: place among :data:`mcm_jax.losses.WEIGHTINGS`, int32 ``[]``.
      seed: place among the seeds that records are made for, int32 ``[]``.
      drop: place among the drop rates that they are made for, int32 ``[]``.
    """

    learning_rate: Any
    weight_decay: Any
    ema_decay: Any
    l1: Any
    snr_gamma: Any
    weighting: Any
    seed: Any
    drop: Any


def hyper_of(settings: RunSettings, seeds: Sequence[int], rates: Sequence[float]) -> Hyper:
    """Of one trial; `seeds` and `rates` are those that records are made for."""
    t, loss = settings.train, settings.loss
    with jax.numpy_dtype_promotion("standard"):
        learning_rate = np.asarray(assembly.schedule_of(settings)(jnp.arange(t.steps)), np.float32)
    return Hyper(
        learning_rate=learning_rate,
        weight_decay=np.float32(t.weight_decay),
        ema_decay=np.float32(t.ema_decay),
        l1=np.float32(loss.l1),
        snr_gamma=np.float32(loss.snr_gamma),
        weighting=np.int32(losses.WEIGHTINGS.index(loss.weighting)),
        seed=np.int32(seeds.index(settings.seed)),
        drop=np.int32(rates.index(settings.modalities.drop_rate)),
    )


def stacked(each: Sequence[Any], size: int, mesh: Mesh) -> list[Any]:
    """Pytrees of trials stacked, `size` of them for each call of the program, on the devices; the last is repeated."""
    padded = [*each, *[each[-1]] * (-len(each) % size)]
    parts = (padded[start : start + size] for start in range(0, len(padded), size))
    return [sharding.split_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *part), mesh) for part in parts]


def make_program(modulator: Modulator, settings: RunSettings, mesh: Mesh, seeds: int) -> Callable[..., Any]:
    """Returns jitted ``program(states, hypers, record) -> (states, metrics)``; the states are donated.

    States, hypers and metrics are stacked over trials, which are split over all devices. A record is one of
    :func:`mcm_jax.training.step.make_noise_step` for several drop rates with its ``eps``, each stacked over seeds, on
    all devices, and ``step``: a state of another step stays as it is.

    Args:
      modulator: the MCM and its modulation.
      settings: of any trial.
      mesh: of the devices.
      seeds: how many a record is made for.
    """
    t = settings.train

    def one(state: TrainState, hyper: Hyper, record: Record) -> tuple[TrainState, dict[str, jax.Array]]:
        optimizer = make_optimizer(
            t.optimizer,
            lambda count: hyper.learning_rate[count],
            weight_decay=hyper.weight_decay,
            clip_norm=t.clip_norm,
        )
        numbers = {k: getattr(hyper, k) for k in ("weighting", "l1", "snr_gamma", "ema_decay")}
        update = steps_lib.make_update(modulator, optimizer, **numbers, accumulate=t.accumulate)
        shared = {k: v for k, v in record.items() if k not in ("step", "present")}
        # Of one seed, no trial has a copy of its own.
        own = jax.tree.map(lambda a: a[hyper.seed] if seeds > 1 else a[0], shared)
        new, metrics = update(state, own | {"present": record["present"][hyper.seed, hyper.drop]})
        due = state.step == record["step"]
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, state), metrics

    def trials(states: TrainState, hypers: Hyper, record: Record) -> tuple[TrainState, dict[str, jax.Array]]:
        if states.step.shape[0] > 1:
            return jax.vmap(one, in_axes=(0, 0, None))(states, hypers, record)
        # On CPUs a convolution vmapped over a single trial is slower than one of that trial.
        found = one(*jax.tree.map(lambda leaf: leaf[0], (states, hypers)), record)
        return jax.tree.map(lambda leaf: leaf[None], found)

    split = PartitionSpec(mesh.axis_names)
    specs = dict(in_specs=(split, split, PartitionSpec()), out_specs=(split, split))
    return jax.jit(jax.shard_map(trials, mesh=mesh, check_vma=False, **specs), donate_argnums=0)


def records_of(
    parts: Parts,
    settings: RunSettings,
    seeds: Sequence[int],
    rates: Sequence[float],
    steps: range,
    mesh: Mesh,
    clock: Clock,
) -> Iterator[Record]:
    """Yields the record of each step for all seeds and drop rates, each seed's batch read and noised once."""
    draws, whole = settings.draws_for(parts.card), NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=whole)
    def stack(step: int, *each: Record) -> Record:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) | {"step": step}

    how = dict(batch_size=settings.train.batch_size, steps=steps, mesh=mesh, waited=clock.wait)
    with contextlib.ExitStack() as closing:
        feeds = []
        for seed in seeds:
            noise_step = steps_lib.make_noise_step(parts.modulator, draws, seed=seed, drop_rate=rates)
            feeds.append(closing.enter_context(contextlib.closing(parts.feed.records(noise_step, seed=seed, **how))))
        for step, *each in zip(steps, *feeds, strict=True):
            yield stack(np.int32(step), *each)
