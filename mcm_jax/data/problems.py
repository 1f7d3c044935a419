"""What is wrong with files, as rows: one message for training, which refuses them, one table for ``check``."""

import dataclasses
import itertools
import os
import shutil
import textwrap
from collections.abc import Iterable

from mcm_jax.errors import UserError

_SHOWN = 3  # names of files in a message
_MOST = 20  # lines of a message


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with one file or folder. As a text it is ``PATH: FOUND. FIX``, training's message.

    Attributes:
      path: which.
      found: what was found, and what was expected.
      fix: how to mend it.
      fatal: whether training refuses it; if not, it is a warning.
    """

    path: str
    found: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {self.found}. {self.fix}"

    @classmethod
    def of(cls, error: Exception, path: str | os.PathLike, fatal: bool = True) -> "Problem":
        """The row of an error about a file: its text begins with the path and ends with the fix, in a sentence."""
        text = str(error).removeprefix(f"{path}: ")
        for mark, begins in ((". ", ""), (", expected ", "expected "), ("; expected ", "expected ")):
            found, cut, fix = text.partition(mark)
            if cut:
                return cls(str(path), found, begins + fix, fatal)
        return cls(str(path), text, "mend or replace it", fatal)


def refuse(problems: Iterable[Problem]) -> None:
    """Raises one UserError that names all fatal problems; those alike in one folder on one line."""
    lines = []
    for folder, found, fix, files in _kinds(p for p in problems if p.fatal):
        where = files[0] if len(files) == 1 else f"{folder}: {len(files)} files ({few(map(os.path.basename, files))})"
        lines.append(f"{where}: {found}. {fix}")
    if lines:
        more = [f"and {len(lines) - _MOST} more; python -m mcm_jax.data check lists them all"]
        raise UserError("\n".join(lines[:_MOST] + more * (len(lines) > _MOST)))


def table(problems: Iterable[Problem], root: str | os.PathLike = "", most: int = 10, width: int | None = None) -> str:
    """A table of file, problem and fix, fatal ones first, those of one kind together.

    Args:
      problems: the rows.
      root: a folder; paths below it are shown relative to it.
      most: how many files of one kind are named; how many more there are is said.
      width: in characters; the terminal's by default.
    """
    width = width or max(80, shutil.get_terminal_size((120, 24)).columns)
    rows = []
    for fatal in (True, False):
        for _, found, fix, files in _kinds(p for p in problems if p.fatal == fatal):
            names = [printable(_below(f, root)) for f in files[:most]]
            if len(files) > most:
                names.append(f"... and {len(files) - most} more")
            rows.append(("FATAL" if fatal else "warning", names, printable(found), printable(fix)))
    if not rows:
        return ""
    first = 7
    name = min(max(4, *(len(n) for _, names, _, _ in rows for n in names)), width // 3)
    rest = (width - first - name - 6) // 2
    lines = [f"{'':{first}}  {'file':{name}}  {'problem':{rest}}  fix", "-" * width]
    for kind, names, found, fix in rows:
        names = [line for n in names for line in textwrap.wrap(n, name, break_on_hyphens=False) or [""]]
        cells = ([kind], names, textwrap.wrap(found, rest), textwrap.wrap(fix, rest))
        for a, b, c, d in itertools.zip_longest(*cells, fillvalue=""):
            lines.append(f"{a:{first}}  {b:{name}}  {c:{rest}}  {d}".rstrip())
    return "\n".join(lines)


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN]) or "no files"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def printable(text: str) -> str:
    """A text of somebody else's files, with what moves a terminal's cursor or is no character at all escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _kinds(problems: Iterable[Problem]) -> list[tuple[str, str, str, list[str]]]:
    """Folder, found, fix and files of each kind of problem, in the order in which they first came."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for p in problems:
        kinds.setdefault((os.path.dirname(p.path), p.found, p.fix), []).append(p.path)
    return [(*kind, files) for kind, files in kinds.items()]


def _below(path: str, root: str | os.PathLike) -> str:
    root = os.path.join(root, "") if os.fspath(root) else ""
    return path.removeprefix(root)
