"""A folder of the user's own pairs as a source: pictures and their conditions, paired by file name.

::

    DATA/train/image/NAME.jpg         the pictures: png, jpg, jpeg or webp, of any size
    DATA/train/segmentation/NAME.png  their conditions, one folder for each modality, by the modality's name
    DATA/train/sketch/NAME.png
    DATA/train/caption/NAME.txt       their prompts, for text-conditional bases
    DATA/test/...                     the same, held out

Whatever is wrong with the tree is said at once; the files are opened as they are asked for.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import struct
import unicodedata
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from mcm_jax.errors import UserError
from mcm_jax.modalities import PICTURES, Modality, cover, read_png

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
    ========== ======================================= ===============================================================

    Attributes:
      names: what each example's files are called, without ending. Sorted; the position is the index.

    Args:
      path: the folder that holds the splits.
      split: ``train`` or ``test``.
      modalities: which folders of conditions are read; there may be others.
      height: of the grid.
      width: of the grid.
      captions: whether prompts are read.
      limit: the first so many alone.

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
    ):
        self.modalities, self.height, self.width, self.captions = tuple(modalities), height, width, captions
        self._root = pathlib.Path(path) / split
        endings = {m.name: m.endings for m in self.modalities}
        if captions:
            endings["caption"] = (".txt",)
        if not self._root.is_dir():
            parent = self._root.parent
            found = f"there are {_few(sorted(os.listdir(parent)))}" if parent.is_dir() else f"nor is there {parent}"
            raise UserError(f"{self._root}: no such folder; {found}. Expected {_layout(self._root)}")

        self._files = {"image": _files(self._root / "image", PICTURES)}
        self.names = tuple(sorted(self._files["image"]))[:limit]
        if not self.names:
            raise UserError(f"{self._root / 'image'}: holds no pictures. Expected {_layout(self._root)}")
        problems = []
        for name, known in endings.items():
            try:
                self._files[name] = _files(self._root / name, known)
                _check_pairs(self._root / name, self._files[name], self._files["image"], known[0])
            except UserError as e:
                problems.append(str(e))
        if problems:
            raise UserError("\n".join(problems))

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
        for modality in self.modalities:
            condition = read_png(self._path(modality.name, name), modality)
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
            example["caption"] = np.array(_read_caption(self._path("caption", name)))
        return example

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the names and contents of the pictures, of each modality's files and of the prompts. Reads all."""

        def digest(path: pathlib.Path) -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        found = {}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for folder in self._files:
                digests = pool.map(digest, [self._path(folder, name) for name in self.names])
                facts = json.dumps(list(zip(self.names, digests, strict=True)))
                found[folder] = hashlib.sha256(facts.encode()).hexdigest()
        return found

    def stamp(self) -> str:
        """SHA-256 of all files' names, sizes and times: where it is equal, fingerprints need not be taken again."""
        facts = []
        for folder, files in self._files.items():
            for name in self.names:
                found = self._path(folder, name).stat()
                facts.append((folder, files[name], found.st_size, found.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _path(self, folder: str, name: str) -> pathlib.Path:
        return self._root / folder / self._files[folder][name]


# The tree


def _files(folder: pathlib.Path, endings: Sequence[str]) -> dict[str, str]:
    """File names by what they are called without ending."""
    try:
        with os.scandir(folder) as entries:
            files = {e.name: e.is_file() for e in entries}
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


def _check_pairs(folder: pathlib.Path, files: Mapping[str, str], images: Mapping[str, str], ending: str) -> None:
    problems = []
    if missing := sorted(images.keys() - files.keys()):
        problems.append(
            f"no file for {len(missing)} of {len(images)} pictures: {_few(missing)} (expected "
            f"{folder / (missing[0] + ending)} for {folder.parent / 'image' / images[missing[0]]})"
        )
    if extra := sorted(files.keys() - images.keys()):
        problems.append(f"{len(extra)} file(s) without a picture: {_few([files[name] for name in extra])}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}. Files are paired by their names without ending")


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


def _read_caption(path: pathlib.Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a text file in UTF-8 ({e})") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != 1:
        raise UserError(f"{path}: expected one line, the prompt, found {len(prompts)}")
    return prompts[0]


# The grid


def _same_aspect_ratio(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes can be one picture's, each rounded: within a pixel of the smaller."""
    (height, width), (large_height, large_width) = sorted((a, b), key=lambda size: size[0] * size[1])
    return (
        abs(width - large_width * height / large_height) <= 1 or abs(height - large_height * width / large_width) <= 1
    )


def to_grid(modality: Modality, condition: np.ndarray, box: Sequence[float], height: int, width: int) -> np.ndarray:
    """The part ``box`` (top, left, bottom, right, in the condition's pixels) on the grid, 8 bits a value."""
    return modality.pack(modality.crop(condition, box, height, width))


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
