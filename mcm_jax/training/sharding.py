"""Data parallelism: one mesh axis over all devices; batches are split along it, everything else is replicated."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mcm_jax.errors import UserError


def make_mesh() -> Mesh:
    """A one-dimensional mesh, axis ``data``, over every device of every process."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree on all devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of numpy arrays on the devices, split along its first axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless a batch can be split evenly."""
    if batch_size % mesh.size:
        raise UserError(f"train.batch_size={batch_size} must be a multiple of the {mesh.size} devices")
