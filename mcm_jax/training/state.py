"""What training changes: the MCM's params, their average and the optimizer's state. The base is no part of it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """State of a run.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: of the MCM.
      ema_params: their exponential moving average, which samples.
      opt_state: of the optax optimizer.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    # The average is a copy: donated buffers must not be shared.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float | jax.Array) -> Any:
    """One step of the moving average; early on its decay is (1 + step) / (10 + step), to forget the start faster."""
    now = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda a, b: a * now + b * (1 - now), ema, params)
