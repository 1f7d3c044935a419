"""One training step: noise is added, the base predicts (:mod:`.feed`), the MCM learns.

These are separate jitted functions. The last one, which holds the gradient, has no argument that contains the base's
params: a gradient with respect to them cannot be asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mcm_jax import losses, modalities
from mcm_jax.data.pipeline import to_float
from mcm_jax.draws import MODALITY_DROP, Draws, example_keys
from mcm_jax.mcm import Modulator
from mcm_jax.training.state import TrainState, update_ema

Record = dict[str, Any]


def make_noise_step(
    modulator: Modulator, draws: Draws, *, seed: int, drop_rate: float
) -> Callable[[Mapping[str, jax.Array]], Record]:
    """Returns jitted ``noise_step(batch) -> record``, a record that only lacks the base's prediction.

    A batch has ``latent`` (float16) or ``image`` (uint8), ``[B, H, W, C]``, ``index`` (which example), ``draw`` (which
    draw; both int32 ``[B]``), ``seen`` (how often the example was seen before, int32 ``[B]``) and every modality. A
    record has ``x_t``, ``noise`` (the target), ``t``, ``importance`` (of t), ``conditions`` and ``present``. Which
    modalities are hidden is drawn anew each time that an example is seen, by the run's own seed.
    """
    names, schedule = [m.name for m in modulator.modalities], modulator.schedule
    maps = [m.name for m in modulator.modalities if m.kind != "labels"]

    @jax.jit
    def noise_step(batch: Mapping[str, jax.Array]) -> Record:
        values = to_float({k: v for k, v in batch.items() if k in ("image", *names)}, maps)
        x0 = values["image"] if "image" in batch else batch["latent"].astype(jnp.float32)
        x_t, noise, t = draws.noised(schedule, x0, batch["index"], batch["draw"])
        drop_keys = example_keys(seed, MODALITY_DROP, batch["index"], batch["seen"])
        present = jax.vmap(lambda k: modalities.drop(k, len(names), drop_rate))(drop_keys)
        conditions = {name: values[name] for name in names}
        importance = draws.importance(t)
        return {
            "x_t": x_t,
            "noise": noise,
            "t": t,
            "importance": importance,
            "conditions": conditions,
            "present": present,
        }

    return noise_step


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
        # Every mean is over uniform timesteps, whatever density they were drawn with.
        importance = record["importance"]
        metrics = {
            "mse": (importance * error).mean(),
            "mse_of_base": (importance * losses.prediction_error(record["eps"], record["noise"])).mean(),
            "modulation": (importance * size).mean(),
        }
        return (importance * (weight * error + l1 * size)).mean(), metrics

    def train_step(state: TrainState, record: Record) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, record)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32, which strict mode refuses
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, ema_decay)
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
