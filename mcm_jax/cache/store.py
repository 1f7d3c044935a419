"""The files of a cache: shards, the manifest that vouches for them, and the lock of whoever builds."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tqdm import tqdm

from mcm_jax import files
from mcm_jax.base import BaseCard
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
BUILDING = "building.json"
"""What stands in the manifest's place while a cache is built: the same, without its shards."""

JOURNAL = "building-{}.jsonl"
"""One line for each shard that is written, by each process that builds."""

HELD_OUT = "held_out"
"""A cache within a cache: of held-out examples, whose loss a training watches, and with its number in newer ones."""

_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_DTYPES = {
    **{"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)},
    **{"I32": np.dtype(np.int32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8)},
}
_HEADER = 2**20  # bytes that a header has at most; ours have under 1000
_SHOWN = 8
REPAIR = "Run precompute.py with the config that the cache was made with: it rebuilds these alone"


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache is.

    Attributes:
      made_of: what every value in it follows from, as texts: fingerprints of base, schedule and data, the settings of
        preprocessing and draws, the storage type, the format's version. Two caches with the same are the same.
      base: a :class:`mcm_jax.base.BaseCard` as JSON.
      stamps: of the files of ``base`` and ``data`` as they were: with the same stamp they need not be read again.
      examples: how many.
      views: V.
      draws: K.
      shard_examples: examples in each shard but the last.
      versions: of the packages that built it, for the record.
      shards: bytes and SHA-256 by file name; ``skipped``, where there are any: examples that could not be read when it
        was built, in whose places others are (:mod:`mcm_jax.data.unreadable`).
    """

    made_of: dict[str, str]
    base: dict[str, Any]
    stamps: dict[str, str]
    examples: int
    views: int
    draws: int
    shard_examples: int
    versions: dict[str, str]
    shards: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of `made_of`."""
        return fingerprint(self.made_of)

    @functools.cached_property
    def card(self) -> BaseCard:
        """`base`, as an object."""
        return BaseCard.from_json(self.base)

    @property
    def data(self) -> dict[str, str]:
        """The fingerprints of the data, out of `made_of`."""
        return {key.removeprefix("data."): v for key, v in self.made_of.items() if key.startswith("data.")}

    @property
    def shard_count(self) -> int:
        """Shards of a complete cache."""
        return -(-self.examples // self.shard_examples)

    def rows(self, number: int) -> range:
        """The examples of a shard."""
        return range(number * self.shard_examples, min((number + 1) * self.shard_examples, self.examples))

    @property
    def skipped(self) -> list[int]:
        """Examples that could not be read when the cache was built."""
        return sorted(i for shard in self.shards.values() for i in shard.get("skipped", ()))

    def write(self, path: pathlib.Path) -> None:
        """Writes it with its own checksum."""
        content = {"format": FORMAT, "fingerprint": self.fingerprint, **dataclasses.asdict(self)}
        content["sha256"] = _digest(content)
        write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def find(cls, folder: pathlib.Path) -> "Manifest | None":
        """The manifest of a cache, complete or not (then it names no shards); None where there is nothing yet."""
        paths = [folder / name for name in (MANIFEST, BUILDING) if (folder / name).is_file()]
        return cls.read_file(paths[0]) if paths else None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Manifest":
        """Reads a complete cache's.

        Raises:
          UserError: there is no cache, it is not complete, or the manifest is damaged or of another version.
        """
        folder = pathlib.Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / BUILDING).is_file():
                total = cls.read_file(folder / BUILDING).shard_count
                done = len(written_shards(folder))
                raise UserError(
                    f"{folder}: the cache is not complete ({done} of {total} shards). Go on with the same "
                    f"precompute.py command, or set config.cache.mode to build"
                )
            raise UserError(
                f"{folder}: there is no cache (no {MANIFEST}). Make one with precompute.py and the same config, or set "
                f"config.cache.mode to build"
            )
        return cls.read_file(path)

    @classmethod
    def read_file(cls, path: pathlib.Path) -> "Manifest":
        """Reads a manifest, complete or not, by its own path; raises UserError where it is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, digest = content.pop("format"), content.pop("sha256")
            if version != FORMAT:
                raise UserError(
                    f"{path}: found a cache of format {version}, this version of mcm-jax reads format {FORMAT}. Build "
                    f"it again in another folder (config.cache.path)"
                )
            if digest != _digest({"format": version, **content}):
                raise ValueError("its checksum does not fit its content")
            del content["fingerprint"]
            manifest = cls(**content)
            BaseCard.from_json(manifest.base)
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise UserError(
                f"{path}: damaged, or not written by mcm-jax ({e}). Remove the folder {path.parent} and build the "
                f"cache again"
            ) from e
        if odd := [name for name in manifest.shards if not _SHARD.fullmatch(name)]:
            raise UserError(f"{path}: names a file that is no shard: {odd[0]!r}")  # nothing outside the folder is read
        return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(made_of: Mapping[str, str]) -> str:
    """SHA-256, as hex, of what a cache is made of."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def differences(there: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """A line for each key of two ``made_of`` whose value is not the same."""
    keys = sorted(there.keys() | wanted.keys())
    return [
        f"  {key}: there {_short(there.get(key, 'absent'))}, wanted {_short(wanted.get(key, 'absent'))}"
        for key in keys
        if there.get(key) != wanted.get(key)
    ]


def _short(value: str) -> str:
    return value[:16] if re.fullmatch("[0-9a-f]{64}", value) else value


def written_shards(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What the journals of an unfinished cache say; a line that a kill has torn does not count."""
    found = {}
    for journal in sorted(folder.glob(JOURNAL.format("*"))):
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                if _SHARD.fullmatch(entry["shard"]):
                    kept = {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                    if "skipped" in entry:
                        kept["skipped"] = [int(i) for i in entry["skipped"]]
                    found[entry["shard"]] = kept
    return found


def write_shard(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes a shard whole or not at all (raises OSError); returns its size and checksum."""
    data = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    write_atomically(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_header(path: pathlib.Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Each tensor's dtype, shape and the byte of the file that it begins at.

    Raises:
      UserError: this is no safetensors file whose tensors lie within it.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _HEADER:
                raise ValueError(f"a header of {length} bytes")
            content = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        content.pop("__metadata__", None)
        found = {}
        for name, entry in content.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            begin, end = entry["data_offsets"]
            sound = min(begin, *shape, 0) == 0 and end - begin == dtype.itemsize * int(np.prod(shape))
            if not sound or 8 + length + end > size:
                raise ValueError(f"tensor {name!r} does not lie within the file")
            found[name] = (dtype, shape, 8 + length + begin)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: damaged, or not a shard of a cache ({e}). Let precompute.py rebuild it") from e
    return found


def verify(folder: pathlib.Path, shards: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Reads shards and compares their checksums, at about the disk's speed; shows a bar where that takes a while.

    Args:
      folder: of the cache.
      shards: bytes and SHA-256 by file name.

    Returns:
      What is wrong with each shard that is not as it was written, by name; nothing for a whole cache.
    """

    def check(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
        name, expected = item
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return name, f"{size:,} bytes, expected {expected['bytes']:,}: cut off or overwritten"
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                return name, f"SHA-256 {digest[:16]}, expected {expected['sha256'][:16]}: bits have changed"
        except FileNotFoundError:
            return name, "missing"
        except OSError as e:
            return name, f"cannot be read ({e.strerror or e})"
        return name, ""

    wrong, total = {}, sum(shard["bytes"] for shard in shards.values())
    with (
        concurrent.futures.ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool,
        tqdm(total=total, desc="verifying", unit="B", unit_scale=True, disable=total < 2**30) as bar,
    ):
        for (name, problem), expected in zip(pool.map(check, shards.items()), shards.values(), strict=True):
            if problem:
                wrong[name] = problem
            bar.update(expected["bytes"])
    return wrong


def describe_damage(folder: pathlib.Path, wrong: Mapping[str, str], total: int) -> str:
    """What is wrong with a cache, for people."""
    lines = [f"  {name}: {problem}" for name, problem in list(wrong.items())[:_SHOWN]]
    more = [f"  ... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    listed = "\n".join(lines + more)
    return f"{folder}: {len(wrong)} of {total} shards are damaged:\n{listed}"


_OURS = re.compile(rf"(?:{_SHARD.pattern}|(?:manifest|building)\.json|building-\d+\.jsonl)(?P<unfinished>\.tmp)?")


def clutter(folder: pathlib.Path) -> Collection[str]:
    """Files in a folder that no cache has."""
    known = re.compile(rf"{HELD_OUT}(-\d+)?")
    names = (p.name for p in folder.iterdir() if not p.name.startswith("."))
    return sorted(name for name in names if not (_OURS.fullmatch(name) or known.fullmatch(name)))


def leftovers(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of a cache that a process which was killed has not finished."""
    return [p for p in folder.iterdir() if (found := _OURS.fullmatch(p.name)) and found["unfinished"]]


def lock(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Holds a folder for one builder. Raises UserError where another process holds it."""
    return files.lock(folder, "building this cache", "config.cache.path")
