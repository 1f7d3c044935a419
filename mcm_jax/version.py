"""The version, for code, records and setup.py."""

import hashlib
import pathlib

__version__ = "0.1.0"


def source_digest(folder: pathlib.Path = pathlib.Path(__file__).parent) -> str:
    """SHA-256, as hex, of the package's source files, their names included: it tells edits that a version does not."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()
