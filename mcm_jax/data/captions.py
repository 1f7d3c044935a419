"""The prompts of a folder's pictures: a text file each, or all in one file of JSON lines.

::

    DATA/train/caption/NAME.txt       one line each, the prompt, UTF-8
    DATA/train/captions.jsonl         {"file": "NAME.jpg", "caption": "a prompt"} a line
    DATA/train/metadata.jsonl         {"file_name": "image/NAME.jpg", "text": "a prompt"}, as Hugging Face has it
    DATA/train/image/metadata.jsonl   the same, beside the pictures

A line may hold other keys. The names in it are compared with those of the pictures and never opened.
"""

import itertools
import json
import os
import pathlib
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mcm_jax.data.problems import Problem, few

FOLDER = "caption"
BESIDE_PICTURES = "metadata.jsonl"
LINES = ("captions.jsonl", "metadata.jsonl", f"image/{BESIDE_PICTURES}")
"""Files of JSON lines, below a split."""

_NAME_KEYS, _TEXT_KEYS = ("file", "file_name", "name"), ("caption", "text")
_EXPECTED = '{"file": "NAME.jpg", "caption": "the prompt"}'
_LONG = 80  # characters of somebody else's text in a message

MOST_OF_PROMPT = 2**20
"""Characters of a prompt's file or line, other keys among them: a tokenizer reads some hundred."""

_MOST_OF_FILE = 2**30  # characters: a prompt of a hundred for each of ten million pictures; prompts stay in memory
_MOST_WRONG = 10_000  # lines that are named


def find_captions(root: pathlib.Path) -> list[pathlib.Path]:
    """Where a split's prompts are: the folder ``caption``, or files of JSON lines. More than one is too many."""
    return [path for path in (root / FOLDER, *(root / file for file in LINES)) if os.path.lexists(path)]


def read_lines(
    path: pathlib.Path, endings: tuple[str, ...], pictures: Collection[str]
) -> tuple[dict[str, str], list[Problem]]:
    """Prompts by the pictures' names without ending, out of a file of JSON lines, and what is wrong with it.

    Wrong is a line that is no JSON, lacks a key, names no picture of the folder or one that another line named, each
    named by its number; a picture without a line; and a line or a file that is far larger than prompts are, which ends
    the reading.

    Args:
      path: the file.
      endings: of pictures.
      pictures: names without ending, of those that there are.
    """
    prompts: dict[str, str] = {}
    seen: dict[str, int] = {}
    wrong = []
    try:
        for number, line in _lines(path):
            try:
                if len(wrong) == _MOST_WRONG:
                    raise _TooMuch(f"{number:,}: {len(wrong):,} lines before are wrong, the rest was not read")
                name, text = _parse(line, endings)
                if name not in pictures:
                    raise ValueError(f"there is no picture {_short(name)}")
                if name in seen:
                    raise ValueError(f"line {seen[name]} has a prompt for {_short(name)} already")
            except (ValueError, RecursionError) as e:
                wrong.append(Problem(str(path), f"line {number}: {e}", f"Expected {_EXPECTED} on each line"))
                continue
            prompts[name], seen[name] = text, number
    except _TooMuch as e:
        return {}, [*wrong, Problem(str(path), f"line {e}", f"Expected {_EXPECTED} on each line")]
    except (OSError, UnicodeDecodeError) as e:
        return {}, [Problem(str(path), f"not a text file in UTF-8 ({e})", f"Write {_EXPECTED} on each line")]
    if missing := sorted(set(pictures) - prompts.keys()):
        found = f"no line for {len(missing)} of {len(pictures)} pictures: {few(map(_short, missing))}"
        wrong.append(Problem(str(path), found, "Each picture needs its prompt: add them"))
    return prompts, wrong


class _TooMuch(Exception):
    """Reading ends: at which line, and why."""


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, by their numbers, one at a time in memory."""
    read = 0
    with path.open(encoding="utf-8-sig") as file:
        for number in itertools.count(1):
            if not (line := file.readline(MOST_OF_PROMPT + 1)):
                return
            read += len(line)
            if len(line) > MOST_OF_PROMPT:
                raise _TooMuch(f"{number:,}: has more than {MOST_OF_PROMPT:,} characters, far more than a prompt")
            if read > _MOST_OF_FILE:
                raise _TooMuch(f"{number:,}: the file has more than {_MOST_OF_FILE:,} characters until here")
            if line.strip():
                yield number, line


def _parse(line: str, endings: tuple[str, ...]) -> tuple[str, str]:
    """The picture's name without ending and the prompt of a line. Raises ValueError."""
    try:
        entry = json.loads(line)
    except ValueError as e:
        raise ValueError(f"no JSON ({e})") from e
    if not isinstance(entry, dict):
        raise ValueError(f"found {_short(line)}, which is no object")
    file = _one_of(entry, _NAME_KEYS)
    parts = file.replace("\\", "/").split("/")
    if parts[0] == "image":
        parts = parts[1:]
    if len(parts) != 1 or parts[0] in ("", ".", ".."):
        raise ValueError(f"{_short(file)} is no name of a picture in image/: names only, no paths")
    stem, ending = os.path.splitext(parts[0])
    name = unicodedata.normalize("NFC", stem if ending.lower() in endings else parts[0])
    text = " ".join(_one_of(entry, _TEXT_KEYS).split())
    if not text:
        raise ValueError(f"the prompt for {_short(name)} is empty")
    return name, text


def _one_of(entry: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = [key for key in keys if key in entry]
    if len(found) != 1:
        raise ValueError(f"found the keys {_short(', '.join(entry))}, expected one of {', '.join(keys)}")
    if not isinstance(entry[found[0]], str):
        raise ValueError(f"{found[0]} is {_short(json.dumps(entry[found[0]]))}, expected a text")
    return entry[found[0]]


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONG else f"{text[:_LONG]}...")
