"""What became of a sweep's trials, read from their folders, and which is the best."""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from mcm_jax import config
from mcm_jax.errors import UserError
from mcm_jax.sweep.trials import Trial, without_seeds
from mcm_jax.training import RunSettings
from mcm_jax.training.actions import DIVERGED as DIVERGED_FILE
from mcm_jax.training.actions import HeldOutLoss, less_is_better
from mcm_jax.training.workdir import saved_steps

STATUSES = DONE, DIVERGED, UNFINISHED, WAITING = "done", "diverged", "unfinished", "not begun"
ENDED = (DONE, DIVERGED)

OF_THE_MACHINE = ("images_per_second", "input_wait")
_OF_EACH_STEP = ("loss", "mse", "mse_of_base", "modulation", "gradient_norm", "learning_rate", *OF_THE_MACHINE)
_RANKED_BY = ("mean_iou", "edge_f1", "held_out_loss", "loss")  # the first that all trials have


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial so far.

    Attributes:
      trial: which.
      status: one of :data:`STATUSES`.
      step: of its last report.
      reports: the lines of its ``metrics.jsonl``.
    """

    trial: Trial
    status: str
    step: int
    reports: Sequence[Mapping[str, float]]

    @functools.cached_property
    def numbers(self) -> dict[str, float]:
        """The last of each; of a trial that is done those of its end alone, as older ones are not the MCM's."""
        last: dict[str, float] = {}
        for report in self.reports:
            last |= report if self.status != DONE or report["step"] == self.step else {}
        return {name: value for name, value in last.items() if name != "step"}

    def score(self, metric: str) -> float | None:
        """By which it is ranked; None where it has not come to its end, or to no finite number."""
        value = self.numbers.get(metric, math.nan)
        return value if self.status == DONE and math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Trials that differ in seeds alone.

    Attributes:
      labels: what they share, by axis.
      outcomes: theirs.
      scores: of those that are done.
    """

    labels: Mapping[str, float | str | bool]
    outcomes: Sequence[Outcome]
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Of the scores; there must be one."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores (over n - 1); None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def status(settings: RunSettings, workdir: pathlib.Path) -> str:
    """What became of a run, by its folder."""
    if max(saved_steps(workdir), default=0) >= settings.train.steps:
        return DONE
    if (workdir / DIVERGED_FILE).is_file():
        return DIVERGED
    return UNFINISHED if (workdir / config.FILE).is_file() else WAITING


def collect(trials: Sequence[Trial], workdir: pathlib.Path) -> list[Outcome]:
    """What became of each trial of the sweep in a folder."""
    return [_outcome(trial, workdir / trial.name) for trial in trials]


def _outcome(trial: Trial, workdir: pathlib.Path) -> Outcome:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    reports = [json.loads(line) for line in lines if line.endswith("}")]  # another process may write the last one
    step = reports[-1]["step"] if reports else 0
    return Outcome(trial, status(trial.settings, workdir), step, reports)


def check_measured(trials: Sequence[Trial], wanted: str | None) -> None:
    """Raises UserError where a trial will not have the number that the sweep file ranks by."""
    if wanted is None or wanted in _OF_EACH_STEP:
        return
    for trial in trials:
        t, cache = trial.settings.train, trial.settings.cache
        if not t.evaluate_every:
            raise UserError(
                f"METRIC={wanted!r} of the sweep file is measured on held-out examples, but {trial} has "
                f"config.train.evaluate_every=0. Set it to every how many steps that shall be, or take one of "
                f"{', '.join(_OF_EACH_STEP)}"
            )
        if wanted not in HeldOutLoss.names and cache.mode != "off" and not cache.load_base:
            raise UserError(
                f"METRIC={wanted!r} of the sweep file is measured on samples, but {trial} has no base to sample with: "
                f"config.cache.load_base=False. Set it to True, or take one of "
                f"{', '.join((*HeldOutLoss.names, *_OF_EACH_STEP))}"
            )


def metric_of(outcomes: Sequence[Outcome], wanted: str | None) -> str:
    """By which number the trials are ranked.

    Args:
      outcomes: of all trials.
      wanted: what the sweep file says; None for the first that all have of mean_iou, edge_f1, held_out_loss, loss.
    """
    done = [o for o in outcomes if o.status == DONE]
    known = (name for name in _RANKED_BY if done and all(name in o.numbers for o in done))
    return wanted or next(known, _RANKED_BY[-1])


def settings_of(outcomes: Sequence[Outcome], metric: str) -> list[Setting]:
    """Trials gathered over seeds, the best first, and last those of which none is done."""
    groups: dict[tuple, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(tuple(without_seeds(outcome.trial.labels).items()), []).append(outcome)
    rows = [
        Setting(dict(labels), group, [s for o in group if (s := o.score(metric)) is not None])
        for labels, group in groups.items()
    ]
    sign = 1 if less_is_better(metric) else -1
    return sorted(rows, key=lambda row: (not row.scores, sign * row.mean if row.scores else 0))


def best_of(rows: Sequence[Setting], metric: str) -> Outcome | None:
    """The best trial of the best setting; None as long as none is done."""
    done = [o for o in rows[0].outcomes if o.score(metric) is not None]
    choose = min if less_is_better(metric) else max
    return choose(done, key=lambda o: o.score(metric), default=None)
