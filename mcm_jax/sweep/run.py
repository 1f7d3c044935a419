"""The runs of a sweep: whose folder it is, whose turn, and what follows when one of them ends early."""

import dataclasses
import gc
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mcm_jax import config as config_lib
from mcm_jax import distributed, sharding
from mcm_jax.errors import Busy, UserError
from mcm_jax.files import check_writable, lock, write_atomically
from mcm_jax.sweep import results
from mcm_jax.sweep import trials as trials_lib
from mcm_jax.sweep.outcomes import DONE, ENDED, Outcome, check_measured, collect, metric_of, status
from mcm_jax.sweep.trials import Trial
from mcm_jax.training import RunSettings, read_run, train_and_evaluate
from mcm_jax.training.actions import Diverged
from mcm_jax.training.caching import known_card, shared_by
from mcm_jax.training.parts import fitting_modulator
from mcm_jax.training.together import check_together, shared_by_all, train_together
from mcm_jax.training.workdir import differences, is_disk_error

FILE = "sweep.json"
MODES = ("auto", "serial", "together")

_LOOKS = 2.0  # seconds between two looks at what another process holds
_SHOWN = 12  # lines of what differs


def run_sweep(
    config: Any,
    sweep: str | pathlib.Path,
    workdir: str | pathlib.Path,
    *,
    mode: str = "auto",
    width: int | None = None,
    index: int | None = None,
    command: Sequence[str] = ("python", "train.py"),
) -> list[Outcome]:
    """Trains the trials of a sweep; goes on where it was stopped.

    Trials that are done are skipped, those that were cut off go on, those that diverged stay as they are. Several
    processes may call this with one workdir at the same time: what another one trains is passed over.

    Args:
      config: as configs/default.py has it; the trials override it.
      sweep: a sweep file.
      workdir: gets ``sweep.json``, a workdir for each trial, ``cache/`` with each cache that they need, and what
        :func:`.results.write` writes.
      mode: ``serial``, one trial after the other; ``together``, all in one program; ``auto``, together what can be.
      width: of trials that train together, how many each device has in one call of the program; see
        :func:`mcm_jax.training.together.train_together`.
      index: of the one trial to train; None for all.
      command: words of the command that trains the config alone, without its workdir, for the results.

    Returns:
      What became of each trial.

    Raises:
      UserError: bad input, another sweep in the workdir, or a trial that cannot be trained: see its message.
      Interrupted: SIGINT or SIGTERM came; the state of what was training was saved.
    """
    workdir = pathlib.Path(workdir)
    base = read_run(config, _begun(workdir))  # whose modalities are known, though the data may be gone
    if width is not None and width < 1:
        raise UserError(f"--sweep_width={width}: expected at least 1 trial on each device")
    hyper, metric = trials_lib.load(sweep)
    trials = trials_lib.read(base, hyper)
    if index is not None and not 0 <= index < len(trials):
        raise UserError(f"--sweep_index={index}: the sweep has {len(trials)} trials, 0 to {len(trials) - 1}")
    check_measured(trials, metric)
    _check_one_cache_a_path(trials)
    trials = _with_caches(trials, workdir, _check_workdir(base, trials, workdir))
    groups = [[trials[index]]] if index is not None else groups_of(trials, mode)
    _check_fit([trial for group in groups for trial in group], workdir)
    distributed.synchronise("sweep")  # all have read what the first one writes
    if distributed.is_first():
        check_writable(workdir, "--workdir")
        _patiently(lambda: _claim(base, trials, workdir))
    if not any(trial.settings.train.evaluate_every for trial in trials):
        print("train.evaluate_every is 0: nothing is measured on held-out examples, training's last loss ranks")

    def show() -> None:
        if distributed.is_first():
            _patiently(lambda: _write(trials, workdir, metric, command))

    for group in groups:
        _train(group, trials, workdir, show, width, alone=index is not None)
        show()
    found = collect(trials, workdir)
    print(results.summary(found, workdir, metric_of(found, metric), command))
    return found


def groups_of(trials: Sequence[Trial], mode: str) -> list[list[Trial]]:
    """What trains at a time.

    Args:
      trials: of the sweep.
      mode: one of :data:`MODES`.

    Raises:
      UserError: all shall train together and cannot.
    """
    if mode == "serial":
        return [[trial] for trial in trials]
    if mode == "together":
        try:
            check_together([trial.settings for trial in trials])
        except UserError as e:
            raise UserError(f"--sweep_mode=together: {e}. Take --sweep_mode=auto, which trains the others apart") from e
        return [list(trials)]
    shared: dict[str, list[Trial]] = {}
    for trial in trials:
        shared.setdefault(shared_by_all(trial.settings), []).append(trial)
    groups = []
    for group in shared.values():
        try:
            check_together([trial.settings for trial in group])
            groups.append(group)
        except UserError:  # several processes, or Weights & Biases
            groups += [[trial] for trial in group]
    return groups


def _train(
    group: Sequence[Trial],
    trials: Sequence[Trial],
    workdir: pathlib.Path,
    show: Callable[[], None],
    width: int | None,
    *,
    alone: bool,
) -> None:
    """Trains what is left of a group. One that diverged has its end, too."""
    left = {workdir / trial.name: trial for trial in group if status(trial.settings, workdir / trial.name) not in ENDED}
    if not left:
        return
    print(*("", *(f"{trial} of {len(trials)}: {folder}" for folder, trial in left.items())), sep="\n")

    def train() -> None:
        if len(left) > 1:
            train_together([(trial.settings, folder) for folder, trial in left.items()], width=width, looked=show)
        else:
            [(folder, trial)] = left.items()
            train_and_evaluate(config_lib.to_dict(trial.settings), folder)

    try:
        _patiently(train, unless=list(left))
    except Busy as e:
        if alone or e.folder not in left:
            raise
        print(f"{e.folder}: another process trains it")
    except UserError as e:
        diverged = isinstance(e, Diverged)
        if diverged and jax.process_count() == 1:  # of several processes, all end by it
            print(f"diverged, and is left at that: {e}")
        else:
            missing = [trial for folder, trial in left.items() if status(trial.settings, folder) not in ENDED]
            if not (missing or diverged):  # it is of the results
                raise
            of = missing or list(left.values())
            which = str(of[0]) if len(of) == 1 else f"{len(of)} trials"
            raise UserError(f"{which}: {e}\n{_whole(trials, workdir)}") from e
    gc.collect()  # what one trial held, the next one may need


def _whole(trials: Sequence[Trial], workdir: pathlib.Path) -> str:
    """Which trials are done, for whoever has to mend something before the sweep goes on."""
    done = [str(t.number) for t in trials if status(t.settings, workdir / t.name) == DONE]
    return f"Whole are {len(done)} of {len(trials)} trials ({', '.join(done) or 'none'}); the same command goes on"


def _patiently(act: Callable[[], object], unless: Sequence[pathlib.Path] = ()) -> None:
    """Does something that another process may hold a folder for, as soon as it lets go, but for some folders.

    Raises:
      Busy: one of these is held, or this is one of several processes, which would wait for this one.
    """
    said = False
    while True:
        try:
            act()
            return
        except Busy as e:
            if e.folder in unless or jax.process_count() > 1:
                raise
            if not said:
                print(f"{e.folder}: another process is at work there, waiting for it")
            said = True
            time.sleep(_LOOKS)


def _write(trials: Sequence[Trial], workdir: pathlib.Path, metric: str | None, command: Sequence[str]) -> None:
    """Writes the results, one process at a time."""
    try:
        with lock(workdir, "writing the results", "--workdir"):
            found = collect(trials, workdir)
            results.write(found, workdir, metric_of(found, metric), command)
    except OSError as e:
        if not is_disk_error(e):
            raise
        why = f"{workdir}: the results could not be written ({e}). Free space there"
        raise UserError(f"{why}. {_whole(trials, workdir)}") from e


def _check_one_cache_a_path(trials: Sequence[Trial]) -> None:
    """Refuses a path of the user's for caches that are not the same."""
    firsts: dict[str, Trial] = {}
    for trial in trials:
        cache = trial.settings.cache
        if cache.mode == "off" or not cache.path:
            continue
        first = firsts.setdefault(cache.path, trial)
        if shared_by(first.settings) != shared_by(trial.settings):
            raise UserError(
                f"config.cache.path={cache.path!r} can hold one cache, but {first} and {trial} need one each. Leave it "
                f"'', and each is made in --workdir"
            )


def _check_workdir(base: RunSettings, trials: Sequence[Trial], workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a folder says of the sweep in it; None in one that holds none.

    What may change in a run may change here.

    Raises:
      UserError: it holds another sweep of which a trial has begun, or a run.
    """
    path = workdir / FILE
    if (workdir / config_lib.FILE).exists():
        raise UserError(f"--workdir={workdir} holds a run, expected a sweep or nothing. Take another --workdir")
    if not path.is_file():
        return None
    try:
        there = json.loads(path.read_text())
        found = config_lib.read(RunSettings, there["config"])  # an older one may lack keys
        before = [(entry["name"], entry["overrides"]) for entry in there["trials"]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not what train.py --sweep wrote ({e!r}). Take another --workdir") from e
    if not any((workdir / name / config_lib.FILE).is_file() for name, _ in before):
        return None
    lines = differences(found, base)[1]
    if len(before) != len(trials):
        lines.append(f"  trials: there {len(before)}, now {len(trials)}")
    lines += [
        f"  trial {trial.number}: there {trials_lib.describe(overrides)}, now {trials_lib.describe(trial.overrides)}"
        for (_, overrides), trial in zip(before, trials, strict=False)
        if overrides != trial.overrides
    ]
    if lines:
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        differs = "\n".join([*lines[:_SHOWN], *more])
        raise UserError(
            f"{path} is of another sweep. It differs in\n{differs}\n"
            f"Take another --workdir, or the same values to go on with that sweep"
        )
    return there


def _begun(workdir: pathlib.Path) -> pathlib.Path | None:
    """A trial of the sweep in a folder that has begun; None where there is none, or what says so cannot be read."""
    try:
        names = [entry["name"] for entry in json.loads((workdir / FILE).read_text())["trials"]]
        return next((workdir / name for name in names if (workdir / name / config_lib.FILE).is_file()), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _claim(base: RunSettings, trials: Sequence[Trial], workdir: pathlib.Path) -> None:
    """Writes whose folder this is. Raises UserError where another process has just made it another sweep's."""
    with lock(workdir, "beginning a sweep", "--workdir"):
        there = _check_workdir(base, trials, workdir)
        entries = [{"name": t.name, "overrides": dict(t.overrides), "cache": t.settings.cache.path} for t in trials]
        content = {"config": config_lib.to_dict(base), "trials": entries}
        if content != there:
            write_atomically(workdir / FILE, (json.dumps(content, indent=1) + "\n").encode())


def _with_caches(trials: Sequence[Trial], workdir: pathlib.Path, there: dict[str, Any] | None) -> list[Trial]:
    """The trials, each with the path of its cache, unless the user gave one or it needs none.

    A cache that is there keeps its name, though the base or the data may have moved.
    """
    placed = []
    for trial in trials:
        cache = trial.settings.cache
        if cache.mode != "off" and not cache.path:
            before = there["trials"][trial.number].get("cache") if there else None
            name = pathlib.Path(before).name if before else shared_by(trial.settings)
            cache = dataclasses.replace(cache, path=str(workdir / "cache" / name))
        placed.append(dataclasses.replace(trial, settings=dataclasses.replace(trial.settings, cache=cache)))
    return placed


def _check_fit(trials: Sequence[Trial], workdir: pathlib.Path) -> None:
    """Raises UserError, before the first trial, where a network or batch of one that is left does not fit."""
    known = set()
    for trial in trials:
        s, folder = trial.settings, workdir / trial.name
        parts = repr((s.base, s.modalities, s.mcm, s.sampling, s.mesh, s.train.batch_size, s.train.accumulate))
        if parts in known or status(s, folder) in ENDED:
            continue
        known.add(parts)
        try:
            mesh = sharding.make_mesh(s.mesh)
            sharding.check_batch_size(s.train.batch_size, mesh, "config.train.batch_size", s.train.accumulate)
            fitting_modulator(s, known_card(s, folder))
        except UserError as e:
            raise UserError(f"{trial} of the sweep: {e}") from e
