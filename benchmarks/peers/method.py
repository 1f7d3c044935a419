"""What a method is: what it is asked, and what it answers."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax


class Given(NamedTuple):
    """What a method is asked about; ``[B, ...]`` each.

    Attributes:
      x_t: noisy latents ``[B, H, W, C]``.
      t: timesteps ``[B]``.
      conditions: a batch for each modality, on the method's grid.
      present: bool ``[B, M]``.
      context: of the prompts ``[B, L, D]``; None for an unconditional base.
      level: alpha and sigma ``[B]``; None are the schedule's at t.
      eps: the base's own prediction, where it is at hand.
      negative: of the negative prompts, for a method that takes text guidance upon itself.
    """

    x_t: jax.Array
    t: jax.Array
    conditions: Mapping[str, jax.Array]
    present: jax.Array
    context: jax.Array | None = None
    level: tuple[jax.Array, jax.Array] | None = None
    eps: jax.Array | None = None
    negative: jax.Array | None = None


class Method(Protocol):
    """A way of control.

    Attributes:
      needs_eps: whether it works on the base's prediction and needs no gradient through the base.
      guides_text: whether it takes text guidance upon itself; others are asked for both prompts.
      grid: height and width at which it takes the conditions.
    """

    needs_eps: bool
    guides_text: bool
    grid: tuple[int, int]

    def init(self, key: jax.Array, base_params: Any) -> Any:
        """What is trained, as it is at first: a pytree."""
        ...

    def prepare(self, params: Any, base_params: Any, given: Given) -> Any:
        """What does not depend on x_t and t: made once a picture."""
        ...

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: Any) -> jax.Array:
        """The noise under control, ``[B, H, W, C]``."""
        ...
