"""How an error is told to other processes, and how a process ends."""

import contextlib
import os
import sys
import traceback

import jax

from mcm_jax.errors import UserError

_OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")  # JAX's errors that no other process causes


def first_line(error: BaseException) -> str:
    """An error in a line, for another process' message."""
    if isinstance(error, KeyboardInterrupt):
        return "it was stopped by a signal"
    text = next(iter(str(error).splitlines()), "").rstrip(" .;:")
    return text if isinstance(error, UserError | SystemExit) else f"{type(error).__name__}: {text}"


def in_full(error: BaseException) -> str:
    """An error as the process that has it prints it."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return first_line(error)
    return "".join(traceback.format_exception(error)).rstrip()


def may_follow(error: BaseException | None) -> bool:
    """Whether an error may be what another process' end looks like from here, e.g. a collective's lost connection."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and not any(code in str(error) for code in _OWN):
            return True
        error = error.__cause__ or error.__context__
    return False


def end_at_once(message: str, status: int = 1) -> None:
    """Ends this process at once, whatever its other threads wait for."""
    with contextlib.suppress(OSError, ValueError):  # nobody may read any more
        if message:
            sys.stderr.write(f"\n{message}\n")  # a progress bar stands in the line
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)
