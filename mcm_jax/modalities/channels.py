"""What the MCM sees of all modalities at once, and which of them an example shows."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mcm_jax.modalities.modality import Modality


def total_channels(modalities: tuple[Modality, ...]) -> int:
    """Channels that :func:`stack` returns: each modality's and its flag."""
    return sum(m.channels + 1 for m in modalities)


def stack(modalities: tuple[Modality, ...], conditions: Mapping[str, jax.Array], present: jax.Array) -> jax.Array:
    """Builds the MCM's condition channels.

    Args:
      modalities: which, in their order.
      conditions: a batch for each modality's name, on the grid.
      present: bool ``[B, len(modalities)]``.

    Returns:
      float32 ``[B, H, W, total_channels(modalities)]``: per modality its channels, zero where absent, and its flag. A
      pixel where the modality is unknown (:meth:`Modality.known_at`) is as where it is absent, its flag, too.
    """
    parts = []
    for i, modality in enumerate(modalities):
        channels = modality.channels_of(conditions[modality.name])
        flag = present[:, i, None, None, None].astype(jnp.float32)
        known = modality.known_at(conditions[modality.name])
        if known is not None:
            flag = flag * known[..., None].astype(jnp.float32)
        parts += [channels * flag, jnp.broadcast_to(flag, (*channels.shape[:3], 1))]
    return jnp.concatenate(parts, axis=-1)


def drop(key: jax.Array, count: int, rate: float) -> jax.Array:
    """Draws which modalities one training example shows: bool ``[count]``, each hidden independently with ``rate``."""
    return jax.random.bernoulli(key, 1 - rate, (count,))
