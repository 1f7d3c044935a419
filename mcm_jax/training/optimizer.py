"""How gradients become updates: the schedule of the learning rate, and the optimizer that follows it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from mcm_jax.errors import UserError

SCHEDULES = ("cosine", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "lion", "muon")

# Moonlight's scale of muon's updates, which gives them the size of AdamW's: one learning rate serves both.
_MUON_RMS = 0.2


def make_schedule(
    name: str, *, steps: int, learning_rate: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """The learning rate of each step.

    All begin with a linear warm-up from zero. In ``cosine`` and ``linear`` runs that are shorter it ends with the last
    step; ``constant`` and ``wsd`` runs, which can be made longer, warm up as any longer one does. What follows is

    ============ ========================================================================================
    ``cosine``   half a cosine to zero (Loshchilov & Hutter 2017, without restarts)
    ``linear``   a straight line to zero
    ``constant`` no decay: where a run shall end need not be known when it begins
    ``wsd``      warm-up, stable, decay: constant, then a straight line to zero over the last ``decay_steps``
                 (Hu et al. 2024, MiniCPM; they let it fall exponentially). In a run that ends within its warm-up
                 that line cuts off what is above it
    ============ ========================================================================================

    Those that decay reach zero with the step after the last one.

    Args:
      name: one of :data:`SCHEDULES`.
      steps: of the run.
      learning_rate: the highest one.
      warmup_steps: until it is reached; 0 starts with it.
      decay_steps: of ``wsd``, at least 1; what a run has left after its warm-up if that is less. No matter to others.

    Returns:
      A function of the number of steps done, int32 ``[]``, to a float32 ``[]``.

    Raises:
      UserError: an unknown name, or a ``wsd`` without decay.
    """
    warmup = warmup_steps if name in ("constant", "wsd") else min(warmup_steps, max(steps - 1, 0))
    start = 0.0 if warmup else learning_rate
    end = max(steps, warmup + 1)
    match name:
        case "cosine":
            return optax.warmup_cosine_decay_schedule(start, learning_rate, warmup, end)
        case "linear":
            after = optax.linear_schedule(learning_rate, 0.0, end - warmup)
        case "constant":
            after = optax.constant_schedule(learning_rate)
        case "wsd":
            if decay_steps < 1:
                raise UserError(
                    f"train.decay_steps: found {decay_steps}, expected at least 1, the last steps over which "
                    f"train.schedule=wsd decays; train.schedule=constant does not decay"
                )
            if warmup >= steps:
                rise = optax.linear_schedule(start, learning_rate, warmup)
                return lambda count: jnp.minimum(
                    rise(count), learning_rate * jnp.maximum(steps - count, 0) / decay_steps
                )
            decay = min(decay_steps, end - warmup)
            after = optax.linear_schedule(learning_rate, 0.0, decay, transition_begin=end - warmup - decay)
        case _:
            raise UserError(f"train.schedule: found {name!r}, expected one of {', '.join(SCHEDULES)}")
    return optax.join_schedules([optax.linear_schedule(start, learning_rate, warmup), after], [warmup])


def make_optimizer(
    name: str, schedule: optax.Schedule, *, weight_decay: float | jax.Array, clip_norm: float
) -> optax.GradientTransformation:
    """An optimizer with decoupled weight decay, after clipping of the whole gradient's norm.

    ========= ==========================================================================================================
    ``adamw`` Loshchilov & Hutter 2019
    ``lion``  Chen et al. 2023: the sign of a momentum, one moment in place of two. Its updates are larger than Adam's:
              they advise a learning rate of a third to a tenth, and as much more weight decay
    ``muon``  Jordan et al. 2024: an orthogonalised momentum, one moment. Matrices are inputs x outputs, a convolution's
              height and width count as inputs, as in Jordan's code; unlike there, the first and the last layer are no
              exception. Vectors (biases, norms) go by Adam with Nesterov's momentum. Scaled as in Liu et al. 2025
              (Moonlight), so that AdamW's learning rate and weight decay fit
    ========= ==========================================================================================================

    The decay is ``learning_rate * weight_decay * params`` a step, of all params.

    Args:
      name: one of :data:`OPTIMIZERS`.
      schedule: of the learning rate, from :func:`make_schedule`.
      weight_decay: 0 is off.
      clip_norm: the gradient's largest norm, over all params together; 0 is off.

    Raises:
      UserError: an unknown name.
    """
    match name:
        case "adamw":
            rule = optax.adamw(schedule, weight_decay=weight_decay)
        case "lion":
            rule = optax.lion(schedule, weight_decay=weight_decay)
        case "muon":
            rule = optax.contrib.muon(
                schedule,
                weight_decay=weight_decay,
                adam_weight_decay=weight_decay,
                muon_weight_dimension_numbers=_matrices,
                consistent_rms=_MUON_RMS,
            )
        case _:
            raise UserError(f"train.optimizer: found {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def _matrices(params: Any) -> Any:
    """How muon sees each leaf: its last axis is the output, all others are the input; None is no matrix.

    On its own optax takes leaves of two axes alone and would leave the convolutions, most of an MCM, to Adam.
    """

    def matrix(p: jax.Array) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim > 1 else None

    return jax.tree.map(matrix, params)
