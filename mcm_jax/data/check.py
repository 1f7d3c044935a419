"""Everything that is wrong with a folder of pairs, in one pass, and what is in it.

python -m mcm_jax.data check DATA --base=scenes-ddpm --out=runs/check

Each problem is fatal, which training refuses with the same words, or a warning. The table of all that there are is in
docs/check.md. Exits with status 1 if there is a fatal one; else it ends with the command that trains, and with --out
where check.html is.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import re
import shlex
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from mcm_jax.base import Base, BaseSettings
from mcm_jax.data import DataSettings, sheet
from mcm_jax.data.captions import find_captions
from mcm_jax.data.discover import survey
from mcm_jax.data.folder import Tree, has_split, read_tree
from mcm_jax.data.problems import Problem, few, table
from mcm_jax.data.reading import SIDEWAYS, check_shape, read_caption, read_condition, read_image, turn_of
from mcm_jax.data.report import Report, Split, summary, verdict
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, user_path
from mcm_jax.modalities import Modality, cover, open_picture

_LONG = 200  # bytes of a name: with an ending, what every file system and archive takes
_FAINT = 0.1  # of the range of 16 bits
_LEAST_SHOWN = 0.5  # of a picture


def check(
    path: str | os.PathLike,
    base: Base | None = None,
    partial: bool = False,
    held_out_share: float = DataSettings.held_out_share,
    workers: int | None = None,
) -> Report:
    """Reads a whole folder, a few files at a time.

    Args:
      path: the folder.
      base: that is to be trained with: its size and its tokenizer; weights are not needed.
      partial: whether pictures may miss modalities, as ``config.data.partial`` has it.
      held_out_share: what is held out where there is no test split, as in the config.
      workers: threads that read.

    Raises:
      UserError: there is no such folder.
    """
    path = pathlib.Path(path)
    if not os.path.isdir(path):  # False of a path that is too long, too
        raise UserError(f"{path}: no such folder; expected one with pictures in {path / 'train' / 'image'}")
    modalities, told = _survey(path, held_out_share)
    problems: list[Problem] = []
    names = ["train"] + ["test"] * has_split(path, "test", held_out_share)
    prompted = any(find_captions(path / split) for split in names) or (base is not None and base.is_text_conditional)
    read = functools.partial(read_tree, path, modalities=modalities, partial=partial, held_out_share=held_out_share)
    trees = {split: read(split, captions=prompted) for split in names}
    described = {m.name: t.classes[m.name].names for t in trees.values() for m in modalities if m.name in t.classes}
    is_borrowed = len(trees) > 1 and trees["train"].root == trees["test"].root
    report = Report(path, modalities, described, {}, trees, problems, is_borrowed)
    seen: dict[bytes, tuple[str, str]] = {}
    with warnings.catch_warnings(), tqdm(total=sum(len(t.names) for t in trees.values()), unit="picture") as bar:
        warnings.simplefilter("ignore")  # of Pillow, about EXIF data and large pictures: here they are rows
        for split, tree in trees.items():
            bar.set_description(f"checking {split}")
            refused = tree.problems if _needs_prompts(base) else read(split).problems
            problems += (p if p in refused else dataclasses.replace(p, fatal=False) for p in tree.problems)
            for name in tree.names:
                problems += _odd_name(tree.root / "image" / tree.files["image"][name])
            report.splits[split] = found = Split(len(tree.names), _counts(tree))
            examples = _in_order(lambda name, tree=tree: _examine(tree, name, modalities, base), tree.names, workers)
            while some := list(itertools.islice(examples, 64)):
                problems += _too_long(base, [e.prompt for e in some if e.prompt])
                for example in some:
                    problems += [*example.problems, *_duplicate(seen, example, split)]
                    _count(found, example)
                bar.update(len(some))
    problems += _lacking_classes(report)
    refused = {p.path for p in problems if p.fatal}  # what is said of these is said in training's words
    report.problems = list(dict.fromkeys([*(p for p in told if p.path not in refused), *problems]))
    return report


def _needs_prompts(base: Base | None) -> bool:
    """Whether bad prompts are fatal. They are looked at anyway: another base may be trained with later.

    Without a base, that of configs/folder.py is meant, which takes none.
    """
    return base is not None and base.is_text_conditional


def _survey(path: pathlib.Path, held_out_share: float) -> tuple[tuple[Modality, ...], list[Problem]]:
    """What the folder holds, as configs/folder.py finds it, and what cannot be told or is doubtful."""
    try:
        found, errors = survey(path, held_out_share=held_out_share)
    except UserError as e:
        return (), [_row(e)]
    root = path / "train"
    doubts = [Problem(str(root / f.modality.name), f.doubt, _SAY, False) for f in found.findings if f.doubt]
    for text in found.left_out:
        name, _, why = text.removesuffix(")").partition(" (")
        doubts.append(Problem(str(root / name), f"left out: {why}", "Nothing, if it is no modality", False))
    return tuple(f.modality for f in found.findings), [*map(_row, errors), *doubts]


_SAY = "If that is wrong, say what it is: --config.modalities.NAME.kind=..., .channels=, .ignore="


def _row(error: UserError) -> Problem:
    """An error whose text begins with the file or folder that it is about."""
    return Problem.of(error, str(error).partition(": ")[0])


# One example


@dataclasses.dataclass
class _Example:
    """What one example adds."""

    image: str
    problems: list[Problem] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None
    digest: bytes = b""
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prompt: tuple[str, str] | None = None


def _examine(tree: Tree, name: str, modalities: Sequence[Modality], base: Base | None) -> _Example:
    """Reads an example as training does, but goes on after what training would stop at."""
    image = tree.root / "image" / tree.files["image"][name]
    out = _Example(str(image))

    def read(path: pathlib.Path, function: Callable, *args: object, fatal: bool = True) -> object:
        try:
            return function(path, *args)
        except UserError as e:
            out.problems.append(Problem.of(e, path, fatal))
            return None

    picture = read(image, read_image)
    if picture is not None:
        pixels = np.asarray(picture)
        out.size = picture.size
        out.digest = hashlib.blake2b(pixels, digest_size=16, key=repr(picture.size).encode()).digest()
        out.problems += _doubts_of_picture(image, picture, pixels, base)
    for m in modalities:
        if name not in tree.files[m.name]:
            continue
        path = tree.root / m.name / tree.files[m.name][name]
        condition = read(path, read_condition, m, tree.classes.get(m.name))
        if condition is None:
            continue
        if picture is not None:
            read(path, check_shape, condition, image, picture)
        out.problems += _doubts_of_condition(path, m, condition)
        if m.kind == "labels":
            out.labels[m.name] = _shares(condition, m)
    if name in tree.prompts:
        out.prompt = str(image), tree.prompts[name]
    elif name in tree.files.get("caption", ()):
        path = tree.root / "caption" / tree.files["caption"][name]
        if (text := read(path, read_caption, fatal=_needs_prompts(base))) is not None:
            out.prompt = str(path), text
    return out


def _doubts_of_picture(
    path: pathlib.Path, picture: Image.Image, pixels: np.ndarray, base: Base | None
) -> Iterator[Problem]:
    def doubt(found: str, fix: str) -> Problem:
        return Problem(str(path), found, fix, fatal=False)

    with open_picture(path) as file:
        mode, turn, is_deep = file.mode, turn_of(file), _is_deep(path, file)
    if mode == "CMYK":
        yield doubt("CMYK, converted to RGB without a colour profile", "Save it as RGB if its colours come out wrong")
    if is_deep:
        yield doubt("16 bits a channel, of which 8 are kept", "Nothing, if its range is right; else save 8 bits")
    if turn is not None and turn not in SIDEWAYS:
        yield doubt("turned by its EXIF data", _UPRIGHT)
    elif turn is not None and abs(picture.width - picture.height) <= 1:
        yield doubt("turned by its EXIF data, which the size of a square does not show", _UPRIGHT)
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        yield doubt(f"{picture.width * picture.height / 1e6:,.0f} million pixels", "Scale it down: reading it is slow")
    if (pixels == pixels[0, 0]).all():
        yield doubt("one colour everywhere", "Remove it and its conditions, if that is no picture")
    if base is None:
        return
    height, width, _ = base.image_shape
    if picture.height < height or picture.width < width:
        size = f"{picture.width}x{picture.height}"
        yield doubt(f"{size} pixels, smaller than the base's {width}x{height}", "Take a larger one: it is enlarged")
    top, left, bottom, right = cover(picture.height, picture.width, height, width)
    shown = (bottom - top) * (right - left) / (picture.width * picture.height)
    if shown < _LEAST_SHOWN:
        yield doubt(f"its centre alone is seen, {shown:.0%} of it", "Cut it, and its conditions, yourself")


_UPRIGHT = "See that its conditions show the upright picture, or save it upright without EXIF data"


def _is_deep(path: pathlib.Path, file: Image.Image) -> bool:
    """Whether a picture has 16 bits a channel; of colour PNGs Pillow does not say so, but their header does."""
    if file.format != "PNG":
        return file.mode.startswith("I;16")
    with path.open("rb") as raw:
        return raw.read(25)[24:] == b"\x10"


def _doubts_of_condition(path: pathlib.Path, modality: Modality, condition: np.ndarray) -> Iterator[Problem]:
    def doubt(found: str, fix: str) -> Problem:
        return Problem(str(path), found, fix, fatal=False)

    with open_picture(path) as file:
        turn, is_deep = turn_of(file), _is_deep(path, file)
        is_seen_through = file.has_transparency_data and modality.kind not in ("labels", "lines", "sparse")
    if turn is not None:
        yield doubt("EXIF data would turn it, but a condition is taken as it is stored", "Save it upright without them")
    if modality.kind == "labels":
        if (condition == condition[0, 0]).all():
            what = "unknown" if condition[0, 0] == modality.ignore else f"of class {condition[0, 0]}"
            yield doubt(f"empty: every pixel is {what}", "Remove it and its picture, if that is no map")
        return
    if is_seen_through:
        yield doubt(
            "has transparent parts, whose hidden colours count",
            "Save it without alpha, over the colour that it shall have there",
        )
    low, high = float(condition.min()), float(condition.max())
    if low == high:
        yield doubt(f"empty: every value is {low:.3g} of 1", "Remove it and its picture, if that is no map")
    elif is_deep and high < _FAINT:
        yield doubt(f"16 bits, but values end at {round(high * 65535)} of 65535", "Scale them: 65535 is read as 1")
    elif said := modality.doubt(condition):
        found, _, fix = said.partition(", so ")
        yield doubt(found, fix.capitalize())


def _shares(labels: np.ndarray, modality: Modality) -> np.ndarray:
    """Each class's share of a map, in [0, 1]; unknown comes last."""
    known = np.where(labels == modality.ignore, modality.channels, labels).reshape(-1)
    return np.bincount(known, minlength=modality.channels + 1) / labels.size


def _odd_name(path: pathlib.Path) -> Iterator[Problem]:
    name = path.name
    if len(os.fsencode(name)) > _LONG:
        found = f"its name has {len(os.fsencode(name))} bytes"
        yield Problem(str(path), found, f"Shorten it: not every file system and archive takes more than {_LONG}", False)
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        yield Problem(str(path), "its name has control characters or is no UTF-8", "Rename it", False)
    elif not name.isascii():
        fix = "Nothing here; archives and other systems may spell it in another way"
        yield Problem(str(path), "its name is not ASCII", fix, False)


# All examples


def _in_order(function: Callable[[str], _Example], names: Sequence[str], workers: int | None) -> Iterator[_Example]:
    """Examples by their names; threads are some ahead of the caller, not more, so that memory stays flat."""
    workers = workers or min(8, os.cpu_count() or 1)
    ahead: collections.deque = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for name in names:
            ahead.append(pool.submit(function, name))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _counts(tree: Tree) -> dict[str, int]:
    """How many examples have a file in each folder, or a prompt."""
    folders = tree.files | ({"caption": tree.prompts} if tree.prompts else {})
    return {folder: sum(name in files for name in tree.names) for folder, files in folders.items()}


def _count(split: Split, example: _Example) -> None:
    if example.size:
        split.sizes[example.size] += 1
    for name, shares in example.labels.items():
        split.maps[name] = split.maps.get(name, 0) + (shares > 0)
        split.sums[name] = split.sums.get(name, 0) + shares
        split.read[name] += 1


def _duplicate(seen: dict[bytes, tuple[str, str]], example: _Example, split: str) -> Iterator[Problem]:
    path = example.image
    if not example.digest or (first := seen.setdefault(example.digest, (split, path)))[1] == path:
        return
    if first[0] == split:
        yield Problem(path, f"the same picture as {first[1]}", "Keep one, unless it is to count twice", False)
    else:
        fix = "Remove one of the two, or the test measures memory"
        yield Problem(path, f"a leak: the training picture {first[1]} again, in the test split", fix, False)


def _too_long(base: Base | None, prompts: Sequence[tuple[str, str]]) -> list[Problem]:
    """Rows of the prompts, each with its file, of which the base sees the beginning only."""
    if base is None or base.tokenizer is None or not prompts:
        return []
    cut: dict[str, str] = {}
    base.tokenize([prompt for _, prompt in prompts], cut)
    fix = "Shorten it: the rest is not seen"
    rows = ((path, cut[p].removeprefix(f"{p!r} ")) for path, p in prompts if p in cut)
    return [Problem(path, f"its prompt {textwrap.shorten(said, 120)}", fix, False) for path, said in rows]


def _lacking_classes(report: Report) -> Iterator[Problem]:
    for m in report.modalities:
        maps = {split: s.maps[m.name][: m.channels] for split, s in report.splits.items() if m.name in s.maps}
        if m.kind != "labels" or "train" not in maps:
            continue
        folder = str(report.trees["train"].root / m.name)
        if never := np.flatnonzero(sum(maps.values()) == 0).tolist():
            found = f"{len(never)} of {m.channels} classes are in no map: {_named(report, m, never)}"
            yield Problem(folder, found, "Nothing, if they are not needed: they cannot be learnt", False)
        if "test" in maps:
            if lost := np.flatnonzero((maps["train"] > 0) & (maps["test"] == 0)).tolist():
                found = f"classes in train, but not in test: {_named(report, m, lost)}"
                yield Problem(folder, found, "Nothing measures them; hold out pictures that have them", False)
            if new := np.flatnonzero((maps["train"] == 0) & (maps["test"] > 0)).tolist():
                found = f"classes in test, but not in train: {_named(report, m, new)}"
                yield Problem(folder, found, "They cannot be learnt: move pictures that have them to train", False)


def _named(report: Report, modality: Modality, classes: Sequence[int]) -> str:
    names = report.names.get(modality.name)
    return few([names[c] if names else str(c) for c in classes])


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``check``."""
    add = parser.add_argument
    add("data", type=user_path, help="a folder of pairs (docs/data.md)")
    add("--base", help="a base to train with: sizes and prompts are checked against it, too")
    add("--out", type=user_path, help="writes check.html, sheet.png and problems.csv here; else nothing is written")
    add("--examples", type=int, default=16, help="how many are drawn (default: %(default)s)")
    add("--partial", action="store_true", help="pictures may miss modalities, as with config.data.partial=True")
    add("--workers", type=int, help="threads that read (default: as many as there are cores, at most 8)")


def main(args: argparse.Namespace) -> int:
    """Runs ``check``. Returns the exit status: 1 if training would refuse the folder."""
    expect(args.examples >= 0, "--examples", "at least 0", args.examples)
    expect(args.workers is None or args.workers >= 1, "--workers", "at least 1", args.workers)
    if args.out:
        check_writable(args.out, "--out")
    base = BaseSettings(args.base).outline() if args.base else None
    report = check(args.data, base, args.partial, workers=args.workers)
    rows, tables = table(report.problems, args.data), summary(report)
    said = verdict(report, _train_command(args))
    print("\n\n".join(filter(None, [rows, *(t.text() for t in tables), said])))
    if args.out:
        shown = report.problems, tables, report.trees, report.modalities, args.examples
        sheet.write(args.out, args.data, f"Check of {args.data}", said, *shown)
        print(f"\nTo look at: {args.out / 'check.html'}")
    return int(report.is_refused)


def _train_command(args: argparse.Namespace) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", args.data.resolve().name).strip("-.") or "mine"
    command = ["python", "train.py", "--config=configs/folder.py", f"--workdir=runs/{name}"]
    command.append(f"--config.data.path={args.data}")
    command += [f"--config.base.path={args.base}"] * bool(args.base)
    command += ["--config.data.partial=True"] * args.partial
    return shlex.join(command)
