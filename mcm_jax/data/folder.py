"""A folder of the user's own pairs as a source: pictures and their conditions, paired by file name.

::

    DATA/train/image/NAME.jpg         the pictures: png, jpg, jpeg or webp, of any size
    DATA/train/segmentation/NAME.png  their conditions, one folder for each modality, by the modality's name
    DATA/train/sketch/NAME.png
    DATA/train/caption/NAME.txt       their prompts, for text-conditional bases; or all in one file: .captions
    DATA/test/...                     the same, held out
    DATA/classes.json                 names and colours of label classes, see .classes

Whatever is wrong with the tree is said at once; the files are opened as they are asked for.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from mcm_jax.data import captions as captions_lib
from mcm_jax.data.classes import Classes, classes_path, labels_of_colors, read_classes
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality, cover, read_png

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are pictures, in any case."""

_CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: what file managers leave behind
_SHOWN = 3  # names in a message
_ORIENTATION = 0x0112  # of EXIF, and what undoes each
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Folder:
    """A random-access source of the pairs in a folder; ``[i]`` reads the files of example i, and is thread-safe.

    An example holds

    ========== ======================================= ===============================================================
    image      uint8 ``[H, W, 3]``                     upright, over white, scaled to cover the grid, cut at its centre
    labels     uint8 ``[H, W]``; of values above 255   the same part of the picture, by nearest neighbour; unknown
               uint16 or int32                         pixels stay :attr:`Modality.ignore`
    map, lines uint8 ``[H, W]`` or ``[H, W, C]``       the same part, by :meth:`Modality.resize`; value * 255
    caption    str, as an array                        if asked for
    present    uint8 ``[modalities]``                  if `partial`: 0 where there is no file, and the null condition
    ========== ======================================= ===============================================================

    Attributes:
      names: what each example's files are called, without ending. Sorted; the position is the index.
      classes: what ``classes.json`` says of each modality of labels that it describes.

    Args:
      path: the folder that holds the splits.
      split: ``train`` or ``test``.
      modalities: which folders of conditions are read; there may be others.
      height: of the grid.
      width: of the grid.
      captions: whether prompts are read.
      limit: the first so many alone.
      partial: whether a picture may miss modalities.
      held_out_share: where there is no test split, how many of the training split's pairs are in it instead of there,
        chosen by :func:`held_out_names`.

    Raises:
      UserError: a folder or a file is missing, is one too many, or cannot be paired; lists every folder's. With
        ``[i]``: a file is damaged or holds something else than it should.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        modalities: Sequence[Modality],
        height: int,
        width: int,
        captions: bool = False,
        limit: int | None = None,
        partial: bool = False,
        held_out_share: float = 0.0,
    ):
        self.modalities, self.height, self.width, self.captions = tuple(modalities), height, width, captions
        self.partial = partial
        tree = read_tree(path, split, modalities, captions, partial, held_out_share)
        if tree.errors:
            raise UserError("\n".join(str(e) for _, e in tree.errors))
        self._root, self._files, self.classes, self._prompts = tree.root, tree.files, tree.classes, tree.prompts
        self.names = tree.names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name = self.names[index]
        path = self._path("image", name)
        picture = _read_image(path)
        box = cover(picture.height, picture.width, self.height, self.width)
        top, left, bottom, right = box
        resized = picture.resize((self.width, self.height), Image.Resampling.LANCZOS, (left, top, right, bottom))
        example = {"image": np.array(resized)}
        if self.partial:
            example["present"] = np.array([name in self._files[m.name] for m in self.modalities], np.uint8)
        for modality in self.modalities:
            if name not in self._files[modality.name]:
                null = modality.null(1, self.height, self.width)[0]
                example[modality.name] = _eight_bits(modality, null)
                continue
            condition = read_condition(self._path(modality.name, name), modality, self.classes.get(modality.name))
            if not _same_aspect_ratio(condition.shape[:2], (picture.height, picture.width)):
                raise UserError(
                    f"{self._path(modality.name, name)} is {_size(*condition.shape[:2])}, which is another shape than "
                    f"{path}: {_size(picture.height, picture.width)}{_turned(path)}. A {modality.name} shows all of "
                    f"its picture; its resolution may differ, its aspect ratio may not"
                )
            scales = (condition.shape[0] / picture.height, condition.shape[1] / picture.width)
            scaled = tuple(edge * scale for edge, scale in zip(box, scales * 2, strict=True))
            example[modality.name] = to_grid(modality, condition, scaled, self.height, self.width)
        if self.captions:
            prompts = self._prompts
            prompt = prompts[name] if prompts else captions_lib.read_text(self._path(captions_lib.FOLDER, name))
            example["caption"] = np.array(prompt)
        return example

    def shares(self) -> dict[str, float]:
        """How many of the pictures have each modality, in [0, 1]."""
        return {m.name: sum(n in self._files[m.name] for n in self.names) / len(self) for m in self.modalities}

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the names and contents of the pictures, of each modality's files and of the prompts. Reads all."""

        def digest(path: pathlib.Path) -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        found = {}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for folder, files in self._files.items():
                names = [name for name in self.names if name in files]
                digests = pool.map(digest, [self._path(folder, name) for name in names])
                facts = list(zip(names, digests, strict=True))
                if (known := self.classes.get(folder)) and known.colors is not None:
                    facts.append(("", [known.colors.tolist(), known.ignore_color]))
                found[folder] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        if self._prompts:
            prompts = [(name, self._prompts[name]) for name in self.names]
            found[captions_lib.FOLDER] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        return found

    def stamp(self) -> str:
        """SHA-256 of all files' names, sizes and times: where it is equal, fingerprints need not be taken again."""
        facts = []
        for folder, files in self._files.items():
            for name in self.names:
                if name in files:
                    found = self._path(folder, name).stat()
                    facts.append((folder, files[name], found.st_size, found.st_mtime_ns))
        facts += [
            (name, [c.colors.tolist(), c.ignore_color]) for name, c in self.classes.items() if c.colors is not None
        ]
        facts += [self._prompts] if self._prompts else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _path(self, folder: str, name: str) -> pathlib.Path:
        return self._root / folder / self._files[folder][name]


# The tree


@dataclasses.dataclass(frozen=True)
class Tree:
    """What a split of a folder holds, by the names of its files.

    Attributes:
      root: the folder that the files are in.
      names: of the examples, without ending, sorted.
      files: of ``image``, each modality and ``caption``: file names by names without ending.
      classes: of the modalities that a ``classes.json`` describes.
      prompts: by name, where they are in one file; empty where each has its own or none are asked for.
      errors: whatever is wrong, each with the file or folder that it is about.
    """

    root: pathlib.Path
    names: tuple[str, ...]
    files: dict[str, dict[str, str]]
    classes: dict[str, Classes]
    prompts: dict[str, str]
    errors: list[tuple[pathlib.Path, UserError]]


def read_tree(
    path: str | os.PathLike,
    split: str,
    modalities: Sequence[Modality],
    captions: bool = False,
    partial: bool = False,
    held_out_share: float = 0.0,
) -> Tree:
    """Lists a split's files and pairs them; opens no picture. The arguments are those of :class:`Folder`.

    Raises:
      UserError: there is no such split, or it holds no pictures; all else is in :attr:`Tree.errors`.
    """
    path = pathlib.Path(path)
    borrowed = held_out_share > 0 and not (path / "test").is_dir()
    root = path / ("train" if borrowed else split)
    if not root.is_dir():
        found = f"there are {_few(sorted(os.listdir(path)))}" if path.is_dir() else f"nor is there {path}"
        raise UserError(f"{root}: no such folder; {found}. Expected {_layout(root)}")
    images = _files(root / "image", PICTURES, besides=captions_lib.LINES)
    held_out = held_out_names(images, held_out_share) if borrowed else set()
    names = tuple(sorted(held_out if borrowed and split == "test" else images.keys() - held_out))
    if not names:
        few = f"{len(images)} picture(s), of which none can be held out" if images else "no pictures"
        raise UserError(f"{root / 'image'}: holds {few}. Expected {_layout(root)}")

    files, classes, prompts = {"image": images}, {}, {}
    errors: list[tuple[pathlib.Path, UserError]] = []
    for m in modalities:
        folder, endings = root / m.name, (".png",) if m.kind == "labels" else PICTURES
        files[m.name] = {}
        try:
            if not partial or os.path.lexists(folder):
                files[m.name] = _files(folder, endings)
            _check_pairs(folder, files[m.name], images, endings[0], partial)
        except UserError as e:
            errors.append((folder, e))
        if m.kind == "labels" and (file := classes_path(path, m.name)):
            try:
                classes[m.name] = _fitting(read_classes(file), m, file)
            except UserError as e:
                errors.append((file, e))
    if captions:
        folder = root / captions_lib.FOLDER
        try:
            found = captions_lib.find_captions(root) or folder
            if found == folder:
                files[captions_lib.FOLDER] = _files(folder, (".txt",))
                _check_pairs(folder, files[captions_lib.FOLDER], images, ".txt")
            else:
                prompts = captions_lib.read_lines(found, PICTURES, images)
                if missing := sorted(images.keys() - prompts.keys()):
                    raise UserError(
                        f"{found}: no line for {len(missing)} of {len(images)} pictures: {_few(missing)}. Each picture "
                        f"needs its prompt"
                    )
        except UserError as e:
            errors.append((folder, e))
    return Tree(root, names, files, classes, prompts, errors)


def held_out_names(names: Iterable[str], share: float) -> set[str]:
    """Those of a folder's names that its test split gets, where it has none of its own: about `share` of them.

    A name is held out where its SHA-256, as a number in [0, 1), is below `share`, whatever other names there are: new
    pictures move no old one. Of two names or more at least one is held out and one is left.
    """
    numbers = {name: _number(name) for name in names}
    if share <= 0 or len(numbers) < 2:
        return set()
    order = sorted(numbers, key=lambda name: (numbers[name], name))
    count = sum(number < share for number in numbers.values())
    return set(order[: min(max(count, 1), len(order) - 1)])


def _number(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def has_split(path: str | os.PathLike, split: str, held_out_share: float) -> bool:
    """Whether a folder has a split's pictures, of its own or held out of its training split; checks nothing else."""
    path = pathlib.Path(path)
    if (path / split).is_dir() or split != "test" or held_out_share <= 0:
        return (path / split).is_dir()
    try:
        return len(_files(path / "train" / "image", PICTURES, besides=captions_lib.LINES)) >= 2
    except UserError:
        return False


def _fitting(classes: Classes, modality: Modality, path: pathlib.Path) -> Classes:
    if len(classes.names) != modality.channels:
        raise UserError(
            f"{path}: describes {len(classes.names)} classes, but config.modalities.{modality.name}.channels is "
            f"{modality.channels}. Set it to {len(classes.names)}; where the file is about other labels, call it "
            f"NAME.classes.json by their folder's name"
        )
    return classes


def _files(folder: pathlib.Path, endings: Sequence[str], besides: Collection[str] = ()) -> dict[str, str]:
    """File names by what they are called without ending. `besides` names what else may be there, by FOLDER/FILE."""
    try:
        with os.scandir(folder) as entries:
            files = {e.name: _is_file(e) for e in entries if f"{folder.name}/{e.name}" not in besides}
    except OSError as e:
        raise UserError(
            f"{folder}: cannot be read as a folder ({e.strerror}). Expected {_layout(folder.parent)}"
        ) from e
    names, others, twice = {}, [], []
    for file in sorted(f for f in files if not f.startswith(".") and f.lower() not in _CLUTTER):
        stem, ending = os.path.splitext(file)
        stem = unicodedata.normalize("NFC", stem)  # an accent is one character or two, by who wrote the archive
        if not files[file] or ending.lower() not in endings:
            others.append(file)
        elif stem in names:
            twice.append(f"{names[stem]} and {file}")
        else:
            names[stem] = file
    if others:
        lossy = endings == (".png",) and any(f.lower().endswith(PICTURES[1:]) for f in others)
        why = ". Labels are PNGs: lossy formats change the classes, so write PNGs from the labels themselves"
        raise UserError(
            f"{folder}: expected {', '.join(endings)} files only, found {len(others)} other(s): {_few(others)}"
            + (why if lossy else "")
        )
    if twice:
        raise UserError(
            f"{folder}: files of one name are one example, but {len(twice)} name(s) have two: {_few(twice)}. Keep one"
        )
    return names


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _check_pairs(
    folder: pathlib.Path, files: Mapping[str, str], images: Mapping[str, str], ending: str, partial: bool = False
) -> None:
    problems = []
    hint = ""
    missing = sorted(images.keys() - files.keys())
    if missing and (not partial or len(missing) == len(images)):
        if ending != ".txt" and len(missing) < len(images):
            hint = "; config.data.partial=True trains with pictures that miss some of their conditions"
        problems.append(
            f"no file for {len(missing)} of {len(images)} pictures: {_few(missing)} (expected "
            f"{folder / (missing[0] + ending)} for {folder.parent / 'image' / images[missing[0]]})"
        )
    if extra := sorted(files.keys() - images.keys()):
        problems.append(f"{len(extra)} file(s) without a picture: {_few([files[name] for name in extra])}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}. Files are paired by their names without ending{hint}")


def _few(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN]) or "no files"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _layout(root: pathlib.Path) -> str:
    return (
        f"{root / 'image' / 'NAME.jpg'} (or png, webp), and by the same name {root / 'MODALITY' / 'NAME.png'} for each "
        f"modality of the config, {root / 'caption' / 'NAME.txt'} where the base takes prompts"
    )


# The files


def _read_image(path: pathlib.Path) -> Image.Image:
    """Any picture as upright RGB, its transparent parts over white."""
    try:
        with Image.open(path) as picture:
            picture.load()
        turn = _turn(picture)
        if picture.mode.startswith("I;16"):  # convert() would cut it off at 255
            picture = Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as e:
        raise UserError(
            f"{path}: not a picture that can be read ({e}). Replace it, or remove it and its conditions"
        ) from e
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Transpose | None:
    """What makes a picture upright. EXIF data that cannot be read turn nothing, as in any viewer."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


def read_condition(path: pathlib.Path, modality: Modality, classes: Classes | None = None) -> np.ndarray:
    """:func:`read_png`; of labels whose classes have colours, a colour PNG is read by these.

    So is a palette PNG all of whose colours are the classes'; of any other the index counts.
    """
    if modality.kind != "labels" or classes is None or classes.colors is None:
        return read_png(path, modality)
    try:
        with Image.open(path) as picture:
            if picture.format != "PNG" or picture.mode not in ("RGB", "RGBA", "P"):
                return read_png(path, modality)
            mode = picture.mode
            alpha = np.asarray(picture)[..., 3] if mode == "RGBA" else None
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return read_png(path, modality)  # says what is wrong
    if alpha is not None and (count := int((alpha != 255).sum())):
        raise UserError(
            f"{path}: {count:,} of {alpha.size:,} pixels are transparent, expected labels without an alpha channel. "
            f"Save it as RGB, unknown pixels in the ignore_color of classes.json"
        )
    try:
        array = labels_of_colors(pixels, classes, modality.ignore, str(path))
    except UserError:
        if mode != "P":
            raise
        return read_png(path, modality)
    modality.check(array, str(path))
    return array


# The grid


def _same_aspect_ratio(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes can be one picture's, each rounded: within a pixel of the smaller."""
    (height, width), (large_height, large_width) = sorted((a, b), key=lambda size: size[0] * size[1])
    return (
        abs(width - large_width * height / large_height) <= 1 or abs(height - large_height * width / large_width) <= 1
    )


def to_grid(modality: Modality, condition: np.ndarray, box: Sequence[float], height: int, width: int) -> np.ndarray:
    """The part ``box`` (top, left, bottom, right, in the condition's pixels) on the grid, 8 bits a value."""
    top, left, bottom, right = box
    if modality.kind == "labels" or (bottom - top <= height and right - left <= width):
        # The pixel under each centre. Area averaging does the same where it enlarges.
        rows = (top + (np.arange(height) + 0.5) * (bottom - top) / height).astype(int)
        columns = (left + (np.arange(width) + 0.5) * (right - left) / width).astype(int)
        part = condition[rows[:, None], columns[None, :]]
    else:
        # Cut at whole pixels, at most half of one away: less than half of the grid's.
        part = condition[round(top) : round(bottom), round(left) : round(right)]
        part = modality.resize(part, height, width)
    return _eight_bits(modality, part)


def _eight_bits(modality: Modality, part: np.ndarray) -> np.ndarray:
    """Maps as value * 255; labels as the smallest integers that hold them."""
    if modality.kind != "labels":
        return np.round(part * 255).astype(np.uint8)
    most = max(modality.channels - 1, modality.ignore)
    return part.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32)


def _size(height: int, width: int) -> str:
    return f"{width}x{height} pixels"


def _turned(path: pathlib.Path) -> str:
    """A remark for a picture that its EXIF data turns by 90 degrees, where many tools do not."""
    with Image.open(path) as picture:
        sideways = _turn(picture) in (
            Transpose.TRANSPOSE,
            Transpose.ROTATE_270,
            Transpose.TRANSVERSE,
            Transpose.ROTATE_90,
        )
    return " as its EXIF data turns it" if sideways else ""
