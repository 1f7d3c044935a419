"""A prepared data set of TFDS as a source: random access, its pictures decoded and fitted as those of a folder."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mcm_jax.data.classes import Classes
from mcm_jax.data.problems import few
from mcm_jax.data.reading import read_example
from mcm_jax.data.tfds import LAYOUTS
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality, PictureBytes

_INFO = "dataset_info.json"
_CHUNK = 64  # records a step of a fingerprint


def library() -> ModuleType:
    """tensorflow_datasets, which imports no TensorFlow.

    Raises:
      UserError: the extra is missing.
    """
    try:
        import array_record.python.array_record_data_source  # noqa: F401
        import tensorflow_datasets
    except ImportError as e:
        raise UserError(
            f"data sets of TFDS need tensorflow_datasets and array_record ({e}); pip install 'mcm-jax[tfds]' (without "
            f"TensorFlow)"
        ) from e
    return tensorflow_datasets


class Records:
    """A random-access source of a prepared data set; ``[i]`` reads record i, and is thread-safe.

    Examples are as :class:`mcm_jax.data.folder.Folder` gives them, cut and scaled by the same code. The order is that
    of the records.

    Attributes:
      classes: what the data set says of its modalities of labels.

    Args:
      path: a folder of TFDS, or the name of a data set in its data directory: see :func:`find`.
      split: of its splits, ``train`` or ``test``.
      modalities: which features are read; there may be others.
      height: of the grid.
      width: of the grid.
      captions: whether prompts are read.
      limit: the first so many alone.

    Raises:
      UserError: the extra, the data set, its split or a feature is missing, or it is not in the format of array_record.
        With ``[i]``: a record is damaged or holds something else than it should.
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
        self._root, self._split = find(path), split
        found = describe(self._root)
        self.classes = found.classes
        if found.file_format != "array_record":
            raise UserError(
                f"{self._root}: its files are {found.file_format}, expected array_record, which random access "
                f"can read. Build it anew: download_and_prepare(file_format='array_record')"
            )
        if split not in found.splits:
            raise UserError(f"{self._root}: there is no split {split!r}; found {', '.join(found.splits) or 'none'}")
        tfds = library()
        _check_features(self._root)
        builder = tfds.builder_from_directory(self._root)
        wanted = ["image", *(m.name for m in self.modalities), *(["caption"] if captions else [])]
        features = builder.info.features
        if missing := [name for name in wanted if name not in features]:
            raise UserError(
                f"{self._root}: its records have no {', '.join(missing)}; found {', '.join(sorted(features))}. Train "
                f"on what is there, or build a data set that has them (docs/tfds.md)"
            )
        pictures = [n for n in wanted if n != "caption"]
        skip = {n: tfds.decode.SkipDecoding() for n in features if isinstance(features[n], tfds.features.Image)}
        if other := [n for n in pictures if n not in skip]:
            raise UserError(f"{self._root}: {other[0]} must be a feature of kind Image, found {features[other[0]]}")
        self._pictures = pictures
        self._source = builder.as_data_source(split, decoders=skip)
        self._length = len(self._source) if limit is None else min(limit, len(self._source))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        record = self._read(index)
        where = f"{self._root}: {self._split}[{index}]" + (f" ({record['name'].decode()})" if "name" in record else "")

        def source_of(name: str) -> PictureBytes:
            return PictureBytes(record[name], f"{where} {name}")

        example = read_example(source_of, self.modalities, self.classes, self.height, self.width)
        if self.captions:
            example["caption"] = np.array(record["caption"].decode())
        return example

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the names and contents of the images, of each modality's pictures, and of the prompts. Reads all.

        Those of pictures are a folder's, if names, order, files and colours of classes are the same.
        """
        wanted = [*self._pictures, *(["caption"] if self.captions else [])]

        def digests(start: int) -> list[tuple[str, list[str]]]:
            rows = []
            for i in range(start, min(start + _CHUNK, len(self))):
                record = self._read(i)
                name = record["name"].decode() if "name" in record else str(i)
                rows.append((name, [hashlib.sha256(record[key]).hexdigest() for key in wanted]))
            return rows

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            rows = [row for chunk in pool.map(digests, range(0, len(self), _CHUNK)) for row in chunk]
        found = {}
        for column, key in enumerate(wanted):
            facts = [(name, values[column]) for name, values in rows]
            if (known := self.classes.get(key)) and known.colors is not None:
                facts.append(("", [known.colors.tolist(), known.ignore_color]))
            found[key] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return found

    def stamp(self) -> str:
        """SHA-256 of the files' names, sizes and times: where it is equal, fingerprints need not be taken again."""
        files = sorted(p for p in self._root.iterdir() if p.is_file())
        facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        facts.append([self._split, len(self), *self._pictures, self.captions])
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return self._source[int(index)]
        except Exception as e:  # the reader's own kinds, of C++
            raise UserError(f"{self._root}: {self._split}[{index}] cannot be read ({e}). Build it anew") from e


def _check_features(root: pathlib.Path) -> None:
    """Raises UserError where the features are not TFDS' own: it imports whatever module their classes name."""

    def check(found: dict[str, Any]) -> None:
        for key in ("pythonClassName", "python_class_name", "type"):
            name = found.get(key, "")
            if isinstance(name, str) and name and not name.startswith("tensorflow_datasets.core.features."):
                raise UserError(f"{path}: found a feature of the class {name}, expected tensorflow_datasets' own")

    path = root / "features.json"
    try:
        json.loads(path.read_text(encoding="utf-8"), object_hook=check)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read ({e}). Build the data set anew") from e


@dataclasses.dataclass(frozen=True)
class Description:
    """What a prepared data set says of itself.

    Attributes:
      splits: their names.
      file_format: of its files.
      modalities: those whose kind is known; none where a config has to say it.
      classes: of the modalities of labels.
    """

    splits: tuple[str, ...] = ()
    file_format: str = ""
    modalities: tuple[Modality, ...] = ()
    classes: Mapping[str, Classes] = dataclasses.field(default_factory=dict)


def describe(root: pathlib.Path) -> Description:
    """Reads what stands beside the records of a prepared data set; without TFDS.

    Raises:
      UserError: it cannot be read.
    """
    try:
        info = json.loads((root / _INFO).read_text(encoding="utf-8"))
        more = root / "metadata.json"
        known = json.loads(more.read_text(encoding="utf-8")) if more.is_file() else {}
        modalities = tuple(
            Modality(name, m["kind"], m["channels"], m["ignore"]) for name, m in known.get("modalities", {}).items()
        )
        classes = {name: _classes(c) for name, c in known.get("classes", {}).items()}
        splits = tuple(split["name"] for split in info.get("splits", ()))
        return Description(splits, info.get("fileFormat", "tfrecord"), modalities, classes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{root}: not a data set as TFDS writes it ({type(e).__name__}: {e}). Build it anew") from e


def _classes(found: dict[str, Any]) -> Classes:
    colors, void = found["colors"], found["ignore_color"]
    return Classes(
        tuple(found["names"]),
        None if colors is None else np.array(colors, np.uint8),
        found["ignore"],
        found["swap"],
        None if void is None else tuple(void),
    )


def find(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a prepared data set, the one with ``dataset_info.json``.

    Args:
      path: that folder, or one above it that leads to no other data set (of several versions the newest counts); or
        ``NAME``, ``NAME/CONFIG``, each perhaps with ``:VERSION``, in ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

    Raises:
      UserError: there is none, or there are several: lists those that there are.
    """
    folder = pathlib.Path(path).expanduser()
    if os.path.isdir(folder):  # False of a path that is too long, too
        return _newest(folder, str(path))
    home = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    name, _, version = str(path).partition(":")
    plain = re.fullmatch(r"\w+(/\w[\w.-]*)?", name) and re.fullmatch(r"[\w.]*", version)
    if plain and os.path.isdir(home / name / version):
        return _newest(home / name / version, str(path))
    if plain and version and os.path.isdir(home / name):
        raise UserError(f"{path}: {home / name} has no version {version}; found {few(sorted(os.listdir(home / name)))}")
    if name.split("/")[0] in LAYOUTS:
        layout = LAYOUTS[name.split("/")[0]]
        raise UserError(
            f"{path}: not built in {home}. Build it by python -m mcm_jax.data.tfds build {layout.name} "
            f"--manual_dir=DOWNLOADS (from {layout.page}), or name the folder that it was built into"
        )
    there = sorted({p.relative_to(home).parts[0] for p in prepared(home)}) if os.path.isdir(home) else []
    raise UserError(
        f"{path}: no folder, and no data set of TFDS that is known. In {home} there are: {', '.join(there) or 'none'}; "
        f"python -m mcm_jax.data.tfds can build: {', '.join(LAYOUTS)}"
    )


def _newest(folder: pathlib.Path, path: str) -> pathlib.Path:
    found = prepared(folder)
    if not found:
        raise UserError(
            f"{path}: there is no data set of TFDS in this folder (no {_INFO}). python -m mcm_jax.data.tfds build "
            f"makes one; a folder of pairs is data.name=folder"
        )
    parents = sorted({str(p.parent.relative_to(folder)) for p in found}) if found != [folder] else []
    if len(parents) > 1:
        raise UserError(f"{path}: there are several data sets in this folder, {', '.join(parents)}. Name one of them")
    return max(found, key=lambda p: tuple(int(n) for n in re.findall(r"\d+", p.name)))


def prepared(folder: pathlib.Path) -> list[pathlib.Path]:
    """Data sets at most three below a folder, NAME/CONFIG/VERSION; unfinished ones left out."""
    found = (p.parent for depth in range(4) for p in folder.glob("*/" * depth + _INFO))
    return sorted(p for p in found if not p.name.startswith("incomplete."))
