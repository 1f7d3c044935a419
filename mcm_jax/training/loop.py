"""The training loop: records in, steps done; after each step, whoever has something to do every n steps."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
from tqdm import tqdm

from mcm_jax import distributed
from mcm_jax.errors import Interrupted
from mcm_jax.training.state import TrainState
from mcm_jax.training.step import Record


class Clock:
    """Seconds spent on training alone: neither on checkpoints nor on pictures."""

    def __init__(self):
        self._began, self._paused = time.perf_counter(), 0.0
        self.waited = 0.0  # seconds for input

    def wait(self, seconds: float) -> None:
        """Is told of time in which a step had no input yet."""
        self.waited += seconds

    @property
    def seconds(self) -> float:
        """Since the beginning, without pauses."""
        return time.perf_counter() - self._began - self._paused

    @contextmanager
    def pause(self, pending: Any) -> Iterator[None]:
        """What is done in the block does not count; what the device has not done of ``pending`` yet does."""
        jax.block_until_ready(pending)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Moment:
    """The end of a step, as actions see it.

    Attributes:
      step: optimizer steps done.
      last: how many the run has.
      state: after the step. It is donated to the next one: whoever keeps any of it copies it.
      metrics: of the step, float32 scalars on the devices.
      stopping: whether the run ends after this step though it is not done.
      clock: of the run.
      show: takes what the progress bar shall show.
      measured: what actions have found out at this step, by name, for those after them.
    """

    step: int
    last: int
    state: TrainState
    metrics: dict[str, jax.Array]
    stopping: bool
    clock: Clock
    show: Callable[..., object]
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


class Action(Protocol):
    """Something that is done every n steps."""

    def __call__(self, now: Moment) -> None:
        """Is told of each step that was done, and decides by itself whether it is time."""
        ...


_late: list[int] = []  # signals that came when the last step was done


def stopped_late() -> bool:
    """Whether a signal came that a run did not end by: in its last step, or as it diverged. For what goes on after it.

    Each is told once.
    """
    told = bool(_late)
    _late.clear()
    return told


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs, so that a step is never torn; a second SIGINT interrupts.

    Those that the block ends without an answer to are for :func:`stopped_late`.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's
        previous = {}
    answered = False
    try:
        yield received
    except (Interrupted, KeyboardInterrupt):
        answered = True
        raise
    finally:
        if not answered:
            _late.extend(received)
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    state: TrainState,
    train_step: Callable[[TrainState, Record], tuple[TrainState, dict[str, jax.Array]]],
    records: Iterable[Record],
    steps: range,
    actions: Sequence[Action],
    clock: Clock | None = None,
) -> TrainState:
    """Does the steps.

    Args:
      state: before the first of them; donated.
      train_step: see :func:`mcm_jax.training.step.make_train_step`.
      records: one a step.
      steps: which; ``steps.stop`` is how many the run has.
      actions: what is done after each step, in this order.
      clock: of the run, if `records` tell it what they waited for.

    Returns:
      The state after the last one.

    Raises:
      Interrupted: SIGINT or SIGTERM came; the actions were told, so that the state is saved.
    """
    clock = clock or Clock()
    with (
        stop_requests() as stop,
        tqdm(
            total=steps.stop,
            initial=steps.start,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not distributed.is_first(),
        ) as bar,
        contextlib.closing(records) if hasattr(records, "close") else contextlib.nullcontext(),
    ):
        for done, record in zip(range(steps.start + 1, steps.stop + 1), records, strict=True):
            state, metrics = train_step(state, record)
            bar.update()
            # Asked once a step: a later signal stops a later one. Of several processes, all stop at the same.
            stopping = distributed.any_process(bool(stop)) and done < steps.stop
            now = Moment(done, steps.stop, state, metrics, stopping, clock, bar.set_postfix)
            for action in actions:
                action(now)
            if stopping:
                raise Interrupted(f"stopped by a signal at step {done} of {steps.stop}")
    return state
