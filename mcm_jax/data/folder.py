"""A folder of the user's own pairs as a source: pictures and their conditions, paired by file name.

::

    DATA/train/image/NAME.jpg         the pictures: png, jpg, jpeg or webp, of any size
    DATA/train/segmentation/NAME.png  their conditions, one folder for each modality, by the modality's name
    DATA/train/sketch/NAME.png
    DATA/train/caption/NAME.txt       their prompts, for text-conditional bases; or all in one file: .captions
    DATA/test/...                     the same, held out
    DATA/classes.json                 names and colours of label classes: .classes

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from mcm_jax.data import captions as captions_lib
from mcm_jax.data.classes import Classes, classes_path, labels_of_colors, read_classes
from mcm_jax.data.problems import Problem, few, refuse
from mcm_jax.errors import UserError
from mcm_jax.modalities import PICTURES, Modality, PictureBytes, cover, open_picture, read_png

_CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: what file managers leave behind
_NO_SUCH = "Add it, or take the modality out of the config"
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
SIDEWAYS = frozenset(_UPRIGHT[i] for i in (5, 6, 7, 8))
"""What makes a picture that lies on its side upright."""


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
        refuse(tree.problems)
        self._root, self._files, self.classes, self._prompts = tree.root, tree.files, tree.classes, tree.prompts
        self.names = tree.names[:limit]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name = self.names[index]

        def path_of(folder: str) -> pathlib.Path | None:
            return self._path(folder, name) if name in self._files[folder] else None

        example = read_example(path_of, self.modalities, self.classes, self.height, self.width)
        if self.partial:
            example["present"] = np.array([name in self._files[m.name] for m in self.modalities], np.uint8)
        if self.captions:
            prompts = self._prompts
            example["caption"] = np.array(prompts[name] if prompts else read_caption(self._path("caption", name)))
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
      problems: whatever is wrong.
    """

    root: pathlib.Path
    names: tuple[str, ...]
    files: dict[str, dict[str, str]]
    classes: dict[str, Classes]
    prompts: dict[str, str]
    problems: list[Problem]


def read_tree(
    path: str | os.PathLike,
    split: str,
    modalities: Sequence[Modality],
    captions: bool = False,
    partial: bool = False,
    held_out_share: float = 0.0,
) -> Tree:
    """Lists a split's files and pairs them; opens no picture. The arguments are those of :class:`Folder`."""
    path = pathlib.Path(path)
    borrowed = held_out_share > 0 and not os.path.isdir(path / "test")
    root = path / ("train" if borrowed else split)
    found = captions_lib.find_captions(root) if captions else []
    endings = {m.name: m.endings for m in modalities}
    if captions and not any(p.suffix for p in found):
        endings["caption"] = (".txt",)
    files, problems = scan(root, endings, [m.name for m in modalities] if partial else ())
    images = files["image"]
    held_out = held_out_names(images, held_out_share) if borrowed else set()
    names = tuple(sorted(held_out if borrowed and split == "test" else images.keys() - held_out))
    if images and not names:
        fix = "Add pictures, or a test split"
        problems.append(Problem(str(root / "image"), "holds one picture, so none can be held out", fix))

    classes, prompts = {}, {}
    for m in modalities:
        if m.kind == "labels" and (file := classes_path(path, m.name)):
            try:
                classes[m.name] = _fitting(read_classes(file), m, file)
            except UserError as e:
                problems.append(Problem.of(e, file))
    if len(found) > 1:
        where = " and in ".join(map(str, found))
        problems.append(Problem(str(root), f"prompts are in {where}", "Keep those that count, move the others away"))
    elif found and images and "caption" not in endings:
        prompts, wrong = captions_lib.read_lines(found[0], PICTURES, images)
        problems += wrong
    return Tree(root, names, files, classes, prompts, problems)


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
    if os.path.isdir(path / split) or split != "test" or held_out_share <= 0:
        return os.path.isdir(path / split)
    return len(_files(path / "train" / "image", PICTURES)[0]) >= 2


def _fitting(classes: Classes, modality: Modality, path: pathlib.Path) -> Classes:
    if len(classes.names) != modality.channels:
        raise UserError(
            f"{path}: describes {len(classes.names)} classes, but config.modalities.{modality.name}.channels is "
            f"{modality.channels}. Set it to {len(classes.names)}; where the file is about other labels, call it "
            f"NAME.classes.json by their folder's name"
        )
    return classes


def scan(
    root: pathlib.Path, endings: Mapping[str, Sequence[str]], partial: Collection[str] = ()
) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Pairs the files of a split by their names.

    Args:
      root: the split's folder.
      endings: of the files, by folder, without ``image``.
      partial: folders that need not have a file for every picture, if they have one for any.

    Returns:
      For each folder its files by their names without ending, and all that is wrong with the tree.
    """
    if not os.path.isdir(root):
        found = (
            f"there are {few(sorted(os.listdir(root.parent)))}"
            if os.path.isdir(root.parent)
            else f"nor is {root.parent}"
        )
        return {"image": {}}, [Problem(str(root), f"no such folder; {found}", f"Expected {_layout(root)}")]
    files, problems, spoilt = {}, [], set()
    for name, known in {"image": PICTURES, **endings}.items():
        if name in partial and not os.path.lexists(root / name):
            files[name], wrong = {}, [Problem(str(root / name), "no such folder, so no picture has one", _NO_SUCH)]
        else:
            files[name], wrong = _files(root / name, known)
        if name == "image":
            spoilt = _stems(wrong)  # of these it is said what is wrong
        if name == "image" and not files[name] and not wrong:
            wrong = [Problem(str(root / name), "holds no pictures", f"Expected {_layout(root)}")]
        elif name != "image" and (root / name).is_dir():
            some = name in partial and not files[name].keys().isdisjoint(files["image"])
            missing = () if some else files["image"].keys() - files[name].keys() - _stems(wrong)
            extra = files[name].keys() - files["image"].keys() - spoilt
            wrong += _unpaired(root / name, missing, [files[name][n] for n in extra], known[0], len(files["image"]))
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
    apart = _CLUTTER + (captions_lib.BESIDE_PICTURES,) * (folder.name == "image")
    for file in (f for f in entries if not f.startswith(".") and f.lower() not in apart):
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


def _stems(problems: Iterable[Problem]) -> set[str]:
    return {unicodedata.normalize("NFC", pathlib.Path(p.path).stem) for p in problems}


def _unpaired(
    folder: pathlib.Path, missing: Iterable[str], extra: Iterable[str], ending: str, pictures: int
) -> list[Problem]:
    rule = gaps = "Files are paired by their names without ending: add or rename one, or remove the other"
    missing = sorted(missing)
    if ending != ".txt" and len(missing) < pictures:
        gaps += "; config.data.partial=True trains with pictures that miss some of their conditions"
    image = folder.parent / "image"
    found = f"missing, but {image} has a picture of its name"
    return [
        *(Problem(str(folder / (name + ending)), found, gaps) for name in missing),
        *(Problem(str(folder / file), f"{image} has no picture of its name", rule) for file in sorted(extra)),
    ]


def _layout(root: pathlib.Path) -> str:
    return (
        f"{root / 'image' / 'NAME.jpg'} (or png, webp), and by the same name {root / 'MODALITY' / 'NAME.png'} for each "
        f"modality of the config, {root / 'caption' / 'NAME.txt'} where the base takes prompts"
    )


# The files

Source = pathlib.Path | PictureBytes
"""A file, or what is in one."""


def read_example(
    source_of: Callable[[str], Source | None],
    modalities: Sequence[Modality],
    classes: Mapping[str, Classes],
    height: int,
    width: int,
) -> dict[str, np.ndarray]:
    """The image and the conditions of an example, as :class:`Folder` gives them.

    Args:
      source_of: gives the picture of ``image``, and of each modality, or None where it is missing.
      modalities: what is read.
      classes: of the modalities of labels whose pictures may show them by colours.
      height: of the grid.
      width: of the grid.

    Raises:
      UserError: a picture is damaged, holds something else than it should, or has another shape than its image.
    """
    path = source_of("image")
    picture = read_image(path)
    box = cover(picture.height, picture.width, height, width)
    top, left, bottom, right = box
    example = {"image": np.array(picture.resize((width, height), Image.Resampling.LANCZOS, (left, top, right, bottom)))}
    for modality in modalities:
        source = source_of(modality.name)
        if source is None:
            example[modality.name] = modality.pack(modality.null(1, height, width)[0])
            continue
        condition = read_condition(source, modality, classes.get(modality.name))
        check_shape(source, condition, path, picture)
        scales = (condition.shape[0] / picture.height, condition.shape[1] / picture.width)
        scaled = tuple(edge * scale for edge, scale in zip(box, scales * 2, strict=True))
        example[modality.name] = to_grid(modality, condition, scaled, height, width)
    return example


def read_image(path: Source) -> Image.Image:
    """Any picture as upright RGB, its transparent parts over white. Raises UserError where it cannot be read."""
    with open_picture(path, "Replace it, or remove it and its conditions") as picture:
        picture.load()
        turn = turn_of(picture)
        if picture.mode.startswith("I;16"):  # convert() would cut it off at 255
            picture = Image.fromarray(np.round(np.asarray(picture) / 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
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


def read_condition(path: Source, modality: Modality, classes: Classes | None = None) -> np.ndarray:
    """:func:`read_png`; of labels whose classes have colours, a colour PNG is read by these.

    So is a palette PNG all of whose colours are the classes'; of any other the index counts.
    """
    if modality.kind != "labels" or classes is None or classes.colors is None:
        return read_png(path, modality)
    try:
        with open_picture(path) as picture:
            if picture.format != "PNG" or picture.mode not in ("RGB", "RGBA", "P"):
                return read_png(path, modality)
            mode = picture.mode
            alpha = np.asarray(picture)[..., 3] if mode == "RGBA" else None
            pixels = np.asarray(picture.convert("RGB"))
    except UserError:
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


def check_shape(path: Source, condition: np.ndarray, image: Source, picture: Image.Image) -> None:
    """Raises UserError where a condition ``[H, W]`` or ``[H, W, C]`` has another aspect ratio than its picture."""
    if not _same_aspect_ratio(condition.shape[:2], (picture.height, picture.width)):
        raise UserError(
            f"{path}: is {_size(*condition.shape[:2])}, which is another shape than {image}: "
            f"{_size(picture.height, picture.width)}{_turned(image)}. A condition shows all of its picture; "
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
    return modality.pack(modality.crop(condition, box, height, width))


def _size(height: int, width: int) -> str:
    return f"{width}x{height} pixels"


def _turned(path: Source) -> str:
    """A remark for a picture that its EXIF data turns by 90 degrees, where many tools do not."""
    with open_picture(path) as picture:
        return " as its EXIF data turns it" if turn_of(picture) in SIDEWAYS else ""
