"""Trials that train as one program. None do so far: each is a group of its own, and trained by itself."""

import pathlib
from collections.abc import Sequence

from mcm_jax.training.settings import RunSettings

TOGETHER_KEYS: frozenset[str] = frozenset()


def train_together(trials: Sequence[tuple[RunSettings, pathlib.Path]]) -> None:
    """Trains several trials in one program. As no key may differ, there never are several."""
    raise NotImplementedError
