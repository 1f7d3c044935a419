"""The runs of a sweep: whose turn it is, and what follows when one of them ends early."""

import contextlib
import gc
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from mcm_jax import config as config_lib
from mcm_jax import distributed, sharding
from mcm_jax.base import BaseCard, BaseSettings
from mcm_jax.cache import store
from mcm_jax.errors import Busy, Interrupted, UserError
from mcm_jax.files import check_writable, is_disk_error, lock
from mcm_jax.sweep import folder as folders
from mcm_jax.sweep import results
from mcm_jax.sweep import trials as trials_lib
from mcm_jax.sweep.outcomes import DONE, ENDED, Outcome, check_measured, collect, metric_of, status
from mcm_jax.sweep.trials import Trial
from mcm_jax.training import read_run, train_and_evaluate
from mcm_jax.training.actions import Diverged
from mcm_jax.training.caching import known_card
from mcm_jax.training.loop import stopped_late
from mcm_jax.training.parts import fitting_modulator
from mcm_jax.training.together import check_together, shared_by_all, train_together

MODES = ("auto", "serial", "together")

_LOOKS = 2.0  # seconds between two looks at what another process holds


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
    workdir = pathlib.Path(workdir).expanduser()
    if width is not None and width < 1:
        raise UserError(f"--sweep_width={width}: expected at least 1 trial on each device")
    if width is not None and (mode == "serial" or index is not None):
        apart = "--sweep_mode=serial" if index is None else f"--sweep_index={index}"
        raise UserError(f"--sweep_width={width} is of trials that train together; leave it out with {apart}")
    if index is not None and mode == "together":
        raise UserError(f"--sweep_index={index} is one trial, alone; leave out --sweep_mode=together")
    begun = folders.find(workdir)
    base = read_run(config, known=begun and begun.base.modalities.shown)  # the data may be gone
    hyper, metric = trials_lib.load(sweep)
    trials = trials_lib.read(config, base, hyper, begun.trials if begun else ())
    if begun:
        base, trials = folders.as_begun(begun, base, trials)
    if index is not None and not 0 <= index < len(trials):
        raise UserError(f"--sweep_index={index}: the sweep has {len(trials)} trials, 0 to {len(trials) - 1}")
    check_measured(trials, metric)
    for trial in () if begun else trials:
        with _named(trial):
            trial.settings.check_new()
    if begun:
        folders.check_same(begun, trials, workdir)
    card = _cards(workdir)
    trials = folders.placed(trials, workdir, begun, card)
    groups = [[trials[index]]] if index is not None else groups_of(trials, mode)
    _check_fit([trial for group in groups for trial in group], workdir, card)
    distributed.synchronise("sweep")  # all have read what the first one writes
    if distributed.is_first():
        check_writable(workdir, "--workdir")
        with _disk_errors("sweep.json", trials, workdir):
            _patiently(lambda: folders.claim(base, trials, workdir))
    own = workdir / "cache"
    if (own / store.MANIFEST).is_file() and str(own) not in {trial.settings.cache.path for trial in trials}:
        print(f"{own} is a cache that no trial reads; with --config.cache.path={own} all of them do")
    if not any(trial.settings.train.evaluate_every for trial in trials):
        print("train.evaluate_every is 0: nothing is measured on held-out examples, training's last loss ranks")

    def show() -> None:
        if distributed.is_first():
            with _disk_errors("the results", trials, workdir):
                _patiently(lambda: _write(trials, workdir, metric, command))

    stopped_late()  # what came before is not for this sweep
    for group in groups:
        _train(group, trials, workdir, show, width, alone=index is not None)
        show()
        if any(distributed.everyones(stopped_late()).values()) and group is not groups[-1]:
            raise Interrupted(f"stopped by a signal as trials had ended. {_whole(trials, workdir)}")
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
        if jax.process_count() > 1:  # what one of them holds, the others hold, too
            train()
        else:
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
      Busy: one of these is held.
    """
    said = False
    while True:
        try:
            act()
            return
        except Busy as e:
            if e.folder in unless:
                raise
            if not said:
                print(f"{e.folder}: another process is at work there, waiting for it")
            said = True
            time.sleep(_LOOKS)


@contextlib.contextmanager
def _disk_errors(what: str, trials: Sequence[Trial], workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failed write into one message that says which trials are whole."""
    try:
        yield
    except OSError as e:
        if not is_disk_error(e):
            raise
        why = f"{workdir}: {what} could not be written ({e}). Free space there"
        raise UserError(f"{why}. {_whole(trials, workdir)}") from e


def _write(trials: Sequence[Trial], workdir: pathlib.Path, metric: str | None, command: Sequence[str]) -> None:
    """Writes the results, one process at a time."""
    with lock(workdir, "writing the results", "--workdir"):
        found = collect(trials, workdir)
        results.write(found, workdir, metric_of(found, metric), command)


def _cards(workdir: pathlib.Path) -> Callable[[Trial], BaseCard]:
    """Returns a function that gives what is known of a trial's base, which is read once for all."""
    known: dict[BaseSettings, BaseCard] = {}

    def card(trial: Trial) -> BaseCard:
        base = trial.settings.base
        if base not in known:
            with _named(trial):
                known[base] = known_card(trial.settings, workdir / trial.name)
        return known[base]

    return card


def _check_fit(trials: Sequence[Trial], workdir: pathlib.Path, card: Callable[[Trial], BaseCard]) -> None:
    """Raises UserError, before the first trial, where a network or batch of one that is left does not fit."""
    known = set()
    for trial in trials:
        s = trial.settings
        parts = repr((s.base, s.modalities, s.mcm, s.sampling, s.mesh, s.train.batch_size, s.train.accumulate))
        if parts in known or status(s, workdir / trial.name) in ENDED:
            continue
        known.add(parts)
        of = card(trial)
        with _named(trial):
            mesh = sharding.make_mesh(s.mesh)
            sharding.check_batch_size(s.train.batch_size, mesh, "config.train.batch_size", s.train.accumulate)
            fitting_modulator(s, of)


@contextlib.contextmanager
def _named(trial: Trial) -> Iterator[None]:
    """Says of which trial a UserError is."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{trial} of the sweep: {e}") from e
