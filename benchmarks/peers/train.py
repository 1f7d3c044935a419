"""Trains a method: the same records, loss, optimizer and averaging for all."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.peers.method import Given, Method
from benchmarks.peers.methods import Distilled, Judged
from benchmarks.peers.world import World
from mcm_jax import losses, sharding
from mcm_jax.base import Base
from mcm_jax.errors import UserError
from mcm_jax.mcm import parameter_count
from mcm_jax.schedules import Schedule
from mcm_jax.training import feed, state, step
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.optimizer import make_optimizer, make_schedule


def weighting_of(name: str, world: World) -> str:
    """Of the loss: the paper's form of an MCM, and the peers as they were published, have eps; others the config's."""
    return "eps" if name.endswith(("-paper", "-eps")) else world.run.loss.weighting


def decay_steps(steps: int) -> int:
    """Of a training by ``wsd``, in which the rate falls: the last fifth."""
    return max(1, steps // 5)


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
    example = run.mcm.modulator(world.modalities, base)
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
      steps: of a training.
      batch_size: pairs a step.
      optimizer: of :mod:`mcm_jax.training.optimizer`.
      schedule: of the learning rate; ``wsd`` falls over :func:`decay_steps`.
    """

    def __init__(
        self,
        name: str,
        world: World,
        method: Method,
        steps: int,
        batch_size: int,
        optimizer: str = "adamw",
        schedule: str = "cosine",
    ):
        self._name, self._world, self._method = name, world, method
        self._steps, self._batch_size, self._compiled = steps, batch_size, None
        t = world.run.train
        given = {"steps": steps, "warmup_steps": min(t.warmup_steps, steps // 10), "decay_steps": decay_steps(steps)}
        rises_and_falls = make_schedule(schedule, learning_rate=1.0, **given)
        self._optimizer = make_optimizer(optimizer, rises_and_falls, weight_decay=t.weight_decay, clip_norm=t.clip_norm)

    def __call__(self, rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
        """Averaged params, and what there is to say of the training."""
        world, method, steps, t = self._world, self._method, self._steps, self._world.run.train
        init = jax.jit(method.init)
        begin = lambda: sharding.replicate(init(jax.random.key(seed), world.base.params), world.mesh)  # noqa: E731
        said: dict[str, Any] = {"rate": rate, "steps": steps, "seed": seed, "parameters": 0}
        if self._name == "judge":
            return jax.tree.map(lambda p: p * rate, begin()), said
        optimizer = self._optimizer
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
