"""What is wrong with files, as rows: one message for training, which refuses them, one table for ``check``."""

import dataclasses
import itertools
import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from mcm_jax.errors import UserError

# In what was found: quoted texts, paths and numbers.
_VARIES = re.compile(rf"""'[^']*'|"[^"]*"|\S*{re.escape(os.sep)}\S*|\d[\dx,.]*""")
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


class Kind(NamedTuple):
    """Problems of which all but the file is the same, in one folder."""

    fatal: bool
    folder: str
    found: str
    fix: str
    files: list[str]


def kinds(problems: Iterable[Problem]) -> list[Kind]:
    """Problems by what they are, in the order in which they first came."""
    found: dict[tuple[bool, str, str, str], list[str]] = {}
    for p in problems:
        found.setdefault((p.fatal, os.path.dirname(p.path), p.found, p.fix), []).append(p.path)
    return [Kind(*kind, files) for kind, files in found.items()]


def alike(problems: Iterable[Problem]) -> list[list[Kind]]:
    """Kinds that differ in names and numbers alone together, fatal ones first: one mistake made in many ways."""
    groups: dict[tuple, list[Kind]] = {}
    for kind in sorted(kinds(problems), key=lambda kind: not kind.fatal):
        groups.setdefault((kind.fatal, kind.folder, _VARIES.sub("#", kind.found)), []).append(kind)
    return list(groups.values())


def refuse(problems: Iterable[Problem]) -> None:
    """Raises one UserError that names all fatal problems; those of one kind on one line."""
    lines = []
    for kind in kinds(p for p in problems if p.fatal):
        names = f"{len(kind.files)} files ({few(map(os.path.basename, kind.files))})"
        where = kind.files[0] if len(kind.files) == 1 else f"{kind.folder}: {names}"
        lines.append(f"{where}: {kind.found}. {kind.fix}")
    if lines:
        more = [f"and {len(lines) - _MOST} more; python -m mcm_jax.data check lists them all"]
        raise UserError("\n".join(lines[:_MOST] + more * (len(lines) > _MOST)))


def table(problems: Iterable[Problem], root: str | os.PathLike = "", most: int = 8, width: int | None = None) -> str:
    """A table of file, problem and fix, fatal ones first; empty where there are none.

    Args:
      problems: the rows.
      root: a folder; paths below it are shown relative to it.
      most: how many files with one problem are named; how many more there are is said.
      width: in characters; the terminal's by default.
    """
    width = width or max(80, shutil.get_terminal_size((120, 24)).columns)
    rows = []
    for group in alike(problems):
        left = most
        for kind in group[:most]:
            if left > 0:
                names = [below(file, root) for file in kind.files[:left]]
                left -= len(names)
                severity = "FATAL" if kind.fatal else "warning"
                rows.append((severity, names, below(kind.found, root), below(kind.fix, root)))
        if hidden := sum(len(kind.files) for kind in group) - (most - left):
            rows[-1][1].append(f"... {hidden:,} more")
    if not rows:
        return ""
    first = max(len(row[0]) for row in rows)
    name = min(max(len(line) for _, names, _, _ in rows for line in names), width // 3)
    rest = (width - first - name - 6) // 2
    lines = [f"{'':{first}}  {'file':{name}}  {'problem':{rest}}  fix", "-" * width]
    for severity, names, found, fix in rows:
        names = [part for line in names for part in textwrap.wrap(line, name, break_on_hyphens=False)]
        cells = ([severity], names, textwrap.wrap(found, rest), textwrap.wrap(fix, rest))
        for a, b, c, d in itertools.zip_longest(*cells, fillvalue=""):
            lines.append(f"{a:{first}}  {b:{name}}  {c:{rest}}  {d}".rstrip())
    return "\n".join(lines)


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN]) or "no files"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def below(text: str, root: str | os.PathLike) -> str:
    """A text with paths relative to a folder; see :func:`printable`."""
    return printable(text.replace(os.path.join(root, ""), "") if os.fspath(root) else text)


def printable(text: str) -> str:
    """A text of somebody else's files, with what moves a terminal's cursor or is no character at all escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
