"""What a folder of pairs holds, so that nobody configures it: modalities, their kinds, numbers of classes, prompts.

A folder with a usual name (:func:`mcm_jax.modalities.known`) is what the name says; any other one is looked at.
Whatever the config says of a modality counts before what is found.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mcm_jax.data.captions import find_captions
from mcm_jax.data.classes import FILE, Classes, classes_path, read_classes
from mcm_jax.data.folder import bare_pictures, held_out_names, scan
from mcm_jax.data.problems import few, printable, refuse
from mcm_jax.errors import UserError
from mcm_jax.modalities import KINDS, PICTURES, Modality, known, open_picture
from mcm_jax.modalities.files import GREY_STEP
from mcm_jax.modalities.settings import TAKEN, is_taken

NONE = "none"
"""The kind that a config gives a modality that shall be left out."""

_LOOKED_AT = 32  # files of a folder whose name says nothing
_FEW = 48  # values in a label map, at most; a grey picture has more
_CLASSES = 200  # no more are guessed from values alone: a drawing's greys go up to 254
_VOID = 255  # what often means unknown
_COLORS = 64  # no photograph has so few


@dataclasses.dataclass(frozen=True)
class Finding:
    """A modality that was found.

    Attributes:
      modality: what the config gets.
      why: what its kind, classes and unknown value were told from.
      share: of the pictures that have it, in (0, 1].
      doubt: what a user should look at; '' where nothing is doubtful.
    """

    modality: Modality
    why: str
    share: float
    doubt: str = ""

    def __str__(self) -> str:
        m = self.modality
        what = f"{m.channels} classes" if m.kind == "labels" else f"{m.channels} channel(s)"
        void = f", {m.ignore} unknown" if m.ignore != -1 else ""
        share = "" if self.share == 1 else f"; {self.share:.1%} of the pictures have it"
        doubt = f"; please check: {self.doubt}" if self.doubt else ""
        return f"  {m.name}: {m.kind}, {what}{void} ({self.why}{share}{doubt})"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
      path: of the folder.
      pictures: in the training split, those held out of it among them.
      held_out: of these; -1 where the folder has a test split.
      findings: the modalities, by name.
      left_out: folders that are no modality, each with why.
      captions: where prompts are; '' where there are none.
    """

    path: str
    pictures: int
    held_out: int
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]
    captions: str

    def __str__(self) -> str:
        split = "a test split" if self.held_out < 0 else f"{self.held_out} of them held out by a hash of the names"
        lines = [f"{self.path}: {self.pictures} pictures, {split}", *map(str, self.findings)]
        lines += [f"  left out: {text}" for text in self.left_out]
        lines.append(f"  prompts: {self.captions or 'none'}")
        lines.append(
            "  another kind, number or unknown value: --config.modalities.NAME.kind=..., .channels=, .ignore=;"
        )
        lines.append(f"  --config.modalities.NAME.kind={NONE} leaves one out")
        return "\n".join(map(printable, lines))


def discover(
    path: str | os.PathLike, said: Mapping[str, Mapping[str, Any]] | None = None, held_out_share: float = 0.0
) -> Found:
    """:func:`survey`, by the same arguments, of a folder that nothing is wrong with.

    Raises:
      UserError: there are no pictures, no conditions, or something that cannot be told; names the folder or the file
        and the key that says it.
    """
    found, errors = survey(path, said, held_out_share)
    if errors:
        raise UserError("\n".join(map(str, errors)))
    return found


def survey(
    path: str | os.PathLike, said: Mapping[str, Mapping[str, Any]] | None = None, held_out_share: float = 0.0
) -> tuple[Found, list[UserError]]:
    """Finds out what the training split of a folder of pairs holds, and what cannot be told.

    Label maps without a ``classes.json`` are all read, to count their classes; of other folders some files are.

    Args:
      path: the folder.
      said: by modality, what the config says of ``kind``, ``channels`` and ``ignore``, as far as it does.
      held_out_share: as in :class:`mcm_jax.data.folder.Folder`.

    Raises:
      UserError: there are no pictures or no conditions.
    """
    path, said = pathlib.Path(path), said or {}
    root = path / "train"
    if not os.path.isdir(root) and (bare := bare_pictures(path)):
        raise UserError(
            f"{path}: holds pictures in {bare}, but no pairs in {root}. Make them: python -m mcm_jax.data make "
            f"{shlex.quote(str(path))} --extract=sketch,canny"
            + f"; or, if conditions stand beside it, move them and it into {root}"
            * (bare != path)
        )
    files, problems = scan(root, {})
    images = files["image"]
    if not images:
        refuse(problems)
    left_out, findings, errors = [], [], []
    names = sorted(e.name for e in os.scandir(root) if e.name not in ("image", "caption") and _is_folder(e))
    if strangers := sorted(set(said) - set(names)):
        there = few(names) if names else "none"
        raise UserError(f"config.modalities.{strangers[0]}: {root} has no folder of this name; it has {there}")
    for name in names:
        given = said.get(name, {})
        if given.get("kind") == NONE:
            left_out.append(f"{name} (as the config says)")
        elif name.startswith(".") or "." in name:
            left_out.append(f"{name} (a modality's name has no dots)")
        elif not (found := _pictures(root / name, images)):
            left_out.append(f"{name} (holds no picture by the name of one in image/)")
        elif is_taken(name):
            errors.append(UserError(f"{root / name}: {TAKEN}. Rename the folder, or move it away if it is no modality"))
        else:
            try:
                findings.append(_find(path, name, found, given, len(found) / len(images), errors))
            except UserError as e:
                errors.append(e)
    if not findings and not errors:
        why = f" ({'; '.join(left_out)})" if left_out else ""
        raise UserError(
            f"{root}: there are pictures, but no conditions{why}. Add a folder for each, {root / 'sketch'}, or let "
            f"python -m mcm_jax.data make {path} --extract=sketch,canny draw them"
        )
    held_out = -1 if (path / "test").is_dir() else len(held_out_names(images, held_out_share))
    prompts = " and ".join(str(p) for p in find_captions(root))
    return Found(str(path), len(images), held_out, tuple(findings), tuple(left_out), prompts), errors


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _pictures(folder: pathlib.Path, images: Mapping[str, str]) -> list[pathlib.Path]:
    """Files of a folder that belong to a picture; what is wrong with the others, training says."""
    files, _ = scan(folder.parent, {folder.name: PICTURES}, [folder.name])
    return [folder / file for name, file in sorted(files[folder.name].items()) if name in images]


def _find(
    path: pathlib.Path,
    name: str,
    files: Sequence[pathlib.Path],
    given: Mapping[str, Any],
    share: float,
    errors: list[UserError],
) -> Finding:
    """A modality; files that cannot be read are left out, and named in `errors`."""
    usual, file = known(name), classes_path(path, name)
    kind, channels, doubt = given.get("kind"), given.get("channels"), ""
    if kind is not None:
        why = "kind from the config"
        if kind not in KINDS:
            raise UserError(f"config.modalities.{name}.kind must be one of {', '.join(KINDS)} or {NONE}, got {kind!r}")
    elif usual:
        kind, why = usual.kind, "a usual name"
    else:
        kind, why, doubt = _look(_pictures_of(_some(files), errors), read_classes(file) if file else None)
    ignore = given.get("ignore")
    if kind == "labels":
        classes = read_classes(file) if file else None
        if classes:
            why += f", classes from {file.name}"
            channels = len(classes.names) if channels is None else channels
            ignore = classes.ignore if ignore is None else ignore
            if classes.colors is None:
                _refuse_colors(name, _some(files), path)
        else:
            _refuse_colors(name, _some(files), path)
            if channels is None or ignore is None:
                values = _values(files, errors)
                counted, void, more, remark = _count(name, values, files[0].parent, channels, ignore)
                channels, ignore = counted, void
                why, doubt = f"{why}, {more}", doubt or remark
    elif channels is None:
        if usual and usual.kind == kind and usual.channels is not None:
            channels = usual.channels
        elif kind == "map":
            channels = 1 if all(map(_is_grey, _pictures_of(_some(files), errors))) else 3
        else:
            channels = 1 if kind == "lines" else 3
    modality = Modality(name, kind, int(channels), -1 if ignore is None else int(ignore))
    return Finding(modality, why, share, doubt)


# Looking at files


def _some(files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    step = max(1, len(files) // _LOOKED_AT)
    return list(files[::step][:_LOOKED_AT])


def _open(path: pathlib.Path) -> Image.Image:
    with open_picture(path, "Replace it, or remove it") as picture:
        picture.load()
    return picture


def _pictures_of(files: Sequence[pathlib.Path], errors: list[UserError]) -> list[Image.Image]:
    """Those that can be read; the others are named in `errors`."""
    found = []
    for file in files:
        try:
            found.append(_open(file))
        except UserError as e:
            errors.append(e)
    return found


def _is_grey(picture: Image.Image) -> bool:
    if picture.mode in ("1", "L", "LA", "I", "F") or picture.mode.startswith("I;16"):
        return True
    pixels = np.asarray(picture.convert("RGB"))
    return bool((pixels == pixels[..., :1]).all())


def _codes(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
    return np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]))


def _look(pictures: Sequence[Image.Image], classes: Classes | None) -> tuple[str, str, str]:
    """Kind, why, and what is doubtful, of files whose folder has a name of the user's own."""
    if not pictures:
        return "map", "none of its files can be read", ""
    png = all(p.format == "PNG" for p in pictures)
    if png and all(p.mode == "P" and not p.has_transparency_data for p in pictures):
        return "labels", "palette PNGs", ""
    alphas = [np.asarray(p.convert("RGBA"))[..., 3] for p in pictures if p.has_transparency_data]
    if any((alpha == 0).any() for alpha in alphas):
        return "sparse", "pictures with transparent parts", ""
    if not all(_is_grey(p) for p in pictures):
        colors = np.unique(np.concatenate([_codes(p) for p in pictures]))
        if png and classes and classes.colors is not None:
            own = classes.colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
            void = (
                [int(np.array(classes.ignore_color) @ np.array([1 << 16, 1 << 8, 1]))] if classes.ignore_color else []
            )
            if np.isin(colors, [*own, *void]).all():
                return "labels", f"the colours of {FILE}", ""
        doubt = f"only {len(colors)} colours: if they are classes, give their names and colours in {FILE}"
        return "map", "colour pictures", doubt if len(colors) <= _COLORS else ""
    arrays = [np.asarray(p if p.mode.startswith("I") else p.convert("L")) for p in pictures]
    found = [np.unique(a) for a in arrays]
    values = np.unique(np.concatenate(found))
    rest = values[values != _VOID]
    dense = len(rest) > 1 and rest[-1] < _CLASSES and rest[-1] + 1 <= 2 * len(rest) + 8
    if png and dense and np.median([len(v) for v in found]) <= _FEW:
        return "labels", f"PNGs of few values, {values[0]} to {rest[-1]}", ""
    white = float(np.mean([(a >= 250).mean() for a in arrays])) if values[-1] <= 255 else 0.0
    if white >= 0.6:
        return "lines", f"dark on white, {white:.0%} of which is white", ""
    black = float(np.mean([(a <= 5).mean() for a in arrays]))
    doubt = "mostly black: if they are lines, save them black on white, and they become kind=lines"
    return "map", "grey pictures", doubt if black >= 0.6 and values[-1] <= 255 else ""


def _refuse_colors(name: str, files: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    for file in files:
        if not (found := _pictures_of([file], [])):
            continue  # said elsewhere
        picture = found[0]
        if picture.mode not in ("L", "P", "1", "I") and not picture.mode.startswith("I;16"):
            colors = [[int(c >> 16), int(c >> 8 & 255), int(c & 255)] for c in _codes(picture)]
            raise UserError(
                f"{file}: found labels in colour (mode {picture.mode}, {len(colors)} colours: "
                f"{', '.join(map(str, colors[:3]))}{', ...' if len(colors) > 3 else ''}), but no {path / FILE} with "
                f'colours. Write it, {{"classes": [{{"name": "sky", "color": {colors[0]}}}, ...]}}, or save the '
                f"classes as values; if {name} is no label map, say what it is, --config.modalities.{name}.kind=map"
            )


def _values(files: Sequence[pathlib.Path], errors: list[UserError]) -> np.ndarray:
    """All pixel values of label maps, ascending."""

    def values(file: pathlib.Path) -> set[int]:
        found: set[int] = set()
        for picture in _pictures_of([file], errors):
            if picture.mode in ("L", "P"):  # many times faster than sorting
                step = picture.info[GREY_STEP]
                found.update(value // step for value, count in enumerate(picture.histogram()) if count)
            else:
                found.update(np.unique(np.asarray(picture)).astype(int).tolist())
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return np.array(sorted(set().union(*pool.map(values, files))), int)


def _count(
    name: str, values: np.ndarray, folder: pathlib.Path, channels: int | None, ignore: int | None
) -> tuple[int, int, str, str]:
    """Number of classes, the unknown value, from what, and what is doubtful."""
    guessed = ignore is None and _VOID in values and (channels is None or channels <= _VOID)
    rest = values[values != (_VOID if guessed else -1 if ignore is None else ignore)]
    if guessed and len(rest) and rest[-1] >= _CLASSES:  # 255 is then one more of many
        guessed, rest = False, values
    if len(rest) < 2 and channels is None:
        raise UserError(
            f"{folder}: the label maps hold the values {values.tolist()} only, expected classes 0, 1, ... If it is a "
            f"mask, save it as 0 and 1, or say that it is a map: --config.modalities.{name}.kind=map; if one of them "
            f"means unknown, say how many classes there are: --config.modalities.{name}.channels=2"
        )
    top = int(rest[-1]) if len(rest) else 0
    void = _VOID if guessed else -1 if ignore is None else ignore
    count = top + 1 if channels is None else channels
    why = f"the largest value is {top}" if channels is None else "channels from the config"
    remark = ""
    if guessed:
        remark = f"{_VOID} is taken for unknown: it is far beyond the classes"
    if channels is None and count > 2 * len(rest) + 8:
        remark = f"only {len(rest)} of {count} values occur: are they classes?" + (f" {remark}" if remark else "")
    return count, void, why, remark
