"""How a process becomes one of a cluster."""

import os
import socket
import threading
from typing import Any

import jax

from mcm_jax.distributed import service
from mcm_jax.distributed.ending import end_at_once, first_line
from mcm_jax.distributed.relay import Relay
from mcm_jax.errors import UserError

_TOGETHER = 300  # seconds in which all processes must have started
_LATER = 600  # seconds after which JAX's own detection would speak: never before ours


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Relay | None:
    """Joins the cluster; the relay of a process that is not the first."""
    explicit = (num_processes, process_id)
    if coordinator is None:
        if explicit != (None, None):
            raise UserError("--num_processes and --process_id go with --coordinator=HOST:PORT of process 0")
        return None
    devices = None
    if coordinator == "auto":
        if explicit != (None, None):
            raise UserError("--coordinator=auto finds --num_processes and --process_id itself: leave them out")
        coordinator, num_processes, process_id, devices = _detect()
    elif num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UserError("--coordinator needs --num_processes=N and --process_id=I, with I in 0..N-1")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of process 0, or auto")
    if num_processes == 1:
        return None
    # A signal is the program's own to handle; JAX's service would keep SIGTERM from it.
    jax.config.update("jax_enable_preemption_service", False)
    if process_id == 0:
        _check_free(coordinator, int(port))
    relay = Relay(host.strip("[]"), int(port)) if process_id else None
    message = (
        f"error: the {num_processes} processes did not find each other at {coordinator} within {_TOGETHER} s. Start "
        f"all of them, with the same --coordinator, which all hosts can reach"
    )
    late = threading.Timer(_TOGETHER, end_at_once, (message,))  # JAX would abort, with a page of C++ text
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            relay.address if relay else coordinator,
            num_processes,
            process_id,
            local_device_ids=devices,
            initialization_timeout=_LATER,
            heartbeat_timeout_seconds=_LATER,
            shutdown_timeout_seconds=60,
        )
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--coordinator={coordinator}: process {process_id} cannot join ({first_line(e)})") from e
    finally:
        late.cancel()
    return relay


def _check_free(coordinator: str, port: int) -> None:
    """Refuses a port that is taken: JAX would end in a segmentation fault."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(("", port)).close()
    except OSError as e:
        raise UserError(
            f"--coordinator={coordinator}: process 0 cannot listen there ({os.strerror(e.errno)}). Take another port, "
            f"in all processes"
        ) from e


def _detect() -> tuple[str, int, int, Any]:
    """Coordinator, count, own number and local devices, from the cluster that JAX finds itself in."""
    reason = "none is here"
    try:
        found = service.detect(_TOGETHER)
    except Exception as e:  # whatever that kind of cluster has
        found, reason = (None, None, None, None), first_line(e)
    if None in found[:3]:
        raise UserError(
            f"--coordinator=auto: JAX finds no cluster ({reason}). It knows Cloud TPU, Slurm, Open MPI and Kubernetes; "
            f"elsewhere say --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    return found
