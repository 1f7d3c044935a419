"""A run's folder: whose it is, what in it is safe, and what is said when it cannot be written."""

import dataclasses
import pathlib
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import safetensors

from mcm_jax import config
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import is_disk_error
from mcm_jax.trained import WEIGHTS
from mcm_jax.training.settings import RunSettings

# What may change on the way: where a run happens and what is watched, not what is learned. The base and the data may
# move (or be split), as their fingerprints tell whether they are the same; rounding may differ with the devices and
# micro-batches.
_FREE = {
    *("base.path", "data.path", "data.held_out_share", "cache.path", "cache.verify", "cache.batch_size"),
    *(
        "cache.shard_draws",
        "cache.load_base",
        "mcm.remat",
        "mesh.data",
        "mesh.fsdp",
        "train.accumulate",
        "train.init_from",
    ),
    *("train.log_every", "train.checkpoint_every", "train.keep", "train.best", "train.validate_every"),
    *("train.evaluate_every", "train.held_out", "train.wandb", "data.unreadable", "data.stream"),
}
BEST = "best"
"""The folder of the MCM that is best so far."""
SWEEP = "sweep.json"
"""What a folder has that holds a sweep in place of a run."""

_FREE_SECTIONS = ("sampling.", "evaluation.")


def differences(there: RunSettings, settings: RunSettings, fixed: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """A line for each key in which settings differ from a run's: those that may change on the way, and the others.

    Among the others are `fixed` keys, whatever they are.
    """
    found, wanted = config.flatten(there), config.flatten(settings)
    for flat in (found, wanted):
        flat["cache.mode"] = "on" if flat["cache.mode"] == "build" else flat["cache.mode"]
    longer = settings.train.schedule in ("constant", "wsd") and settings.train.steps > there.train.steps
    allowed, wrong = [], []
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            is_free = key in _FREE or key.startswith(_FREE_SECTIONS) or (key == "train.steps" and longer)
            line = f"  {key}: there {found.get(key, 'absent')!r}, now {wanted.get(key, 'absent')!r}"
            (allowed if is_free and key not in fixed else wrong).append(line)
    return allowed, wrong


def settings_in(workdir: pathlib.Path) -> RunSettings | None:
    """Of the run that is in a workdir already; None where there is none."""
    return config.load(RunSettings, workdir) if (workdir / config.FILE).exists() else None


def as_begun(settings: RunSettings, there: RunSettings | None) -> RunSettings:
    """Settings to go on with where a run has begun: ``mcm.x0_clip``, where it is left to the base, is as it was then.

    Older versions left it to nobody: it was 1 where the config did not say it, whatever the base.
    """
    if there is None or settings.mcm.x0_clip:
        return settings
    return dataclasses.replace(settings, mcm=dataclasses.replace(settings.mcm, x0_clip=there.mcm.x0_clip))


def check_same_run(
    settings: RunSettings, workdir: pathlib.Path, known: RunSettings | None = None
) -> RunSettings | None:
    """Compares settings with those in a workdir, and says which have changed if they may, unless they are `known`.

    Returns:
      The settings there; None in a workdir that has none yet.

    Raises:
      UserError: the workdir holds another run; lists each key that differs, and says what may. Or it holds a sweep, or
        nothing, and the settings are none to begin with.
    """
    path = workdir / config.FILE
    there = settings_in(workdir)
    if there is None:
        if (workdir / SWEEP).exists():  # which a run within would lock out
            raise UserError(
                f"--workdir={workdir} holds a sweep, expected a run or nothing. Take another --workdir; --sweep=FILE "
                f"goes on with the sweep, and the folders in it are workdirs of runs"
            )
        if not (workdir.parent / SWEEP).exists():  # of a sweep that has begun
            settings.check_new()
        return None
    allowed, wrong = differences(there, settings)
    if wrong:
        differs = "\n".join(wrong)
        raise UserError(
            f"{path} is another run's config. It differs in\n{differs}\n"
            f"Take another --workdir, or the same values to go on with that run. On the way may change: where it runs "
            f"(mesh, train.accumulate, paths), what is watched (train.*_every, keep, best, evaluation, sampling), and "
            f"train.steps, upwards, with train.schedule=constant or wsd (others decay over them)"
        )
    if allowed and there != known:
        print("\n".join([f"{path}: changed since,", *allowed]))
    return there


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def set_aside_best(workdir: pathlib.Path, step: int) -> bool:
    """Renames ``best/`` where it is of a later step than the one that a run goes on from, and tells whether it is.

    It has taken the place of whatever was best at that step: the run has no best then.
    """
    best = workdir / BEST
    if not (best / WEIGHTS).exists():
        return False
    with safetensors.safe_open(best / WEIGHTS, "np") as file:
        at = int((file.metadata() or {}).get("step", 0))
    if at > step:
        kept = best.with_name(f"{BEST}_step_{at}")
        shutil.rmtree(kept, ignore_errors=True)
        best.rename(kept)
        print(f"{best} is of step {at}, later than {step}, from which the run goes on: it is {kept.name} now")
    return at > step


@contextmanager
def disk_errors(workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failed write into one message that says what is safe; any other exception is a bug and passes."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as e:
        if not is_disk_error(e):
            raise
        steps = saved_steps(workdir)
        safe = f"The last complete one is of step {max(steps)}" if steps else "There is no complete checkpoint yet"
        raise UserError(
            f"workdir {workdir}: a checkpoint or report could not be written ({e}). {safe}. Free space there and run "
            f"the same command again"
        ) from e
