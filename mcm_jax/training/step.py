"""One training step, in two halves: the base predicts, the MCM learns.

The halves are two jitted functions. The second one, which holds the gradient, has no argument that contains the base's
params: a gradient with respect to them cannot be asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mcm_jax import losses, modalities
from mcm_jax.base import Base
from mcm_jax.mcm import Modulator
from mcm_jax.training.state import TrainState, update_ema

Record = dict[str, Any]


def example_keys(seed: int, index: jax.Array, draw: jax.Array) -> jax.Array:
    """Keys ``[B]`` of examples' draws: the same (seed, example, draw) is the same noise, in any batch."""
    root = jax.random.fold_in(jax.random.key(seed), 0)
    return jax.vmap(lambda i, d: jax.random.fold_in(jax.random.fold_in(root, i), d))(index, draw)


def make_predict_step(
    base: Base, modulator: Modulator, *, seed: int, drop_rate: float
) -> Callable[[Any, Mapping[str, jax.Array]], Record]:
    """Returns jitted ``predict_step(base_params, batch) -> record``: noise, timestep, and what the base makes of them.

    A batch has ``image`` (float32 ``[B, H, W, C]`` in [-1, 1]), ``index`` and ``draw`` (int32 ``[B]``) and every
    modality. A record has ``x_t``, ``eps`` (the base's), ``noise`` (the target), ``t``, ``conditions`` and ``present``.
    """
    names = [m.name for m in modulator.modalities]
    total = base.schedule.num_train_timesteps

    def draw_one(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        t = jax.random.randint(key_t, (), 0, total)
        return t, jax.random.normal(key_noise, shape), modalities.drop(key_drop, len(names), drop_rate)

    @jax.jit
    def predict_step(base_params: Any, batch: Mapping[str, jax.Array]) -> Record:
        x0 = base.encode(base_params, batch["image"])
        keys = example_keys(seed, batch["index"], batch["draw"])
        t, noise, present = jax.vmap(lambda k: draw_one(k, x0.shape[1:]))(keys)
        x_t = base.schedule.add_noise(x0, noise, t)
        eps = base.predict(base_params, x_t, t).astype(jnp.float32)
        conditions = {name: batch[name] for name in names}
        return {"x_t": x_t, "eps": eps, "noise": noise, "t": t, "conditions": conditions, "present": present}

    return predict_step


def make_train_step(
    modulator: Modulator,
    optimizer: optax.GradientTransformation,
    *,
    weighting: str,
    l1: float,
    ema_decay: float,
) -> Callable[[TrainState, Record], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns jitted ``train_step(state, record) -> (state, metrics)``; the state is donated."""

    def loss_of(params: Any, record: Record) -> tuple[jax.Array, dict[str, jax.Array]]:
        modulated, gamma, nu = modulator(
            params, record["x_t"], record["eps"], record["t"], record["conditions"], record["present"]
        )
        t = record["t"]
        weight = losses.weight(weighting, modulator.schedule.alpha(t), modulator.schedule.sigma(t))
        error = losses.prediction_error(modulated, record["noise"])
        size = losses.modulation_size(gamma, nu)
        metrics = {
            "mse": error.mean(),
            "mse_of_base": losses.prediction_error(record["eps"], record["noise"]).mean(),
            "modulation": size.mean(),
        }
        return (weight * error + l1 * size).mean(), metrics

    def train_step(state: TrainState, record: Record) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, record)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32, which strict mode refuses
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, ema_decay)
        metrics |= {"loss": loss, "gradient_norm": optax.global_norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
