"""Several processes that run one program, on one host or many: they meet, agree, stop together and fail together.

JAX's coordination service, which process 0 hosts, does the talking: a key-value store, and barriers that need no
device. Left to itself it tells of a lost process after minutes, by pages of C++ text; of one that fails while the
others wait in a collective it does not tell at all. So each process has two threads of ours that listen
(:class:`.watch.Watch`).

    with distributed.cluster(coordinator, num_processes, process_id):
        ...  # the whole program

In a program that is one process by itself everything here does nothing.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mcm_jax.distributed import service
from mcm_jax.distributed.joining import join
from mcm_jax.distributed.service import synchronise
from mcm_jax.distributed.watch import Watch
from mcm_jax.errors import Interrupted, UserError

__all__ = ["agree", "any_process", "check_watched", "cluster", "everyones", "fail", "is_first", "synchronise"]

_watch: Watch | None = None


@contextlib.contextmanager
def cluster(coordinator: str | None, num_processes: int | None = None, process_id: int | None = None) -> Iterator[None]:
    """Makes this process one of a cluster for a program's length, and lets all of them end together.

    If one process fails, or dies, every other one ends within half a minute by ``os._exit(1)``, with one message on
    stderr, wherever it is: in a collective, in a barrier, at its own end. The process that fails raises as usual, and
    leaves the others alone once it has printed its error. Processes whose work is done wait for the others at the end.
    :class:`~mcm_jax.errors.Interrupted` is an end, not a failure: all processes raise it at the same step, or the one
    that does waits here for the others.

    To be entered before JAX touches a device.

    Args:
      coordinator: ``HOST:PORT`` of process 0, where it will listen; ``auto`` where JAX knows the cluster (Cloud TPU,
        Slurm, Open MPI, Kubernetes); None for a process by itself.
      num_processes: how many there are; not with ``auto``.
      process_id: which one this is, from 0; not with ``auto``.

    Raises:
      UserError: arguments that do not go together, a cluster that JAX does not know, or no way to the coordinator.
    """
    global _watch
    relay = join(coordinator, num_processes, process_id)
    if coordinator is None or service.client() is None:
        yield
        return
    _watch = Watch(relay)
    stopped = None
    try:
        try:
            yield
        except (Interrupted, SystemExit) as e:
            if isinstance(e, SystemExit) and e.code:
                raise
            stopped = e
        _watch.leave()
    except BaseException as e:
        _watch.fail(e)
        raise
    _watch = None
    if stopped:
        raise stopped


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return service.client() is None or service.process() == 0


def check_watched() -> None:
    """Raises UserError where processes were joined otherwise than by :func:`cluster`, so that nothing ends them."""
    if service.client() is not None and _watch is None:
        raise UserError(
            "jax.distributed.initialize was called, and nothing here would see that another process fails. Call "
            "mcm_jax.distributed.cluster('auto') in its place, as a context manager around the whole program"
        )


def agree(facts: Mapping[str, str]) -> None:
    """Refuses processes that differ in what must be the same. All of them call it, with the same keys.

    Raises:
      UserError: on every process, with each key whose values differ, and who has which.
    """
    said = everyones(dict(facts))
    lines = {}
    for key in dict.fromkeys(key for known in said.values() for key in known):
        having: dict[Any, list[int]] = {}
        for process, known in said.items():
            having.setdefault(known.get(key), []).append(process)
        if len(having) > 1:
            lines[key] = f"  {key}: " + ", ".join(f"{_names(who)} {value!r}" for value, who in having.items())
    if lines:
        raise UserError(
            "\n".join(
                (f"the processes do not agree on {', '.join(lines)}. All of them need the same:", *lines.values())
            )
        )


def everyones(value: Any) -> dict[int, Any]:
    """What each process gives, by its number. All of them call it, and wait for each other.

    Args:
      value: this process' own; anything that JSON holds.
    """
    if (client := service.client()) is None:
        return {0: value}
    folder = f"{service.ROOT}/said/{service.rounds['said']}/"
    client.key_value_set(folder + str(service.process()), json.dumps(value))
    synchronise("said")
    return {process: json.loads(text) for process, text in sorted(service.numbered(client, folder).items())}


def any_process(flag: bool) -> bool:
    """Whether to stop, asked at every step: all processes get True at the same call after it is True in any of them.

    That call comes some steps later, as the processes run on meanwhile: each says how far it is, and the first call
    that nobody has made is the one. Until then it costs under a microsecond and no communication. Where the program
    ends before that call nobody gets True.

    Args:
      flag: whether this process wants it, e.g. as a signal came.
    """
    if service.client() is None:
        return flag
    check_watched()
    return _watch.any_process(flag)


def fail(error: BaseException) -> None:
    """Tells the other processes of an error at once, before what still happens on its way out of :func:`cluster`.

    For a ``finally`` that waits for other processes, e.g. one that closes checkpoints: they would wait in turn. Does
    not return where the error only follows from another process' failure; then that is what is said.
    """
    if _watch:
        _watch.fail(error)


def _names(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {shown}" if len(processes) == 1 else f"processes {shown}"
