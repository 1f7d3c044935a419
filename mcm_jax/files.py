"""Files that are either complete or not there."""

import os
import pathlib

from mcm_jax.errors import UserError


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file under a temporary name and renames it; on failure nothing new is left (raises OSError)."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a renamed file that a power cut leaves empty would count as complete
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike, flag: str) -> None:
    """Makes a folder and tries to write into it, before hours of work depend on it.

    Args:
      folder: made with its parents where it is missing.
      flag: how the user named it, for the message.

    Raises:
      UserError: it cannot be written.
    """
    folder = pathlib.Path(folder)
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"\0" * 4096)
        probe.unlink()
    except OSError as e:
        raise UserError(
            f"{flag} {folder}: cannot be written ({e.strerror or e}). Free space or permissions there, or take another "
            f"{flag}"
        ) from e
