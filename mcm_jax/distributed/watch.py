"""What a process says and hears beside its work: that it lives, that one has failed, that all shall stop."""

import atexit
import collections
import contextlib
import json
import threading
from collections.abc import Mapping

import jax

from mcm_jax.distributed import service
from mcm_jax.distributed.ending import end_at_once, first_line, in_full, may_follow
from mcm_jax.distributed.relay import Relay

_BEAT = 1.0  # seconds between two beats of a process
_SILENCE = 20  # beats without which a process counts as dead; compilers and the GIL may hold one up for some seconds
_GRACE = 1.0  # seconds in which a process may come by an error of its own before it ends by another's
_SILENT = f"has not been heard of for {_SILENCE * _BEAT:.0f} s"
_STOPPED = "all processes have stopped. Its own output, where there is one, says more"
_NEWS, _BEATS, _GONE = f"{service.ROOT}/news/", f"{service.ROOT}/beat/", f"{service.ROOT}/gone/"


class Watch:
    """What a process says and hears beside its work.

    One thread talks to the store: it leaves a beat, looks for news (a failure, a wish to stop) and, in process 0,
    counts how long each process' beat has been the same. Another one counts how long the first has had no answer. Both
    count in their own turns, not on a clock: a pause of the whole process is not the others' silence.
    """

    def __init__(self, relay: Relay | None):
        self._client, self._process, self._count = service.client(), service.process(), service.count()
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
        service.synchronise("leave")
        self._left.set()
        self._talker.join(_SILENCE * _BEAT)  # Python's end in the middle of a call into C++ would abort
        jax.distributed.shutdown()

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process ends; does not return if it ends because of another one."""
        if self._failed is not None:
            return
        if may_follow(error):
            with contextlib.suppress(KeyboardInterrupt):
                self._left.wait(_SILENCE * _BEAT + 10)  # meanwhile the threads find out, and end the process
        self._said = in_full(error)
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            self._failed = error.code
        else:
            self._failed = 130 if isinstance(error, KeyboardInterrupt) else 1
        self._publish(self._process, f"failed: {first_line(error)}")
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
            key = f"{service.ROOT}/stop/{self._round}/{self._process}"
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
                offers = service.numbered(self._client, f"{service.ROOT}/stop/{self._round}/")
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
                    beats = service.numbered(self._client, _BEATS)
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
                    end_at_once("" if self._ending.locked() else self._said, self._failed)
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
                    if self._awaited <= service.numbered(self._client, _GONE).keys():
                        break
                    self._left.wait(_BEAT)
            elif heard and not self._lost.is_set():
                self._client.key_value_set(f"{_GONE}{self._process}", "", allow_overwrite=True)
        end_at_once("" if self._failed is not None else message, self._failed or 1)
