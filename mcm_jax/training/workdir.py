"""A run's folder: whose it is, what in it is safe, and what is said when it cannot be written."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mcm_jax import config
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.training.settings import RunSettings

# Where and how a cache is kept: the same training, wherever its predictions lie.
_HOUSEKEEPING = ("cache.path", "cache.verify", "cache.batch_size", "cache.shard_draws", "cache.load_base")


def _of_a_run(settings: RunSettings) -> dict[str, Any]:
    """The values that a run cannot change on its way."""
    flat = config.flatten(settings)
    flat["cache.mode"] = "on" if flat["cache.mode"] == "build" else flat["cache.mode"]
    return {key: value for key, value in flat.items() if key not in _HOUSEKEEPING}


def refuse_another(settings: RunSettings, workdir: pathlib.Path) -> None:
    """Compares settings with those in a workdir, if there are any.

    Raises:
      UserError: the workdir holds another run; lists each key that differs.
    """
    path = workdir / config.FILE
    if path.exists():
        found, wanted = _of_a_run(config.load(RunSettings, workdir)), _of_a_run(settings)
        lines = [
            f"  {key}: there {found.get(key, 'absent')!r}, now {wanted.get(key, 'absent')!r}"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key, None) != wanted.get(key, None)
        ]
        if lines:
            differs = "\n".join(lines)
            raise UserError(
                f"{path} is another run's config. It differs in\n{differs}\n"
                f"Take another --workdir, or the same values to go on with that run (a run cannot be made longer: the "
                f"learning rate decays over train.steps)"
            )


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def is_disk_error(e: BaseException | None) -> bool:
    """Whether an exception is, or was caused by, a failed write (Orbax and TensorStore wrap them)."""
    while e is not None:
        if isinstance(e, OSError) or any(code in str(e) for code in ("Errno", "errno", "os_error_code")):
            return True
        e = e.__cause__ or e.__context__
    return False


@contextmanager
def disk_errors(workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failed write into one message that says what is safe; any other exception is a bug and passes."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as e:
        if not is_disk_error(e) or isinstance(e, BrokenPipeError):
            raise
        steps = saved_steps(workdir)
        safe = f"The last complete one is of step {max(steps)}" if steps else "There is no complete checkpoint yet"
        raise UserError(
            f"workdir {workdir}: a checkpoint or report could not be written ({e}). {safe}. Free space there and run "
            f"the same command again"
        ) from e
