"""Data parallelism: one mesh axis over all devices; batches are split along it, everything else is replicated."""

import pathlib
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mcm_jax.errors import UserError


def make_mesh() -> Mesh:
    """A one-dimensional mesh, axis ``data``, over every device of every process."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """The same over the devices of this process alone, for work that processes share out by themselves."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree on all devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch of numpy arrays on the devices, split along its first axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def free_memory() -> int | None:
    """Bytes that are free on this process's first device; None where the device does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:  # a CPU's are the machine's
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def check_batch_size(batch_size: int, mesh: Mesh, key: str = "train.batch_size") -> None:
    """Raises UserError, naming the config's key, unless a batch can be split evenly."""
    if batch_size % mesh.size:
        raise UserError(f"{key}={batch_size} must be a multiple of the {mesh.size} devices")
