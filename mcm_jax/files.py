"""Files that are either complete or not there."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
from collections.abc import Iterator

from mcm_jax.errors import Busy, UserError

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
_ERRNO = re.compile(r"(?i)(?:errno|os.error(?:_code)?)\W{1,3}(\d+)")


def is_disk_error(e: BaseException | None) -> bool:
    """Whether an exception is, or was caused by, a failed write (Orbax and TensorStore wrap them in their texts)."""
    while e is not None:
        found = [e.errno] if isinstance(e, OSError) else map(int, _ERRNO.findall(str(e)))
        if not _OF_DISKS.isdisjoint(found):
            return True
        e = e.__cause__ or e.__context__
    return False


def user_path(text: str) -> pathlib.Path:
    """A path that a user typed after ``--flag=``, where shells leave ``~``, the home folder, as it is."""
    return pathlib.Path(text).expanduser()


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
    probe = folder / f".writable-{secrets.token_hex(4)}"  # several processes may try at the same time
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(probe, b"\0" * 4096)
        probe.unlink()
    except OSError as e:
        raise UserError(
            f"{flag} {folder}: cannot be written ({e.strerror or e}). Free space or permissions there, or take another "
            f"{flag}"
        ) from e


@contextlib.contextmanager
def lock(folder: str | os.PathLike, doing: str, flag: str) -> Iterator[None]:
    """Holds a folder for one process; the system lets go of it when the process ends, however it ends.

    Args:
      folder: which.
      doing: what the process does, for whoever comes second.
      flag: how the user named the folder, for the message.

    Raises:
      Busy: another process holds it.
      UserError: the file system cannot lock, or the file of the lock is another user's.
    """
    import fcntl  # here, so that the package can be imported where there is none (Windows)

    path = pathlib.Path(folder) / ".lock"  # a file that is open for writing: NFS locks nothing else
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError as e:
            raise UserError(
                f"{path}: cannot be opened ({e.strerror or e}); where it is another user's, their process is {doing}, "
                f"or was killed in the midst of it. Wait for it, have them remove the file, or take another {flag}"
            ) from e
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break  # or whoever held it has just removed it: once more
            os.close(handle)
        except BlockingIOError as e:
            os.close(handle)
            message = f"{folder}: another process is {doing}. Wait for it, or take another {flag}"
            raise Busy(message, pathlib.Path(folder)) from e
        except OSError as e:
            os.close(handle)
            raise UserError(
                f"{folder}: the file system there cannot lock files ({e.strerror or e}). Take another {flag}"
            ) from e
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
