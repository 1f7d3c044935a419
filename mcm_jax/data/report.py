"""What ``check`` found, summed up: counts, sizes, frequencies of classes, and the last word."""

import collections
import dataclasses
import itertools
import pathlib

import numpy as np

from mcm_jax.data.folder import Tree
from mcm_jax.data.problems import Problem
from mcm_jax.data.sheet import Table
from mcm_jax.modalities import Modality


@dataclasses.dataclass
class Split:
    """What a split holds, summed up over its examples.

    Attributes:
      count: of the pictures.
      files: how many there are of each folder's.
      sizes: how many pictures have each width and height.
      read: how many maps of each modality of labels could be read.
      maps: of these, in how many each class is; index ``channels`` is unknown.
      sums: of these, the sum over maps of each class's share of the pixels, likewise.
    """

    count: int
    files: dict[str, int]
    sizes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    read: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sums: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Report:
    """All about a folder.

    Attributes:
      path: of the folder.
      modalities: found in it.
      names: of the classes, by modality.
      splits: ``train`` and, if there is one, ``test``.
      trees: the files of each.
      problems: fatal ones and warnings.
      is_borrowed: whether the test split is a part of the folder that trains otherwise.
    """

    path: pathlib.Path
    modalities: tuple[Modality, ...]
    names: dict[str, tuple[str, ...]]
    splits: dict[str, Split]
    trees: dict[str, Tree]
    problems: list[Problem]
    is_borrowed: bool

    @property
    def is_refused(self) -> bool:
        """Whether training refuses the folder."""
        return any(p.fatal for p in self.problems)


def summary(report: Report) -> list[Table]:
    """What the folder holds: counts, sizes, and the frequencies of classes."""
    splits = report.splits
    kinds = {m.name: f"{m.kind}, {m.channels} classes" if m.kind == "labels" else m.kind for m in report.modalities}
    folders = dict.fromkeys(itertools.chain.from_iterable(s.files for s in splits.values()))
    counts = [(f, kinds.get(f, ""), *(f"{s.files.get(f, 0):,}" for s in splits.values())) for f in folders]
    tables = [Table("Files", ("folder", "kind", *splits), counts)]

    sizes = sum((s.sizes for s in splits.values()), collections.Counter())
    if 0 < len(sizes) <= 8:
        rows = [(f"{w}x{h}", f"{n:,}", _percent(n / sizes.total())) for (w, h), n in sizes.most_common()]
        tables.append(Table("Sizes of the pictures", ("size", "pictures", ""), rows))
    elif sizes:
        bins = collections.Counter()
        for (width, height), count in sizes.items():
            bins[min(width, height).bit_length() - 1] += count
        rows = [
            (f"{2**k} to {2 ** (k + 1) - 1}", f"{n:,}", _percent(n / bins.total())) for k, n in sorted(bins.items())
        ]
        tables.append(Table("Sizes of the pictures", ("shorter side", "pictures", ""), rows))

    for m in report.modalities:
        if m.kind != "labels" or not any(m.name in s.maps for s in splits.values()):
            continue
        names = report.names.get(m.name) or tuple(map(str, range(m.channels)))
        columns = [c for s in splits for c in (f"{s}: share", "maps")]
        rows = []
        for i, name in enumerate((*names, "unknown")):
            cells = []
            for s in splits.values():
                has = m.name in s.maps
                cells += [_percent(s.sums[m.name][i] / s.read[m.name]), f"{s.maps[m.name][i]:,}"] if has else ["", "0"]
            if i < m.channels or m.ignore != -1:
                rows.append((name, *cells))
        known = next(t.classes.get(m.name) for t in report.trees.values())
        colors = known.colors if known else None
        title = f"Classes of {m.name}: mean share of a map's pixels, and in how many maps"
        tables.append(Table(title, ("class", *columns), rows, colors))
    return tables


def _percent(share: float) -> str:
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "0.1%" if share > 0.0005 else "0.0%"


def verdict(report: Report, command: str) -> str:
    """The last word: whether training refuses the folder, and if not, the command that trains."""
    fatal = {p.path for p in report.problems if p.fatal}
    doubts = {p.path for p in report.problems if not p.fatal}
    noted = f"{len(doubts):,} file(s) with warnings" if doubts else "no warnings"
    if fatal:
        return f"Training would refuse this folder: {len(fatal):,} file(s) with fatal problems, {noted}."
    counts = " and ".join(
        f"{s.count:,} to {'train' if split == 'train' else 'test'}" for split, s in report.splits.items()
    )
    held_out = " (held out by a hash of the names)" * report.is_borrowed
    return f"Training takes this folder: {counts}{held_out}, {noted}. It begins with\n\n{command}"
