"""One training step: noise is added, the base predicts (:mod:`.feed`), the MCM learns.

These are separate jitted functions. The last one, which holds the gradient, has no argument that contains the base's
params: a gradient with respect to them cannot be asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mcm_jax import losses, modalities
from mcm_jax.data.pipeline import to_float
from mcm_jax.draws import MODALITY_DROP, Draws, example_keys
from mcm_jax.errors import UserError
from mcm_jax.mcm import Modulator
from mcm_jax.training.state import TrainState, update_ema

Record = dict[str, Any]


def make_noise_step(
    modulator: Modulator, draws: Draws, *, seed: int, drop_rate: float | Sequence[float]
) -> Callable[[Mapping[str, jax.Array]], Record]:
    """Returns jitted ``noise_step(batch) -> record``, a record that only lacks the base's prediction.

    A batch has ``latent`` (float16) or ``image`` (uint8), ``[B, H, W, C]``, ``index`` (which example), ``draw`` (which
    draw; both int32 ``[B]``), ``seen`` (how often the example was seen before, int32 ``[B]``), every modality, and
    ``present`` (uint8 ``[B, M]``) where examples may lack some. A record has ``x_t``, ``noise`` (the target), ``t``,
    ``importance`` (of t), ``conditions`` and ``present``. Which modalities are hidden is drawn anew each time that an
    example is seen, by the run's own seed; what an example lacks is always hidden. ``present`` is bool ``[B, M]``; of
    several drop rates ``[rates, B, M]``, each as the rate by itself would have it.
    """
    names, schedule = [m.name for m in modulator.modalities], modulator.schedule
    maps = [m.name for m in modulator.modalities if m.continuous]

    @jax.jit
    def noise_step(batch: Mapping[str, jax.Array]) -> Record:
        values = to_float({k: v for k, v in batch.items() if k in ("image", *names)}, maps)
        x0 = values["image"] if "image" in batch else batch["latent"].astype(jnp.float32)
        x_t, noise, t = draws.noised(schedule, x0, batch["index"], batch["draw"])
        drop_keys = example_keys(seed, MODALITY_DROP, batch["index"], batch["seen"])

        def shown(rate: float) -> jax.Array:
            return jax.vmap(lambda k: modalities.drop(k, len(names), rate))(drop_keys)

        several = isinstance(drop_rate, Sequence)
        present = jnp.stack([shown(rate) for rate in drop_rate]) if several else shown(drop_rate)
        if "present" in batch:
            there = batch["present"] > 0
            present &= there[None] if several else there
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


def make_loss(
    modulator: Modulator,
    *,
    weighting: str | jax.Array,
    l1: float | jax.Array,
    snr_gamma: float | jax.Array = 5.0,
) -> Callable[[Any, Record], tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns ``loss_of(params, record) -> (loss, metrics)``, means over the record; arguments as below."""

    def loss_of(params: Any, record: Record) -> tuple[jax.Array, dict[str, jax.Array]]:
        modulated, gamma, nu = modulator(
            params, record["x_t"], record["eps"], record["t"], record["conditions"], record["present"]
        )
        t = record["t"]
        weight = losses.weight(weighting, modulator.schedule.alpha(t), modulator.schedule.sigma(t), snr_gamma)
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

    return loss_of


def make_train_step(
    modulator: Modulator, optimizer: optax.GradientTransformation, **how: Any
) -> Callable[[TrainState, Record], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns :func:`make_update`'s function jitted, with the same arguments; the state is donated."""
    return jax.jit(make_update(modulator, optimizer, **how), donate_argnums=0)


def make_update(
    modulator: Modulator,
    optimizer: optax.GradientTransformation,
    *,
    weighting: str | jax.Array,
    l1: float | jax.Array,
    ema_decay: float | jax.Array,
    snr_gamma: float | jax.Array = 5.0,
    accumulate: int = 1,
) -> Callable[[TrainState, Record], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns ``train_step(state, record) -> (state, metrics)``.

    Numbers are Python's, which are compiled into the step, or scalars that are traced: inputs of the program around it.

    Args:
      modulator: the MCM and its modulation.
      optimizer: of the MCM's params.
      weighting: of the timesteps, see :func:`mcm_jax.losses.weight`.
      l1: factor of the size of gamma and nu.
      ema_decay: of the averaged params, see :func:`mcm_jax.training.state.update_ema`.
      snr_gamma: of the weighting ``min_snr``.
      accumulate: micro-batches that a record is split into, one after the other: their mean gradient is the record's
        (to rounding), in about the memory of one of them. On CPUs a step takes several times as long: convolutions
        in a loop are slow there (jax issue 12868), and without a loop no memory is saved.

    Raises:
      UserError: on the first call, a record whose rows cannot be split evenly.
    """

    loss_of = make_loss(modulator, weighting=weighting, l1=l1, snr_gamma=snr_gamma)
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def accumulated_gradient_of(params: Any, record: Record) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        def add(total: Any, micro_batch: Record) -> tuple[Any, tuple[jax.Array, dict[str, jax.Array]]]:
            values, gradient = gradient_of(params, micro_batch)
            return jax.tree.map(jnp.add, total, gradient), values

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, values = jax.lax.scan(add, zeros, jax.tree.map(lambda a: micro_batches(a, accumulate), record))
        return jax.tree.map(jnp.mean, values), jax.tree.map(lambda g: g / accumulate, total)

    def train_step(state: TrainState, record: Record) -> tuple[TrainState, dict[str, jax.Array]]:
        # A scan of one micro-batch would be another program, whose rounding differs: runs resume bit for bit.
        (loss, metrics), gradient = (gradient_of if accumulate == 1 else accumulated_gradient_of)(state.params, record)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32, which strict mode refuses
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, ema_decay)
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def micro_batches(a: jax.Array, count: int) -> jax.Array:
    """Splits ``[B, ...]`` into ``[count, B / count, ...]``: every count-th row is of the same micro-batch.

    Not the first ``B / count`` rows and so on: a device holds neighbouring rows of the record, so that a micro-batch of
    neighbours would be one device's, and had to be sent to all others. This way each device keeps its own rows, an
    equal share of each micro-batch.
    """
    if a.shape[0] % count:
        raise UserError(f"train.accumulate: found {count}, expected a divisor of the batch of {a.shape[0]}")
    return jnp.moveaxis(a.reshape(a.shape[0] // count, count, *a.shape[1:]), 1, 0)
