"""JAX's coordination service, which process 0 hosts: a key-value store, and barriers that need no device.

JAX has no public way to it, nor to its detection of clusters. Nothing else in the package knows of these two.
"""

import collections
from typing import Any

from jax._src import clusters as _clusters
from jax._src import distributed as _jax_distributed

ROOT = "mcm_jax"  # of all keys and barriers
_FOREVER = 30 * 24 * 3600 * 1000  # milliseconds, of barriers: a process may work for days before it comes

rounds: collections.Counter[str] = collections.Counter()  # a barrier's name serves once


def client() -> Any:
    """The coordination service's client; None in a process by itself."""
    state = _jax_distributed.global_state
    return state.client if state.num_processes > 1 else None


def process() -> int:
    """This process' number."""
    return _jax_distributed.global_state.process_id


def count() -> int:
    """How many processes there are."""
    return _jax_distributed.global_state.num_processes


def numbered(client: Any, folder: str) -> dict[int, str]:
    """What each process has written into a folder of the store."""
    return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(folder)}


def synchronise(name: str) -> None:
    """Waits until every process is here. All processes come by the same names in the same order."""
    if service := client():
        rounds[name] += 1
        service.wait_at_barrier(f"{ROOT}/{name}/{rounds[name]}", _FOREVER)


def detect(seconds: int) -> tuple[Any, Any, Any, Any]:
    """Coordinator, count, own number and local devices of the cluster that JAX finds itself in; None what it does not.

    Raises whatever that kind of cluster has: missing variables, packages, rights.
    """
    return _clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
