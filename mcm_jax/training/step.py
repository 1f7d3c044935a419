"""One training step: noise is added, the base predicts, the MCM learns.

These are three jitted functions. The last one, which holds the gradient, has no argument that contains the base's
params: a gradient with respect to them cannot be asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcm_jax import losses, modalities
from mcm_jax.base import Base
from mcm_jax.mcm import Modulator
from mcm_jax.training.state import TrainState, update_ema

Record = dict[str, Any]


_NOISE, _DROP, _PROMPT = 0, 1, 2  # streams of keys; they never share one


def example_keys(seed: int, stream: int, index: jax.Array, draw: jax.Array) -> jax.Array:
    """Keys ``[B]`` of examples' draws: the same (seed, stream, example, draw) is the same key, in any batch."""
    root = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), stream)
    return jax.vmap(lambda i, d: jax.random.fold_in(jax.random.fold_in(root, i), d))(index, draw)


def make_noise_step(
    modulator: Modulator, *, seed: int, drop_rate: float, draws: int, prompt_drop_rate: float = 0.0
) -> Callable[[Mapping[str, jax.Array]], Record]:
    """Returns jitted ``noise_step(batch) -> record``, a record that only lacks the base's prediction.

    A batch has ``latent`` or ``image`` (float32 ``[B, H, W, C]``), ``index`` (which example), ``draw`` (how often it
    was seen before; both int32 ``[B]``), every modality and, for a text-conditional base, ``prompt`` (int32 ``[B]``). A
    record has ``x_t``, ``noise`` (the target), ``t``, ``conditions``, ``present`` and, if the batch has it, ``prompt``,
    0 where the empty prompt takes its place. Noise, timestep and prompt are those of draw ``draw % draws`` (or
    ``draw``, where ``draws`` is 0), as the base's prediction depends on them; which modalities are hidden is drawn
    anew each time.
    """
    names, schedule = [m.name for m in modulator.modalities], modulator.schedule
    total = schedule.num_train_timesteps

    def draw_one(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        key_t, key_noise = jax.random.split(key)
        return jax.random.randint(key_t, (), 0, total), jax.random.normal(key_noise, shape)

    @jax.jit
    def noise_step(batch: Mapping[str, jax.Array]) -> Record:
        x0 = batch["latent"] if "latent" in batch else batch["image"]
        index, draw = batch["index"], batch["draw"]
        kept = draw % draws if draws else draw
        t, noise = jax.vmap(lambda k: draw_one(k, x0.shape[1:]))(example_keys(seed, _NOISE, index, kept))
        drop_keys = example_keys(seed, _DROP, index, draw)
        present = jax.vmap(lambda k: modalities.drop(k, len(names), drop_rate))(drop_keys)
        x_t = schedule.add_noise(x0, noise, t)
        conditions = {name: batch[name] for name in names}
        record = {"x_t": x_t, "noise": noise, "t": t, "conditions": conditions, "present": present}
        if "prompt" in batch:
            prompt_keys = example_keys(seed, _PROMPT, index, kept)
            dropped = jax.vmap(lambda k: jax.random.bernoulli(k, prompt_drop_rate))(prompt_keys)
            record["prompt"] = jnp.where(dropped, 0, batch["prompt"])
        return record

    return noise_step


class Predictions:
    """The base's predictions for batches; those of the first ``draws`` epochs are kept in memory and serve all later.

    Args:
      base: the frozen model.
      examples: how many the data set has.
      draws: draws to keep of each example, ``examples * draws * H * W * C * 2`` bytes; 0 predicts every batch afresh.
      contexts: of the prompts, ``[P, L, D]`` on the host, for a text-conditional base.
    """

    def __init__(self, base: Base, examples: int, draws: int, contexts: np.ndarray | None = None):
        # Without a fourth argument where there is no context: any function of three can stand for a base's predict.
        self._predict = jax.jit(lambda *args: base.predict(*args).astype(jnp.float32))
        self._contexts = contexts
        self._draws = draws
        self._kept = np.zeros((examples, draws, *base.latent_shape), np.float16)
        self._known = np.zeros((examples, draws), bool)

    def _fresh(self, base_params: Any, record: Record) -> jax.Array:
        args = [record["x_t"], record["t"]]
        if self._contexts is not None:
            args.append(jax.device_put(self._contexts[np.asarray(record["prompt"])], record["x_t"].sharding))
        return self._predict(base_params, *args)

    def __call__(self, base_params: Any, batch: Mapping[str, np.ndarray], record: Record) -> Record:
        """Adds ``eps`` to the record of a batch, a float32 device array (rounded to 16 bits where it is kept)."""
        if not self._draws:
            return record | {"eps": self._fresh(base_params, record)}
        at = batch["index"], batch["draw"] % self._draws
        new = ~self._known[at]
        if new.any():
            at_new = tuple(a[new] for a in at)
            self._kept[at_new] = np.asarray(self._fresh(base_params, record))[new]
            self._known[at_new] = True
        eps = self._kept[at].astype(np.float32)
        return record | {"eps": jax.device_put(eps, record["x_t"].sharding)}


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
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)
