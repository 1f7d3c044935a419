"""Several processes that run one program, on one host or many: they meet, agree, stop together and fail together.

JAX's coordination service, which process 0 hosts, does the talking: a key-value store, and barriers that need no
device. Left to itself it tells of a lost process after minutes, by pages of C++ text; of one that fails while the
others wait in a collective it does not tell at all. So each process has two threads of ours that listen
(:class:`_Watch`).

    with distributed.cluster(coordinator, num_processes, process_id):
        ...  # the whole program

In a program that is one process by itself everything here does nothing.
"""

import atexit
import collections
import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

# JAX has no public way to its key-value store, its barriers and its detection of clusters. Nothing else in the package
# knows of these two.
from jax._src import clusters as _clusters
from jax._src import distributed as _jax_distributed

from mcm_jax.errors import Interrupted, UserError

_BEAT = 1.0  # seconds between two beats of a process
_SILENCE = 20  # beats without which a process counts as dead; compilers and the GIL may hold one up for some seconds
_GRACE = 1.0  # seconds in which a process may come by an error of its own before it ends by another's
_TOGETHER = 300  # seconds in which all processes must have started
_LATER = 600  # seconds after which JAX's own detection would speak: never before ours
_FOREVER = 30 * 24 * 3600 * 1000  # milliseconds, of barriers: a process may work for days before it comes
_SILENT = f"has not been heard of for {_SILENCE * _BEAT:.0f} s"
_STOPPED = "all processes have stopped. Its own output, where there is one, says more"
_ROOT = "mcm_jax"
_NEWS, _BEATS, _GONE = f"{_ROOT}/news/", f"{_ROOT}/beat/", f"{_ROOT}/gone/"
_OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # JAX's errors that no other process causes

_rounds: collections.Counter[str] = collections.Counter()  # a barrier's name serves once
_watch: "_Watch | None" = None


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
    relay = _initialize(coordinator, num_processes, process_id)
    if coordinator is None or _client() is None:
        yield
        return
    _watch = _Watch(relay)
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
    return _client() is None or _jax_distributed.global_state.process_id == 0


def synchronise(name: str) -> None:
    """Waits until every process is here. All processes come by the same names in the same order."""
    if client := _client():
        _rounds[name] += 1
        client.wait_at_barrier(f"{_ROOT}/{name}/{_rounds[name]}", _FOREVER)


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
    if (client := _client()) is None:
        return {0: value}
    folder = f"{_ROOT}/said/{_rounds['said']}/"
    client.key_value_set(folder + str(_jax_distributed.global_state.process_id), json.dumps(value))
    synchronise("said")
    return {process: json.loads(text) for process, text in sorted(_numbered(client, folder).items())}


def any_process(flag: bool) -> bool:
    """Whether to stop, asked at every step: all processes get True at the same call after it is True in any of them.

    That call comes some steps later, as the processes run on meanwhile: each says how far it is, and the first call
    that nobody has made is the one. Until then it costs under a microsecond and no communication. Where the program
    ends before that call nobody gets True.

    Args:
      flag: whether this process wants it, e.g. as a signal came.
    """
    if _client() is None:
        return flag
    if _watch is None:
        raise RuntimeError("any_process is for programs inside of distributed.cluster")
    return _watch.any_process(flag)


def fail(error: BaseException) -> None:
    """Tells the other processes of an error at once, before what still happens on its way out of :func:`cluster`.

    For a ``finally`` that waits for other processes, e.g. one that closes checkpoints: they would wait in turn. Does
    not return where the error only follows from another process' failure; then that is what is said.
    """
    if _watch:
        _watch.fail(error)


def _client() -> Any:
    """The coordination service's client; None in a process by itself."""
    state = _jax_distributed.global_state
    return state.client if state.num_processes > 1 else None


def _numbered(client: Any, folder: str) -> dict[int, str]:
    """What each process has written into a folder of the store."""
    return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(folder)}


def _names(processes: Sequence[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process {shown}" if len(processes) == 1 else f"processes {shown}"


def _initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> "_Relay | None":
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
    relay = _Relay(host.strip("[]"), int(port)) if process_id else None
    message = (
        f"error: the {num_processes} processes did not find each other at {coordinator} within {_TOGETHER} s. Start "
        f"all of them, with the same --coordinator, which all hosts can reach"
    )
    late = threading.Timer(_TOGETHER, _exit, (message,))  # JAX would abort, with a page of C++ text
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
        raise UserError(f"--coordinator={coordinator}: process {process_id} cannot join ({_first_line(e)})") from e
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
        found = _clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _TOGETHER)
    except Exception as e:  # each kind of cluster has its own: missing variables, packages, rights
        found, reason = (None, None, None, None), _first_line(e)
    if None in found[:3]:
        raise UserError(
            f"--coordinator=auto: JAX finds no cluster ({reason}). It knows Cloud TPU, Slurm, Open MPI and Kubernetes; "
            f"elsewhere say --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    return found


def _first_line(error: BaseException) -> str:
    """An error in a line, for another process' message."""
    if isinstance(error, KeyboardInterrupt):
        return "it was stopped by a signal"
    text = next(iter(str(error).splitlines()), "").rstrip(" .;:")
    return text if isinstance(error, UserError | SystemExit) else f"{type(error).__name__}: {text}"


def _in_full(error: BaseException) -> str:
    """An error as the process that has it prints it."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return _first_line(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _may_follow(error: BaseException | None) -> bool:
    """Whether an error may be what another process' end looks like from here, e.g. a collective's lost connection."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and not any(code in str(error) for code in _OWN):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit(message: str, status: int = 1) -> None:
    """Ends this process at once, whatever its other threads wait for."""
    with contextlib.suppress(OSError, ValueError):  # nobody may read any more
        if message:
            sys.stderr.write(f"\n{message}\n")  # a progress bar stands in the line
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)


class _Relay:
    """Passes this process' connection on to process 0, and outlives that one's end.

    JAX's client aborts its process with a page of C++ text at the moment in which its connection closes. The one that
    it has leads here, and stays open when the far one is lost: so it is we who say what happened.
    """

    def __init__(self, host: str, port: int):
        self._target = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        if any(name.lower().endswith("_proxy") for name in os.environ):  # gRPC would look for this one over there
            exempt = "no_grpc_proxy" if "no_grpc_proxy" in os.environ else "no_proxy"
            os.environ[exempt] = ",".join(filter(None, (os.environ.get(exempt), "127.0.0.1")))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.lost = threading.Event()
        self.watched = False  # before, JAX is still trying to connect, and has to see when that fails
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()  # process 0 does not listen yet: JAX tries again
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._outward, args=(near, far), daemon=True).start()
            threading.Thread(target=self._inward, args=(far, near), daemon=True).start()

    def _outward(self, near: socket.socket, far: socket.socket) -> None:
        _copy(near, far)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _inward(self, far: socket.socket, near: socket.socket) -> None:
        _copy(far, near)
        if self.watched:
            self.lost.set()
        else:
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**18):
            sink.sendall(data)


class _Watch:
    """What a process says and hears beside its work.

    One thread talks to the store: it leaves a beat, looks for news (a failure, a wish to stop) and, in process 0,
    counts how long each process' beat has been the same. Another one counts how long the first has had no answer. Both
    count in their own turns, not on a clock: a pause of the whole process is not the others' silence.
    """

    def __init__(self, relay: _Relay | None):
        state = _jax_distributed.global_state
        self._client, self._process, self._count = state.client, state.process_id, state.num_processes
        self._lost = relay.lost if relay else threading.Event()
        if relay:
            relay.watched = True
        self._left = threading.Event()
        self._failed: int | None = None  # the exit status, once this process has failed by itself
        self._said = ""  # and by what, until it comes to its end, where that is printed
        self._ending = threading.Lock()
        self._awaited = set(range(1, self._count))  # by the first process, at its end
        self._unanswered = 0
        # The stop that is being agreed upon.
        self._lock = threading.Lock()
        self._calls, self._offer, self._round = 0, None, 0
        self._stop_at: int | None = None
        self._agreed = threading.Event()
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self._talker.start()
        threading.Thread(target=self._time, daemon=True).start()

    def leave(self) -> None:
        """Waits for the others' end, and goes with them."""
        synchronise("leave")
        self._left.set()
        self._talker.join(_SILENCE * _BEAT)  # Python's end in the middle of a call into C++ would abort
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends; does not return if it ends because of another one."""
        if self._failed is not None:
            return
        if _may_follow(error):
            with contextlib.suppress(KeyboardInterrupt):
                self._left.wait(_SILENCE * _BEAT + 10)  # meanwhile the threads find out, and end the process
        self._said = _in_full(error)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            self._failed = error.code
        else:
            self._failed = 130 if isinstance(error, KeyboardInterrupt) else 1
        self._publish(self._process, f"failed: {_first_line(error)}")
        atexit.register(self._end)  # before JAX's own, which waits for everyone

    def any_process(self, flag: bool) -> bool:
        """See the function of the same name."""
        if flag and self._offer is None:
            with self._lock:
                self._propose()
        with self._lock:
            if self._offer is None:
                self._calls += 1
                return False
        # Everyone's threads answer, whatever their programs wait for: so may this one wait.
        self._agreed.wait()
        self._calls += 1
        if self._calls < self._stop_at:
            return False
        with self._lock:
            self._offer, self._stop_at, self._round = None, None, self._round + 1
            self._agreed.clear()
        return True

    def _propose(self) -> None:
        """Says how many calls this process has made, and binds it to make no more before all have said so."""
        if self._offer is None:
            self._offer = self._calls
            key = f"{_ROOT}/stop/{self._round}/{self._process}"
            self._client.key_value_set(key, str(self._offer), allow_overwrite=True)
            self._client.key_value_set(f"{_NEWS}stop/{self._round}", "", allow_overwrite=True)

    def _hear_stop(self, news: Mapping[str, str]) -> None:
        with self._lock:
            if f"stop/{self._round}" not in news or self._agreed.is_set():
                return
            self._propose()
            key = f"stop_at/{self._round}"
            if key in news:
                self._stop_at = int(news[key])
                self._agreed.set()
            elif self._process == 0:
                offers = _numbered(self._client, f"{_ROOT}/stop/{self._round}/")
                if len(offers) == self._count:
                    last = max(map(int, offers.values()))
                    self._client.key_value_set(_NEWS + key, str(last + 1), allow_overwrite=True)

    def _talk(self) -> None:
        beat, last, silent = 0, {}, collections.Counter()
        while not self._left.wait(_BEAT):
            try:
                beat += 1
                self._client.key_value_set(f"{_BEATS}{self._process}", str(beat), allow_overwrite=True)
                news = {key.removeprefix(_NEWS): value for key, value in self._client.key_value_dir_get(_NEWS)}
                if "failure" in news:
                    process, what = json.loads(news["failure"])
                    self._left.wait(_GRACE)
                    if self._failed is None:
                        self._end(f"error: process {process} {what}; {_STOPPED}")
                self._hear_stop(news)
                if self._process == 0:
                    beats = _numbered(self._client, _BEATS)
                    for process in range(1, self._count):
                        same = beats.get(process) == last.get(process)
                        silent[process] = silent[process] + 1 if same else 0
                        if silent[process] >= _SILENCE:
                            self._awaited.discard(process)
                            self._publish(process, _SILENT)
                    last = beats
                self._unanswered = 0
            except jax.errors.JaxRuntimeError:
                pass  # counted as unanswered

    def _time(self) -> None:
        failed = 0
        while not self._left.is_set():
            (self._lost if self._failed is None else self._left).wait(_BEAT)
            if self._left.is_set():
                return
            self._unanswered += 1
            if self._failed is not None:
                failed += 1
                # What it does on its way out hangs, or at its own end, after its error was printed.
                if failed > _SILENCE:
                    _exit("" if self._ending.locked() else self._said, self._failed)
            elif self._lost.is_set():
                self._end(f"error: process 0 is gone: its connection was closed; {_STOPPED}", heard=False)
            elif self._unanswered > _SILENCE and self._process:
                self._end(f"error: process 0 {_SILENT}; {_STOPPED}", heard=False)

    def _publish(self, process: int, what: str) -> None:
        """The first failure is the one that is told."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one, or there is nobody any more to tell
            self._client.key_value_set(f"{_NEWS}failure", json.dumps([process, what]))

    def _end(self, message: str = "", *, heard: bool = True) -> None:
        """Ends the process; the first one, with whom the store ends, after all others have heard why.

        Args:
          message: for stderr, unless this process has one of its own.
          heard: whether process 0 answers, and is to know that this process waits for nothing more.
        """
        self._ending.acquire()  # once, and for good
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._process == 0:
                for _ in range(10):
                    if self._awaited <= _numbered(self._client, _GONE).keys():
                        break
                    self._left.wait(_BEAT)
            elif heard and not self._lost.is_set():
                self._client.key_value_set(f"{_GONE}{self._process}", "", allow_overwrite=True)
        _exit("" if self._failed is not None else message, self._failed or 1)
