"""Data sets made for ControlNet on the Hugging Face Hub: columns image, conditioning_image and text.

Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models, ICCV 2023; the columns are those of
diffusers' ``examples/controlnet/train_controlnet.py``. Read from local files by pyarrow: parquet, or what datasets'
``save_to_disk`` wrote. Images lie in them as bytes; rows that only name a file are refused, so nothing outside is read.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import ImageOps

from mcm_jax.data.folder import held_out_names
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, checked, plain_name, png, read_json
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality, PictureBytes, open_picture
from mcm_jax.modalities.files import eight_bits, over

_COLUMNS = ("image", "conditioning_image", "text")
_SPLITS = {"train": "train", "test": "test", "validation": "test"}
_PARQUET = re.compile(r"(?P<split>[A-Za-z]+)(-\d+-of-\d+.*)?\.parquet")


@dataclasses.dataclass(frozen=True)
class ControlNet(Layout):
    """Image, one condition, prompt. A validation split tests where there is no test split.

    Rows have no names: where neither is there, a hash of a row's place, by file and number, tells what is held out.

    Attributes:
      modality: what the condition is called.
      kind: of the modality.
      channels: of the modality: the condition is kept in grey with 1, in colour with 3.
      invert: whether white lines on black become black on white, as kind=lines wants them.
      held_out_share: how many of the rows test where there is neither a test nor a validation split; 0 is none.
    """

    name = "controlnet"
    page = "https://huggingface.co/datasets"
    licence = "that of the data set"
    download = """--manual_dir has train-00000-of-00001.parquet (or the folder data with it; test or validation beside),
    or is
        what datasets' save_to_disk wrote: dataset_dict.json and a folder a split, or state.json of a single one."""

    modality: str = "sketch"
    kind: str = "lines"
    channels: int = 1
    invert: bool = False
    held_out_share: float = 0.1

    def __post_init__(self):
        expect(self.channels in (1, 3), "channels", "1 or 3", self.channels)
        known = "one of pictures without transparency; take a folder of pairs for those (data.name=folder)"
        expect(self.kind not in ("labels", "sparse"), "kind", known, self.kind)
        expect(self.modality not in ("image", "caption", "name"), "modality", "another name", self.modality)
        expect(0 <= self.held_out_share < 1, "held_out_share", "at least 0 and below 1", self.held_out_share)
        Modality(self.modality, self.kind, self.channels)

    def holds(self, folder: pathlib.Path) -> Holds:
        """The condition and captions."""
        del folder
        return Holds((Modality(self.modality, self.kind, self.channels),), True)

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """By the names of files or folders."""
        found = _parquet(folder) or _saved(folder)
        if not found:
            self.need(folder, "train-*.parquet")
        if "train" not in found:
            raise UserError(f"{self.name}: {folder} has no train split, found {', '.join(sorted(found))}")
        chosen = {to: split for split, to in reversed(_SPLITS.items()) if split in found}
        names = {to: [_names(split, i, file) for i, file in enumerate(found[split])] for to, split in chosen.items()}
        if "test" not in chosen:
            all_of = itertools.chain.from_iterable(part.values() for part in names["train"])
            held_out = held_out_names(all_of, self.held_out_share)
            names["test"] = [{row: n for row, n in part.items() if n in held_out} for part in names["train"]]
            names["train"] = [{row: n for row, n in part.items() if n not in held_out} for part in names["train"]]
        files = {to: found[chosen.get(to, "train")] for to in dict.fromkeys(_SPLITS.values())}
        shards = {
            to: [functools.partial(self._read, *part) for part in zip(files[to], names[to], strict=True) if part[1]]
            for to in files
        }
        return {to: parts for to, parts in shards.items() if parts}

    def _read(self, file: pathlib.Path, names: Mapping[int, str]) -> Iterator[tuple[str, Record]]:
        """The rows of a file that have names."""
        for row, values in enumerate(_rows(file)):
            if row not in names:
                continue
            source = f"{file}, row {row}"
            record: Record = {
                "image": checked(_bytes(values["image"], f"{source}, image"), f"{source}, image"),
                self.modality: self._condition(values["conditioning_image"], f"{source}, conditioning_image"),
                "caption": _text(values["text"], source),
            }
            yield names[row], record

    def _condition(self, value: Any, source: str) -> bytes:
        data = checked(_bytes(value, source), source)
        with open_picture(PictureBytes(data, source)) as opened:
            mode = "L" if self.channels == 1 else "RGB"
            if opened.format == "PNG" and opened.mode == mode and not self.invert:
                return data
            opened = eight_bits(opened, source)
            if self.kind == "lines" and opened.has_transparency_data:
                opened = over(opened, "black" if self.invert else "white")
            converted = opened.convert(mode)
        return png(np.asarray(ImageOps.invert(converted) if self.invert else converted))


def _parquet(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Parquet files by split, as the Hub names them."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]):
        match = _PARQUET.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path}: expected SPLIT.parquet or SPLIT-00000-of-00001.parquet")
        found.setdefault(match["split"], []).append(path)
    return found


def _saved(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Arrow files by split, as save_to_disk lists them."""
    parts = {"train": folder}
    if (folder / "dataset_dict.json").is_file():
        splits = _get(read_json(folder / "dataset_dict.json"), "splits", folder / "dataset_dict.json")
        parts = {split: folder / plain_name(split, str(folder / "dataset_dict.json")) for split in splits}
    elif not (folder / "state.json").is_file():
        return {}
    found = {}
    for split, part in parts.items():
        state = part / "state.json"
        files = _get(read_json(state), "_data_files", state)
        found[split] = [part / plain_name(_get(file, "filename", state), str(state)) for file in files]
    return found


def _get(content: Any, key: str, path: pathlib.Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise UserError(f"{path}: has no {key}; expected what datasets' save_to_disk writes")
    return content[key]


def _names(split: str, number: int, file: pathlib.Path) -> dict[int, str]:
    """What the rows of a split's file are called, by their positions."""
    return {row: f"{split}-{number:05}-{row:07}" for row in range(_count(file))}


def _count(file: pathlib.Path) -> int:
    import pyarrow
    import pyarrow.parquet

    with _readable(file):
        if file.suffix == ".parquet":
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows
        return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))))


def _rows(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or Arrow file, some at a time."""
    import pyarrow
    import pyarrow.parquet

    with _readable(file):
        if file.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            _check_columns(file, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=64, columns=list(_COLUMNS))
        else:
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            _check_columns(file, reader.schema.names)
            batches = (batch.select(list(_COLUMNS)) for batch in reader)
        for batch in batches:
            for start in range(0, batch.num_rows, 64):
                yield from batch.slice(start, 64).to_pylist()


@contextlib.contextmanager
def _readable(file: pathlib.Path) -> Iterator[None]:
    """Raises UserError where the block cannot read a file."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{file}: cannot be read ({e}). Download it again") from e


def _check_columns(file: pathlib.Path, columns: list[str]) -> None:
    if missing := [column for column in _COLUMNS if column not in columns]:
        raise UserError(f"{file}: has no column {', '.join(missing)}; found {', '.join(columns)}")


def _bytes(value: Any, source: str) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UserError(
            f"{source}: expected the bytes of a picture, found {value!r:.100}. Write the data set anew with its images "
            f"embedded (datasets' save_to_disk does, and push_to_hub)"
        )
    return data


def _text(value: Any, source: str) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise UserError(f"{source}: expected a prompt in the column text, found {value!r}")
    return text
