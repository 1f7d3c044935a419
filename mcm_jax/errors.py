"""The ways in which a command ends early."""

import pathlib


class UserError(ValueError):
    """Bad input, with one message that says what was found, what was expected and how to mend it.

    The command line scripts print it without a traceback; any other exception is a bug and keeps its own.
    """


class Busy(UserError):
    """Another process holds a folder.

    Args:
      message: for the user.
      folder: which.
    """

    def __init__(self, message: str, folder: pathlib.Path):
        super().__init__(message)
        self.folder = folder


class OutOfMemory(UserError):
    """A device's memory does not hold something. Of several processes, the others may wait for the one that says so."""


class Interrupted(Exception):
    """A run was stopped by a signal, after its state was saved."""


def expect(holds: bool, key: str, expected: str, found: object) -> None:
    """Raises UserError unless ``holds``; the message begins with the key, so that whoever knows its section adds it."""
    if not holds:
        raise UserError(f"{key} must be {expected}, got {found!r}")
