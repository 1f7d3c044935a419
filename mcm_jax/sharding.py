"""Where arrays lie: a mesh with the axes ``data`` and ``fsdp`` over the devices.

Batches are split over all devices. A frozen base's parameters lie whole on each device, or, where ``fsdp`` is above 1,
split over that axis, each tensor along one of its own: a device then holds its share of the base, and a tensor is whole
on it only while it is used. What is trained, and its optimizer, is whole everywhere.

All of it works in several processes (``jax.distributed``), each of which holds its own devices' parts and no more.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mcm_jax.errors import OutOfMemory, UserError, expect


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices are laid out. The config's section ``mesh``.

    Attributes:
      fsdp: over how many devices the base's parameters are split; 1 keeps them whole on each.
      data: how many such groups of devices there are; 0 is what is left of the devices.
    """

    fsdp: int = 1
    data: int = 0

    def __post_init__(self):
        expect(self.fsdp >= 1, "fsdp", "at least 1", self.fsdp)
        expect(self.data >= 0, "data", "at least 0", self.data)


def make_mesh(settings: MeshSettings = MeshSettings()) -> Mesh:
    """The mesh of axes ``data`` and ``fsdp`` over every device of every process.

    Raises:
      UserError: the settings do not fit the number of devices; lists what does.
    """
    count, fsdp = jax.device_count(), settings.fsdp
    if (settings.data or max(count // fsdp, 1)) * fsdp != count:
        fits = [f for f in range(1, count + 1) if count % f == 0]
        if fsdp in fits:
            way_out = f"set config.mesh.data to {count // fsdp}, or to 0 for what is left of the devices"
        else:
            way_out = f"set config.mesh.fsdp to {_either(fits)}, and config.mesh.data to 0 for what is left of them"
        asked = f"data={settings.data} x fsdp={fsdp}" if settings.data else f"fsdp={fsdp}"
        needed = f"{settings.data * fsdp}" if settings.data else f"a multiple of {fsdp}"
        raise UserError(f"config.mesh: {asked} needs {needed} devices, there are {count}; {way_out}")
    return _mesh(fsdp, jax.devices())


def local_mesh(settings: MeshSettings = MeshSettings()) -> Mesh:
    """The same over this process's devices alone, for work that processes share out by themselves.

    It fits any number of devices, those of a machine that the settings were not made for too: the base is split as far
    as they allow, over the greatest common divisor of their number and ``fsdp``, and ``data`` is what is left.
    """
    devices = jax.local_devices()
    return _mesh(math.gcd(settings.fsdp, len(devices)), devices)


def _mesh(fsdp: int, devices: Sequence[jax.Device]) -> Mesh:
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree of numpy or JAX arrays, the same in each process, whole on all devices."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def place(params: Any, mesh: Mesh) -> Any:
    """Puts frozen parameters on the devices: split as :func:`param_sharding` has it.

    Args:
      params: a pytree of numpy or JAX arrays, or one array, the same in each process. Each leaf goes in parts to where
        it belongs; no device gets a whole copy of what is split. Shapes (``jax.ShapeDtypeStruct``) get their sharding.
      mesh: of the devices.
    """
    return jax.tree.map(lambda leaf: _put(leaf, param_sharding(leaf.shape, mesh)), params)


def param_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How a frozen parameter lies: split over ``fsdp`` along its longest axis that can be; whole without one."""
    fsdp = mesh.shape.get("fsdp", 1)
    axes = [axis for axis, size in enumerate(shape) if size and size % fsdp == 0]
    if fsdp == 1 or not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters, or their shapes with shardings, are split over; None where they are whole."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    split = (s for s in shardings if isinstance(s, NamedSharding) and not s.is_fully_replicated)
    return next((s.mesh for s in split), None)


def gather(params: Any, x: jax.Array, mesh: Mesh | None) -> tuple[Any, jax.Array]:
    """Under jit: split parameters made whole for a network that is about to see ``x``, whose rows stay split.

    Left to itself, the compiler multiplies by parts of the parameters where it can, and for it holds the activations of
    a whole group's batch on each device.

    Args:
      params: a pytree, as :func:`place` puts it.
      x: ``[B, ...]``, the network's input.
      mesh: from :func:`mesh_of`; without one, both come back as they are.
    """
    if mesh is None:
        return params, x
    # Tied to x, the parameters are made whole in each of a sampler's steps, and not once, to be kept, before its loop.
    params, x = jax.lax.optimization_barrier((params, x))
    return keep_whole(params, mesh), keep_split(x, mesh)


def keep_split(tree: Any, mesh: Mesh | None) -> Any:
    """Under jit: batches ``[B, ...]`` split over all devices, where these divide them; as they are without a mesh."""
    if mesh is None:
        return tree
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: x if x.shape[0] % mesh.size else jax.lax.with_sharding_constraint(x, split), tree)


def keep_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Under jit: arrays whole on each device; as they are without a mesh."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies: its first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold: int64, ascending; all of them in a process by itself."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def split_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the devices, split along its first axis.

    Args:
      batch: a pytree of numpy arrays or random keys: this process's rows of the batch, see :func:`local_rows`.
      mesh: of the devices; the number of rows is a multiple of those of this process.

    Returns:
      JAX arrays of the whole batch.
    """
    sharding = batch_sharding(mesh)
    processes = mesh.size // len(mesh.local_devices)

    def put(rows: Any) -> jax.Array:
        if jax.dtypes.issubdtype(rows.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(rows)), impl=jax.random.key_impl(rows))
        rows = np.asarray(rows)
        return jax.make_array_from_process_local_data(sharding, rows, (len(rows) * processes, *rows.shape[1:]))

    return jax.tree.map(put, batch)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array that each process has, or one that all of them hold together, where it belongs."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(sharding=sharding)
    together = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or together:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


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


@contextlib.contextmanager
def memory_errors(what: str, way_out: str) -> Iterator[None]:
    """Turns a device's being out of memory into OutOfMemory with the way out; any other exception passes.

    Args:
      what: does not fit.
      way_out: a sentence.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not str(e).startswith("RESOURCE_EXHAUSTED"):
            raise
        first = str(e).splitlines()[0]
        raise OutOfMemory(f"a device's memory does not hold {what} ({first}). {way_out}") from e


def check_batch_size(batch_size: int, mesh: Mesh, key: str = "train.batch_size", accumulate: int = 1) -> None:
    """Raises UserError, naming the config's key and the nearest sizes that fit, unless a batch can be split evenly.

    Args:
      batch_size: of the whole batch, over all devices.
      mesh: of the devices.
      key: the config's.
      accumulate: parts that a batch is worked through in, each of them split over all devices.
    """
    unit = mesh.size * accumulate
    if batch_size < 1 or batch_size % unit:
        below = max(batch_size, 0) // unit * unit
        above = below + unit
        parts = f" x {accumulate} parts" if accumulate > 1 else ""
        fits = _either([size for size in (below, above) if size > 0])
        raise UserError(f"{key}={batch_size} must be a multiple of the {mesh.size} devices{parts}, such as {fits}")


def _either(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
