"""What a sweep tries: lists of overrides, made by small pure functions, and checked before anything runs.

A sweep is a list of dicts, one a trial: values by a config's dotted keys. Lists add up with ``+``, and
``[{"train.evaluate_every": 500}]`` in a product sets a key for all.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mcm_jax import config as config_lib
from mcm_jax.errors import UserError
from mcm_jax.training import RunSettings, read_run

Hyper = list[dict[str, Any]]
Distribution = Callable[[np.random.Generator], Any]

SEEDS = ("seed", "draws.seed", "data.seed")  # trials that differ in these alone are averaged
_LONGEST = 100  # characters of a folder's name


@dataclasses.dataclass(frozen=True)
class Choice:
    """Keys that are set together, under one name: see :func:`choices`."""

    name: str
    overrides: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name


def values(key: str, of: Iterable[Any]) -> Hyper:
    """A trial for each value of a key, e.g. ``values("train.learning_rate", [1e-3, 2e-3])``."""
    return [{key: value} for value in of]


def choices(axis: str, of: Mapping[str, Mapping[str, Any]]) -> Hyper:
    """A trial for each of several sets of overrides.

    Args:
      axis: what the sets differ in, for tables and the names of folders, e.g. ``"size"``; no key of the config.
      of: overrides by the set's name, e.g. ``{"tiny": {"mcm.channels": 8}, "large": {"mcm.channels": 32}}``.
    """
    return [{axis: Choice(name, dict(overrides))} for name, overrides in of.items()]


def product(*sweeps: Hyper) -> Hyper:
    """Each trial of one with each of the others; the last one changes fastest.

    Raises:
      UserError: two of them set the same key.
    """
    return [_merge(trials) for trials in itertools.product(*sweeps)]


def zipped(*sweeps: Hyper) -> Hyper:
    """The first trials of all as one, then the second ones, and so on.

    Raises:
      UserError: they are not of one length, or two of them set the same key.
    """
    if len({len(sweep) for sweep in sweeps}) > 1:
        raise UserError(f"zipped: the sweeps must be of one length, got {', '.join(str(len(s)) for s in sweeps)}")
    return [_merge(trials) for trials in zip(*sweeps, strict=True)]


def search(count: int, of: Mapping[str, Distribution], *, seed: int = 0) -> Hyper:
    """Random trials; the first n are the same for any larger count.

    Args:
      count: how many.
      of: what each key is drawn from: :func:`uniform`, :func:`log_uniform`, :func:`choice`, or any function of a NumPy
        generator.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    return [{key: draw(rng) for key, draw in of.items()} for _ in range(count)]


def uniform(low: float, high: float) -> Distribution:
    """Between two numbers, to four digits."""
    return lambda rng: _rounded(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Distribution:
    """Between two numbers above 0, any factor as likely as another, to four digits. Raises UserError for others."""
    if not 0 < low <= high:
        raise UserError(f"log_uniform: the bounds must be above 0 and in order, got {low} and {high}")
    return lambda rng: _rounded(math.exp(rng.uniform(math.log(low), math.log(high))))


def choice(*of: Any) -> Distribution:
    """One of some values, each as likely."""
    return lambda rng: of[int(rng.integers(len(of)))]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _merge(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for trial in trials:
        if twice := merged.keys() & trial.keys():
            raise UserError(f"a sweep sets {', '.join(sorted(twice))} twice in one trial: {dict(merged)} and {trial}")
        merged |= trial
    return merged


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      number: from 0.
      name: of its folder.
      labels: what it is in each axis along which the trials differ, by the axis: numbers, texts, truth values.
      overrides: values by dotted keys, as settings have them.
      settings: of the run.
    """

    number: int
    name: str
    labels: Mapping[str, float | str | bool]
    overrides: Mapping[str, Any]
    settings: RunSettings

    def __str__(self) -> str:
        return f"trial {self.number} ({describe(self.labels or self.overrides)})"


def describe(overrides: Mapping[str, Any]) -> str:
    """Overrides as they are typed: ``train.learning_rate=0.001, mcm.channels=8``."""
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "nothing overridden"


def load(path: str | pathlib.Path) -> tuple[Hyper, str | None]:
    """What a sweep file says: its trials, and by which number they are ranked, ``METRIC``; None where it is silent.

    Raises:
      UserError: it is missing, fails, or has no ``get_hyper`` that returns a list of dicts.
    """
    path = pathlib.Path(path)
    if path.suffix != ".py" or not path.is_file():
        found = "found another kind" if path.is_file() else "found no such file"
        raise UserError(
            f"--sweep={path}: {found}, expected a Python file with get_hyper(), e.g. configs/sweeps/draws.py"
        )
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_hyper"):
            raise UserError("it has no get_hyper(), which returns the trials: see docs/sweeps.md")
        hyper = module.get_hyper()
    except UserError as e:
        raise UserError(f"--sweep={path}: {e}") from e
    except Exception as e:  # whatever a user's file may do
        raise UserError(f"--sweep={path}: {type(e).__name__}: {e}; expected get_hyper(), see docs/sweeps.md") from e
    trials = hyper if isinstance(hyper, list) else []
    if not trials or not all(isinstance(t, dict) and all(isinstance(key, str) for key in t) for t in trials):
        found = repr(hyper)[:100]
        raise UserError(f"--sweep={path}: get_hyper() must return a list of dicts by keys, one a trial, got {found}")
    metric = getattr(module, "METRIC", None)
    if not isinstance(metric, str | None):
        raise UserError(f"--sweep={path}: METRIC must be the name of a number in metrics.jsonl, got {metric!r}")
    return hyper, metric


def read(config: Any, base: RunSettings, hyper: Hyper, begun: Sequence[RunSettings] = ()) -> list[Trial]:
    """The trials of a sweep, all checked.

    Args:
      config: what each of them overrides, as configs/default.py has it.
      base: its settings.
      hyper: as ``get_hyper`` returns it.
      begun: settings of the trials as they began, as far as they did: where ``data.discover`` is set, what it found
        then is not looked for again.

    Raises:
      UserError: a key or value that no config has, two trials that are the same, or that are called the same: names
        them.
    """
    hyper = [{axis: _plain(value) for axis, value in trial.items()} for trial in hyper]
    flat = [_flat(i, trial) for i, trial in enumerate(hyper)]
    modalities, found = {_looked_at(config_lib.given(config)): base.modalities.shown}, []
    for number, overrides in enumerate(flat):
        try:
            if "data.discover" in overrides:  # a trial's own config has what was found, and no longer that it was
                raise UserError(
                    "data.discover holds for all trials. Leave it out of the sweep file, and say --config.data.discover"
                )
            own = config_lib.override(RunSettings, config, overrides)
            known = begun[number].modalities.shown if number < len(begun) else modalities.get(_looked_at(own))
            found.append(read_run(own, known=known))
        except UserError as e:
            raise UserError(f"trial {number} of the sweep ({describe(overrides)}): {e}") from e
        modalities.setdefault(_looked_at(own), found[-1].modalities.shown)
    settings_of = [config_lib.flatten(settings) for settings in found]
    first: dict[str, int] = {}
    for number, settings in enumerate(settings_of):
        same = first.setdefault(json.dumps(settings, sort_keys=True), number)
        if same != number:
            raise UserError(
                f"trials {same} and {number} of the sweep are the same: {describe(flat[same])} and "
                f"{describe(flat[number])}. Leave one out, or let them differ, e.g. in seed"
            )
    axes = list(dict.fromkeys(axis for trial in hyper for axis in trial))
    # A trial that leaves a key alone has the config's value, or that of a choice.
    labels = [
        {a: _label(trial.get(a, settings.get(a, "as configured"))) for a in axes}
        for trial, settings in zip(hyper, settings_of, strict=True)
    ]
    varying = [a for a in axes if len({str(trial[a]) for trial in labels}) > 1]
    short = _short(varying)
    trials = []
    for number, (settings, overrides, all_labels) in enumerate(zip(found, flat, labels, strict=True)):
        own = {short[a]: all_labels[a] for a in varying}
        as_read = {key: settings_of[number].get(key, value) for key, value in overrides.items()}
        trials.append(Trial(number, _name(number, own), own, as_read, settings))
    _check_labels(trials)
    return trials


def without_seeds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Labels, or settings by dotted keys, that all seeds share."""
    return {key: value for key, value in values.items() if key not in SEEDS}


def _check_labels(trials: Sequence[Trial]) -> None:
    """Refuses other settings by the same labels, which would be averaged as if they were seeds."""
    firsts: dict[tuple, Trial] = {}
    for trial in trials:
        first = firsts.setdefault(tuple(without_seeds(trial.labels).items()), trial)
        one, other = (without_seeds(config_lib.flatten(t.settings)) for t in (first, trial))
        if keys := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            raise UserError(
                f"trials {first.number} and {trial.number} of the sweep ({first.name}, {trial.name}) have the same "
                f"labels, but differ in {', '.join(keys)}. Give choices that differ names that do"
            )


def _looked_at(config: Mapping[str, Any]) -> str:
    """All that ``data.discover`` goes by: configs that agree in it have the same modalities."""
    data, said = config["data"], config.get("modalities", {})
    own = {name: section for name, section in said.items() if isinstance(section, Mapping)}
    return repr((data.get("path"), data.get("held_out_share"), sorted(own.items())))


def _plain(value: Any) -> Any:
    """A value as configs have it, where NumPy made it."""
    if isinstance(value, Choice):
        return Choice(value.name, {key: _plain(v) for key, v in value.overrides.items()})
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _flat(number: int, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's overrides, choices taken apart."""
    flat: dict[str, Any] = {}
    for axis, value in trial.items():
        more = value.overrides if isinstance(value, Choice) else {axis: value}
        if twice := flat.keys() & more.keys():
            raise UserError(f"trial {number} of the sweep sets {', '.join(sorted(twice))} twice ({describe(trial)})")
        flat |= more
    return flat


def _label(value: Any) -> float | str | bool:
    if isinstance(value, Choice):
        return value.name
    if isinstance(value, list | tuple):
        return "-".join(str(_label(v)) for v in value)
    return value


def _short(axes: Sequence[str]) -> dict[str, str]:
    """The last parts of keys where they tell them apart, else the keys."""
    ends = [axis.rpartition(".")[2] for axis in axes]
    unique = {axis: ends.count(end) == 1 and axis not in SEEDS for axis, end in zip(axes, ends, strict=True)}
    return {axis: end if unique[axis] else axis for axis, end in zip(axes, ends, strict=True)}


def _name(number: int, labels: Mapping[str, Any]) -> str:
    """A folder's name: its number makes it unique, the rest is for people."""
    parts = [f"{axis}={value:g}" if isinstance(value, float) else f"{axis}={value}" for axis, value in labels.items()]
    text = "_".join([f"{number:03d}", *parts])
    return re.sub(r"[^\w.=+-]+", "-", text, flags=re.ASCII)[:_LONGEST].rstrip("-_.=")
