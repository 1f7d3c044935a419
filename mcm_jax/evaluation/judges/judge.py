"""What a judge is, and what it gives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mcm_jax.errors import UserError

Number = float | str
"""A number, or in its place a text that says why it is undefined."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge says of some pictures.

    Attributes:
      numbers: by name; a section of numbers, too.
      scores: of each picture, ``[N]``, more is better; NaN where undefined. None where a judge has none.
      within: half of the 95% interval of a number by the pictures at hand, by its name, where it is known.
    """

    numbers: Mapping[str, Number | Mapping[str, Number]]
    scores: np.ndarray | None = None
    within: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges how well pictures follow what they were drawn for.

    Attributes:
      name: of what it judges, e.g. a modality.
      how: by what, for the report.
      judge: gives a :class:`Judgement` of pictures ``[N, H, W, 3]`` in [-1, 1] and, int ``[N]``, the held-out example
        that each was drawn for.
      headline: names of the numbers that stand for all, the most important first, e.g. ``edge_f1.f1``.
      watched: what training's log calls them.
      of: bool, of each held-out example: whether it has what is judged by. Others have no score and count in no
        number. None where all have it.
      conditional: whether it matters to it what pictures were drawn for; else the row ``shuffled`` has no number of it.
    """

    name: str
    how: str
    judge: Callable[[np.ndarray, np.ndarray], Judgement]
    headline: tuple[str, ...]
    watched: tuple[str, ...]
    conditional: bool = True
    of: np.ndarray | None = None

    def __call__(self, images: np.ndarray, which: np.ndarray) -> Judgement:
        """See :attr:`judge`."""
        own = self.judges_which(which)
        if own is None:
            return self.judge(images, which)
        found = self.judge(images[own], which[own])
        if found.scores is None:
            return found
        scores = np.full(len(which), np.nan)
        scores[own] = found.scores
        return dataclasses.replace(found, scores=scores)

    def judges_which(self, which: np.ndarray) -> np.ndarray | None:
        """Of pictures for the examples `which`, bool: those that are judged; None for all."""
        return None if self.of is None else self.of[which]

    def watch(self, images: np.ndarray, which: np.ndarray) -> dict[str, float]:
        """The headline's numbers, as training logs them, but for those that are undefined."""
        found = flatten(self(images, which).numbers)
        named = zip(self.watched, self.headline, strict=True)
        return {name: found[path] for name, path in named if not isinstance(found[path], str)}


def flatten(numbers: Mapping[str, Any]) -> dict[str, Number]:
    """``{"edge_f1.f1": 0.9, ...}`` of numbers in sections."""
    flat = {}
    for name, value in numbers.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def settings_of(modality: str, spec: str, defaults: Mapping[str, Any], means: str) -> dict[str, Any]:
    """The settings in ``METRIC:key=value,...``, each of its default's type.

    Args:
      modality: what is judged.
      spec: the text.
      defaults: every setting there is.
      means: what they mean, for the message.

    Raises:
      UserError: another setting, or a value that is none.
    """
    settings = dict(defaults)
    for part in filter(None, spec.partition(":")[2].split(",")):
        key, _, value = part.partition("=")
        try:
            settings[key] = type(defaults[key])(value)
        except (KeyError, ValueError) as e:
            raise UserError(f"--judge={modality}={spec}: found {part!r}, expected {means}") from e
    return settings
