"""Examples whose files are not as they should be: fatal, or passed over, counted and named."""

import threading
from collections.abc import Collection, Sequence

import numpy as np

from mcm_jax.data.problems import printable
from mcm_jax.errors import UserError

UNREADABLE = ("fail", "skip")
MOST = 0.05
"""The share of the examples that may be passed over: where more cannot be read, something else is wrong."""

_SHOWN = 8


class Skipping:
    """Another source's rows, where the next example that can be read takes the place of one that cannot.

    Which one that is depends on the files alone: every thread, every process and a resumed run see the same. It is
    printed once of each example that is passed over.

    Args:
      source: of `views` rows an example; raises UserError for those that cannot be read.
      views: V, of each example.
      names: of the examples, where they have any.

    Attributes:
      names: as given.
      skipped: what is wrong with the examples passed over so far, by their indices.

    Raises:
      UserError: with ``[i]``: more than :data:`MOST` of the examples cannot be read; names some.
    """

    def __init__(self, source: Sequence[dict], views: int = 1, names: Sequence[str] = ()):
        self.source, self.names, self.skipped = source, names, {}
        self._views, self._lock = views, threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        row = range(len(self))[row]
        while True:  # it ends: before all are passed over, it is too many
            try:
                return self.source[row]
            except UserError as e:
                self._pass_over(row // self._views, e)
            row = (row + self._views) % len(self)

    def _pass_over(self, index: int, why: UserError) -> None:
        examples = len(self) // self._views
        with self._lock:
            if index not in self.skipped:
                self.skipped[index] = str(why)
                print(f"passed over, another example takes its place: {printable(str(why))}")
        check_few(self.skipped, examples, self.names, f". The last one: {why}")


def check_few(skipped: Collection[int], examples: int, names: Sequence[str] = (), more: str = "") -> None:
    """Raises UserError where more than :data:`MOST` of the examples were passed over; names some, and says more."""
    if len(skipped) > MOST * examples:
        raise UserError(
            f"{said(skipped, examples, names)}. More than {MOST:.0%} are not passed over (config.data.unreadable){more}"
        )


def said(skipped: Collection[int], examples: int, names: Sequence[str] = ()) -> str:
    """How many of the examples, and which, could not be read, for people."""
    which = [names[i] if len(names) else f"number {i}" for i in sorted(skipped)]
    more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
    return (
        f"{len(which)} of {examples:,} examples cannot be read, others are in their places: "
        f"{', '.join(which[:_SHOWN])}{more}"
    )
