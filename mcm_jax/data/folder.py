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
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from mcm_jax.data.problems import Problem, few, refuse
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality, cover, read_png

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are pictures, in any case."""

_CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: what file managers leave behind
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
        endings = {m.name: (".png",) if m.kind == "labels" else PICTURES for m in self.modalities}
        if captions:
            endings["caption"] = (".txt",)
        self._files, problems = scan(self._root, endings)
        refuse(problems)
        self.names = tuple(sorted(self._files["image"]))[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name = self.names[index]
        path = self._path("image", name)
        picture = read_image(path)
        box = cover(picture.height, picture.width, self.height, self.width)
        top, left, bottom, right = box
        resized = picture.resize((self.width, self.height), Image.Resampling.LANCZOS, (left, top, right, bottom))
        example = {"image": np.array(resized)}
        for modality in self.modalities:
            condition = read_png(self._path(modality.name, name), modality)
            check_shape(self._path(modality.name, name), condition, path, picture)
            scales = (condition.shape[0] / picture.height, condition.shape[1] / picture.width)
            scaled = tuple(edge * scale for edge, scale in zip(box, scales * 2, strict=True))
            example[modality.name] = to_grid(modality, condition, scaled, self.height, self.width)
        if self.captions:
            example["caption"] = np.array(read_caption(self._path("caption", name)))
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


def scan(root: pathlib.Path, endings: Mapping[str, Sequence[str]]) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Pairs the files of a split by their names.

    Args:
      root: the split's folder.
      endings: of the files, by folder, without ``image``.

    Returns:
      For each folder its files by their names without ending, and all that is wrong with the tree.
    """
    if not root.is_dir():
        found = f"there are {few(sorted(os.listdir(root.parent)))}" if root.parent.is_dir() else f"nor is {root.parent}"
        return {"image": {}}, [Problem(str(root), f"no such folder; {found}", f"Expected {_layout(root)}")]
    files, problems = {}, []
    for name, known in {"image": PICTURES, **endings}.items():
        files[name], wrong = _files(root / name, known)
        if name == "image" and not files[name] and not wrong:
            wrong = [Problem(str(root / name), "holds no pictures", f"Expected {_layout(root)}")]
        elif name != "image" and (root / name).is_dir():
            wrong += _unpaired(root / name, files[name], files["image"], known[0])
        problems += wrong
    return files, problems


def _files(folder: pathlib.Path, endings: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """File names by what they are called without ending, and what else there is."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError as e:
        wrong = Problem(str(folder), f"cannot be read as a folder ({e.strerror})", f"Expected {_layout(folder.parent)}")
        return {}, [wrong]
    names, problems = {}, []
    for file in (f for f in entries if not f.startswith(".") and f.lower() not in _CLUTTER):
        path = folder / file
        stem, ending = os.path.splitext(file)
        stem = unicodedata.normalize("NFC", stem)  # an accent is one character or two, by who wrote the archive
        if not os.path.isfile(path):
            kind = "a folder" if path.is_dir() else "a link that leads nowhere" if path.is_symlink() else "no file"
            problems.append(Problem(str(path), f"{kind}, expected files only ({', '.join(endings)})", "Remove it"))
        elif ending.lower() not in endings:
            lossy = endings == (".png",) and ending.lower() in PICTURES
            fix = "Labels are PNGs: lossy formats change the classes, so write PNGs from the labels themselves"
            found = f"expected {', '.join(endings)} files only"
            problems.append(Problem(str(path), found, fix if lossy else "Convert or remove it"))
        elif stem in names:
            found = f"has the same name as {names[stem]}, and files of one name are one example"
            problems.append(Problem(str(path), found, "Keep one"))
        else:
            names[stem] = file
    return names, problems


def _unpaired(folder: pathlib.Path, files: Mapping[str, str], images: Mapping[str, str], ending: str) -> list[Problem]:
    rule = "Files are paired by their names without ending: add or rename one, or remove the other"
    missing = sorted(images.keys() - files.keys())
    extra = sorted(files[name] for name in files.keys() - images.keys())
    image = folder.parent / "image"
    return [
        *(
            Problem(str(folder / (n + ending)), f"missing, but {image} has a picture of its name", rule)
            for n in missing
        ),
        *(Problem(str(folder / file), f"{image} has no picture of its name", rule) for file in extra),
    ]


def _layout(root: pathlib.Path) -> str:
    return (
        f"{root / 'image' / 'NAME.jpg'} (or png, webp), and by the same name {root / 'MODALITY' / 'NAME.png'} for each "
        f"modality of the config, {root / 'caption' / 'NAME.txt'} where the base takes prompts"
    )


# The files


def read_image(path: pathlib.Path) -> Image.Image:
    """Any picture as upright RGB, its transparent parts over white. Raises UserError where it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
        turn = turn_of(picture)
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


def turn_of(picture: Image.Image) -> Transpose | None:
    """What makes a picture upright. EXIF data that cannot be read turn nothing, as in any viewer."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return None


def read_caption(path: pathlib.Path) -> str:
    """The prompt in a file. Raises UserError where it is no text of one line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a text file in UTF-8 ({e}). Save it as UTF-8") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) != 1:
        raise UserError(f"{path}: expected one line, the prompt, found {len(prompts)}. Write one")
    return prompts[0]


# The grid


def check_shape(path: pathlib.Path, condition: np.ndarray, image: pathlib.Path, picture: Image.Image) -> None:
    """Raises UserError where a condition ``[H, W]`` or ``[H, W, C]`` has another aspect ratio than its picture."""
    if not _same_aspect_ratio(condition.shape[:2], (picture.height, picture.width)):
        raise UserError(
            f"{path}: is {_size(*condition.shape[:2])}, which is another shape than {image}: "
            f"{_size(picture.height, picture.width)}{_turned(image)}. A {path.parent.name} shows all of its picture; "
            f"its resolution may differ, its aspect ratio may not"
        )


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
    if modality.kind != "labels":
        return np.round(part * 255).astype(np.uint8)
    most = max(modality.channels - 1, modality.ignore)
    return part.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32)


def _size(height: int, width: int) -> str:
    return f"{width}x{height} pixels"


def _turned(path: pathlib.Path) -> str:
    """A remark for a picture that its EXIF data turns by 90 degrees, where many tools do not."""
    with Image.open(path) as picture:
        sideways = turn_of(picture) in (
            Transpose.TRANSPOSE,
            Transpose.ROTATE_270,
            Transpose.TRANSVERSE,
            Transpose.ROTATE_90,
        )
    return " as its EXIF data turns it" if sideways else ""
