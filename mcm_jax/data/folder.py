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
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from mcm_jax.data import captions as captions_lib
from mcm_jax.data.classes import Classes, classes_path, read_classes
from mcm_jax.data.problems import Problem, few, refuse
from mcm_jax.data.reading import read_caption, read_example
from mcm_jax.errors import UserError
from mcm_jax.modalities import PICTURES, Modality
from mcm_jax.modalities.files import HEAD, is_read_anew

_CLUTTER = ("thumbs.db", "desktop.ini")  # and hidden files: what file managers leave behind
_NO_SUCH = "Add it, or take the modality out of the config"


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
                found = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                head = file.read(HEAD)
            # Caches that were made when these were read otherwise are of other data.
            return f"{found}, read anew" if is_read_anew(head, kinds.get(path.parent.name, "")) else found

        kinds = {m.name: m.kind for m in self.modalities}

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
    pictures move no old one. Of two names or more at least one is held out, and at most half of a handful, whatever
    their numbers are.
    """
    numbers = {name: _number(name) for name in names}
    if share <= 0 or len(numbers) < 2:
        return set()
    order = sorted(numbers, key=lambda name: (numbers[name], name))
    count = sum(number < share for number in numbers.values())
    most = max(len(order) // 2, int(share * len(order)))
    return set(order[: min(max(count, 1), most)])


def _number(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def has_split(path: str | os.PathLike, split: str, held_out_share: float) -> bool:
    """Whether a folder has a split's pictures, of its own or held out of its training split; checks nothing else."""
    path = pathlib.Path(path)
    if os.path.isdir(path / split) or split != "test" or held_out_share <= 0:
        return os.path.isdir(path / split)
    return len(list_files(path / "train" / "image", PICTURES)[0]) >= 2


def bare_pictures(path: str | os.PathLike) -> pathlib.Path | None:
    """Where a folder without splits has pictures: itself, its folder ``image``, or None."""
    for folder in (pathlib.Path(path), pathlib.Path(path, "image")):
        if os.path.isdir(folder) and list_files(folder, PICTURES)[0]:
            return folder
    return None


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
            files[name], wrong = list_files(root / name, known)
        if name == "image":
            spoilt = stems(wrong)  # of these it is said what is wrong
        if name == "image" and not files[name] and not wrong:
            wrong = [Problem(str(root / name), "holds no pictures", f"Expected {_layout(root)}")]
        elif name != "image" and (root / name).is_dir():
            some = name in partial and not files[name].keys().isdisjoint(files["image"])
            missing = () if some else files["image"].keys() - files[name].keys() - stems(wrong)
            extra = files[name].keys() - files["image"].keys() - spoilt
            wrong += _unpaired(root / name, missing, [files[name][n] for n in extra], known[0], len(files["image"]))
        problems += wrong
    return files, problems


def list_files(folder: pathlib.Path, endings: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """File names by what they are called without ending (NFC), and what else there is: hidden files are nothing."""
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


def stems(problems: Iterable[Problem]) -> set[str]:
    """What files with problems are called without ending."""
    return {unicodedata.normalize("NFC", pathlib.Path(p.path).stem) for p in problems}


def _unpaired(
    folder: pathlib.Path, missing: Iterable[str], extra: Iterable[str], ending: str, pictures: int
) -> list[Problem]:
    rule = gaps = "Files are paired by their names without ending: add or rename one, or remove the other"
    missing = sorted(missing)
    if ending != ".txt" and len(missing) < pictures:
        gaps += "; config.data.partial=True (of check: --partial) takes pictures that miss some of their conditions"
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
