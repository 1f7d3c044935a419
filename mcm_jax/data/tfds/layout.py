"""What every layout of downloads says of itself, and how its files become records."""

import abc
import concurrent.futures
import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mcm_jax.data.classes import Classes
from mcm_jax.data.problems import few
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality, PictureBytes, open_picture

Record = dict[str, bytes | str]
"""An example as it is written: ``image`` and each modality as the bytes of a picture file, ``caption`` as a text."""

Shard = Callable[[], Iterator[tuple[str, Record]]]
"""Gives the names and records of one file of a split, in order."""

_SHARD_BYTES = 128 * 2**20  # while one is written, its records are in memory
_SHARD_RECORDS = 4096
_AGAIN = "Download it again"


@dataclasses.dataclass(frozen=True)
class Holds:
    """What the examples of a data set hold besides their image.

    Attributes:
      modalities: the conditions.
      captions: whether there are prompts.
      classes: of the modalities of labels, where they are known.
      certain: whether the modalities' kinds and channels are known; else the config says them, as for a folder.
    """

    modalities: tuple[Modality, ...] = ()
    captions: bool = False
    classes: Mapping[str, Classes] = dataclasses.field(default_factory=dict)
    certain: bool = True


@dataclasses.dataclass(frozen=True)
class Layout(abc.ABC):
    """A published layout of files, and how it is read. Its fields are the options of ``build NAME``.

    Attributes:
      name: of the data set.
      page: where it is published.
      licence: what its page says of its use.
      download: which files lie where; shown where some are missing.
      counts: published examples by split; empty where it depends on the user's files.
    """

    name: ClassVar[str]
    page: ClassVar[str]
    licence: ClassVar[str]
    download: ClassVar[str]
    counts: ClassVar[Mapping[str, int]] = {}

    @abc.abstractmethod
    def holds(self, folder: pathlib.Path) -> Holds:
        """What its examples hold.

        Raises:
          UserError: a file is missing or not as published.
        """

    @abc.abstractmethod
    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """Its records by split, in their order; the arguments and errors are those of :meth:`holds`."""

    def need(self, folder: pathlib.Path, *paths: str) -> None:
        """Raises UserError, with the page and its files, where some are not in the folder."""
        if missing := [path for path in paths if not (folder / path).exists()]:
            raise UserError(
                f"{self.name}: {folder} has no {few(missing)}. From {self.page}: {' '.join(self.download.split())}"
            )


def shards(names: Sequence[str], read: Callable[[str], Record]) -> list[Shard]:
    """Splits records into files of about 128 MiB, by the size of the first; threads read them."""
    if not names:
        return []
    size = sum(map(len, read(names[0]).values()))
    count = min(max(1, _SHARD_BYTES // max(1, size)), _SHARD_RECORDS)

    def shard(part: Sequence[str]) -> Iterator[tuple[str, Record]]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            yield from zip(part, pool.map(read, part), strict=True)

    return [functools.partial(shard, names[i : i + count]) for i in range(0, len(names), count)]


def picture(path: pathlib.Path) -> bytes:
    """The bytes of a PNG, JPEG or WebP as they are: they lose nothing, and a JPEG as a PNG would be thrice as large.

    Raises:
      UserError: the file is missing or is none of these. Its pixels are not decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    return checked(data, str(path))


def checked(data: bytes, source: str) -> bytes:
    """`data`, or UserError naming `source` where they are no PNG, JPEG or WebP."""
    with open_picture(PictureBytes(data, source), _AGAIN) as opened:
        kind = opened.format
    if kind not in ("PNG", "JPEG", "MPO", "WEBP"):  # MPO: a JPEG with more behind it, of phones
        raise UserError(f"{source}: found a {kind} file, expected PNG, JPEG or WebP")
    return data


def pixels(path: pathlib.Path) -> np.ndarray:
    """The values of a grey or palette picture, ``[H, W]``; of a colour picture its grey.

    Raises:
      UserError: it cannot be read.
    """
    with open_picture(path, _AGAIN) as opened:
        return np.asarray(opened if opened.mode in ("L", "P", "1", "I;16") else opened.convert("L"))


def png(array: np.ndarray) -> bytes:
    """A uint8 array ``[H, W]`` or ``[H, W, 3]`` as a PNG."""
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    return data.getvalue()


def lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
      UserError: it is no text in UTF-8.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a text file in UTF-8 ({e})") from e


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}). Download it again") from e


def plain_name(name: object, source: str) -> str:
    """`name`, where it is a file's name and no path: one from a download must not lead out of its folder.

    Raises:
      UserError: it is not; names `source`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0:"):
        raise UserError(f"{source}: the file name {name!r} is a path, expected a plain name: nothing outside is read")
    return name
