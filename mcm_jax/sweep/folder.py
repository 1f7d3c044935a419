"""A sweep's folder: whose it is, as its ``sweep.json`` says, and where in it trials and caches are."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mcm_jax import config as config_lib
from mcm_jax.base import BaseCard
from mcm_jax.errors import UserError
from mcm_jax.files import lock, write_atomically
from mcm_jax.sweep.outcomes import ENDED, status
from mcm_jax.sweep.trials import Trial
from mcm_jax.training import RunSettings, read_run
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.caching import shared_by
from mcm_jax.training.workdir import SWEEP, differences

_SHOWN = 12  # lines of what differs


@dataclasses.dataclass(frozen=True)
class Begun:
    """A sweep of which a trial has begun.

    Attributes:
      base: settings that the trials override.
      trials: settings of each.
      names: of their folders.
      caches: paths of theirs; '' of a trial that has none.
    """

    base: RunSettings
    trials: Sequence[RunSettings]
    names: Sequence[str]
    caches: Sequence[str]


def find(workdir: pathlib.Path) -> Begun | None:
    """The sweep in a folder; None in one without, and where no trial has begun: that sweep may be replaced.

    Raises:
      UserError: the folder holds a run, or what no sweep wrote.
    """
    path = workdir / SWEEP
    if (workdir / config_lib.FILE).exists():
        raise UserError(f"--workdir={workdir} holds a run, expected a sweep or nothing. Take another --workdir")
    if not path.is_file():
        return None
    try:
        there = json.loads(path.read_text())
        config, entries = there["config"], there["trials"]  # an older one may lack keys
        names = [entry["name"] for entry in entries]
        trials = [_settings(config, entry) for entry in entries]
        begun = Begun(read_run(config), trials, names, [entry.get("cache", "") for entry in entries])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not what train.py --sweep wrote ({e!r}). Take another --workdir") from e
    return begun if any((workdir / name / config_lib.FILE).is_file() for name in names) else None


def _settings(config: Mapping[str, Any], entry: Mapping[str, Any]) -> RunSettings:
    """Of a trial, which may have found other modalities than the config has: older sweeps did not look."""
    modalities = entry.get("modalities", config["modalities"])
    return read_run(config_lib.override(RunSettings, {**config, "modalities": modalities}, entry["overrides"]))


def as_begun(begun: Begun, base: RunSettings, trials: Sequence[Trial]) -> tuple[RunSettings, list[Trial]]:
    """The config and the trials to go on with: see :func:`mcm_jax.training.workdir.as_begun`."""
    there = dict(enumerate(begun.trials))
    found = [dataclasses.replace(t, settings=workdirs.as_begun(t.settings, there.get(t.number))) for t in trials]
    return workdirs.as_begun(base, begun.base), found


def check_same(begun: Begun, trials: Sequence[Trial], workdir: pathlib.Path) -> None:
    """Raises UserError where the sweep in a folder is another one.

    What may change in a run may change here, but for what the trials differ in: that tells them apart.
    """
    now = [trial.settings for trial in trials]
    swept = (_swept(begun.trials) | _swept(now)) - {"cache.path"}  # where caches are tells no trials apart
    each = [differences(a, b, swept)[1] for a, b in zip(begun.trials, now, strict=False)]
    lines = [line for line in each[0] if all(line in own for own in each)]
    if len(begun.trials) != len(now):
        lines.append(f"  trials: there {len(begun.trials)}, now {len(now)}")
    lines += [f"  trial {i}: {line.strip()}" for i, own in enumerate(each) for line in own if line not in lines]
    if lines:
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        differs = "\n".join([*lines[:_SHOWN], *more])
        raise UserError(
            f"{workdir / SWEEP} is of another sweep. It differs in\n{differs}\n"
            f"Take another --workdir, or the same values to go on with that sweep"
        )


def _swept(trials: Sequence[RunSettings]) -> set[str]:
    """The keys in which trials differ."""
    flat = [config_lib.flatten(settings) for settings in trials]
    return {key for key in set().union(*flat) if any(values.get(key) != flat[0].get(key) for values in flat)}


def placed(
    trials: Sequence[Trial], workdir: pathlib.Path, begun: Begun | None, card: Callable[[Trial], BaseCard]
) -> list[Trial]:
    """The trials, each with the name of its folder and, unless the user gave one or it needs none, its cache's path.

    Both stay as they are in a sweep that has begun, though labels may be called otherwise now, and base or data may
    have moved.

    Args:
      trials: of the sweep.
      workdir: its folder.
      begun: the same sweep, as it is there.
      card: of a trial's base.

    Raises:
      UserError: the user's path is for caches that are not the same.
    """
    found = []
    for trial in trials:
        cache, before = trial.settings.cache, begun.caches[trial.number] if begun else ""
        if cache.mode != "off" and not cache.path:
            name = pathlib.Path(before).name or shared_by(trial.settings, card(trial))
            cache = dataclasses.replace(cache, path=str(workdir / "cache" / name))
        settings = dataclasses.replace(trial.settings, cache=cache)
        name = begun.names[trial.number] if begun else trial.name
        found.append(dataclasses.replace(trial, name=name, settings=settings))
    firsts: dict[str, Trial] = {}
    for given, trial in zip(trials, found, strict=True):
        cache = given.settings.cache
        if cache.mode == "off" or not cache.path or status(trial.settings, workdir / trial.name) in ENDED:
            continue
        first = firsts.setdefault(cache.path, trial)
        if first is not trial and len({shared_by(t.settings, card(t)) for t in (first, trial)}) > 1:
            raise UserError(
                f"config.cache.path={cache.path!r} can hold one cache, but {first} and {trial} need one each. Leave it "
                f"'', and each is made in --workdir"
            )
    return found


def claim(base: RunSettings, trials: Sequence[Trial], workdir: pathlib.Path) -> None:
    """Writes whose folder this is.

    Raises:
      UserError: another process has just made it another sweep's.
      Busy: another process writes, or builds a cache, for a sweep of which no trial has begun.
      OSError: it cannot be written.
    """
    entries = [
        {
            "name": t.name,
            "overrides": dict(t.overrides),
            "modalities": config_lib.to_dict(t.settings.modalities),
            "cache": t.settings.cache.path,
        }
        for t in trials
    ]
    content = (json.dumps({"config": config_lib.to_dict(base), "trials": entries}, indent=1) + "\n").encode()
    path = workdir / SWEEP
    with lock(workdir, "beginning a sweep", "--workdir"):
        if path.is_file() and path.read_bytes() == content:
            return
        if begun := find(workdir):
            check_same(begun, trials, workdir)
        else:
            for held in (workdir / "cache").rglob(".lock"):
                with lock(held.parent, "building a cache of another sweep", "--workdir"):
                    pass  # left by a process that is gone
        write_atomically(path, content)
