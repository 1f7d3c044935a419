"""Where a config enters and becomes settings: frozen dataclasses, each beside the code that uses it.

A section of a config is such a dataclass: its fields are the section's keys, its defaults their defaults, its checks
stand in ``__post_init__``. This module turns a ConfigDict or a workdir's ``config.json`` into any of them and back, and
knows no section by name. Nothing else of the package sees a ConfigDict.

* A field whose type is a dataclass is a section within.
* A field of type ``tuple[D, ...]``, D a dataclass with a ``name``, takes every key that is no field: one D each.
* A key that a config lacks is younger than it. It takes the default, or what :func:`setting` says that runs did before
  there was the key.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically

FILE = "config.json"
_ALL_KEYS = "docs/config.md lists every key with its meaning"
_BEFORE = "before"

T = TypeVar("T")


def setting(default: Any, *, before: Any, repr: bool = True) -> Any:
    """A dataclass's field whose default is not what runs did when they had no such key.

    Args:
      default: of new runs.
      before: for a config that lacks the key.
      repr: whether it is part of the section's repr, which names of caches are made of.
    """
    return dataclasses.field(default=default, metadata={_BEFORE: before}, repr=repr)


def read(cls: type[T], config: Mapping[str, Any], *, where: str = "config", others: bool = False) -> T:
    """The settings that a config describes.

    Args:
      cls: a dataclass of settings.
      config: ConfigDict or dict, with a dict for each section.
      where: how messages call it.
      others: whether it may hold what `cls` does not have.

    Raises:
      UserError: a key that is missing, unknown, of the wrong type or out of range: names it, what was found and what is
        expected.
    """
    fields, types_of = _fields(cls)
    rest = next((name for name, kind in types_of.items() if _named(kind)), None)
    values = {}
    unknown = sorted(str(key) for key in config if key not in fields or key == rest)
    if rest:
        kind = typing.get_args(types_of[rest])[0]
        values[rest] = tuple(_read_named(kind, name, config[name], f"{where}.{name}") for name in unknown)
    elif unknown and not others:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(fields)} ({_ALL_KEYS})")
    missing = [name for name in fields if name not in config and name != rest]
    before = {name: fields[name].metadata[_BEFORE] for name in missing if _BEFORE in fields[name].metadata}
    # A key that is missing is younger than the config; a section that always was is not.
    always = [n for n in missing if dataclasses.is_dataclass(types_of[n]) and n not in before]
    if always:
        names = [f"{name}.{key}".rstrip(".") for name in always for key in _keys(types_of[name])]
        raise UserError(f"the {where} lacks {', '.join(names)}; start from configs/default.py, which has every key")
    values |= before
    for name in fields.keys() - {rest} - set(missing):
        values[name] = _value(types_of[name], config[name], f"{where}.{name}")
    try:
        return cls(**values)
    except UserError as e:
        raise UserError(f"{where}.{e}") from e


def override(
    cls: type, config: Mapping[str, Any] | ml_collections.ConfigDict, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """A config with some keys changed, as dicts; :func:`read` says whether their values are right.

    Args:
      cls: the dataclass of settings that it is a config of.
      config: stays as it is.
      changes: values by dotted keys, e.g. ``{"train.steps": 100}``. Mappings and named sections take any name, whether
        the config has it or not.

    Raises:
      UserError: a key that no config has.
    """
    tree = given(config)
    for key, value in changes.items():
        *sections, name = key.split(".")
        if not _has(cls, [*sections, name]):
            near = difflib.get_close_matches(key, flatten(cls()), n=1)
            raise UserError(f"config.{key}: unknown key{f', meant {near[0]}?' if near else ''} ({_ALL_KEYS})")
        functools.reduce(lambda section, part: section.setdefault(part, {}), sections, tree)[name] = value
    return tree


def default(cls: type) -> ml_collections.ConfigDict:
    """The config of a dataclass's defaults, which a config file then changes."""
    config = _Section(_plain(cls(), tuples=True))
    for name, kind in _fields(cls)[1].items():
        if dataclasses.is_dataclass(kind):
            texts = [key for key, of in _fields(kind)[1].items() if typing.get_origin(of) is Mapping]
            if texts:
                config[name] = _Section(config[name].to_dict())
            for key in texts:
                config[name][key] = _Texts(config[name][key].to_dict())
    return config


def undecided(cls: type) -> ml_collections.ConfigDict:
    """A section of which a config leaves open what it holds: any name's keys may be set one by one.

    Args:
      cls: a dataclass with a field of type ``tuple[D, ...]``, whose names are not known beforehand. The others have
        their defaults.
    """
    fields, types_of = _fields(cls)
    rest = next(name for name, kind in types_of.items() if _named(kind))
    plain = _plain(cls(), tuples=True)
    section = _Undecided({name: plain[name] for name in fields if name != rest})
    kind = typing.get_args(types_of[rest])[0]
    object.__setattr__(section, "_keys_of", {k: t for k, t in _fields(kind)[1].items() if k != "name"})
    return section


class _Section(ml_collections.ConfigDict):
    """A section whose mappings of texts stay such where a config sets them, or what they are in, as a whole."""

    def __setitem__(self, key: str, value: Any) -> None:
        there = self._fields.get(key)
        if isinstance(there, _Section) and isinstance(value, Mapping | ml_collections.ConfigDict):
            value = there.filled(value)
        super().__setitem__(key, value)

    def filled(self, values: Mapping[str, Any] | ml_collections.ConfigDict) -> "_Section":
        """Another one of the same kind."""
        made = type(self)(dict(values))
        for key, there in self._fields.items():
            if isinstance(there, _Section) and key in made:
                made._fields[key] = there.filled(made._fields[key])
        return made


class _Texts(_Section):
    """A mapping of texts, empty where nobody has set a name's."""

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields and "." not in key and not key.startswith("_"):
            self[key] = ""
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        with self.unlocked():
            super().__setitem__(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._fields else default


class _Undecided(ml_collections.ConfigDict):
    """Makes the section of a name when it is first asked for, its keys of their types and without values."""

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields and "." not in key and not key.startswith("_"):
            keys = object.__getattribute__(self, "_keys_of")
            with self.unlocked():
                self[key] = {name: ml_collections.config_dict.placeholder(kind) for name, kind in keys.items()}
        return super().__getitem__(key)


def given(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as dicts, without keys that have no value and names of which nothing is said."""
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            section = given(value)
            if section or not len(value):
                found[key] = section
        elif value is not None:
            found[key] = value
    return found


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as ``config.json`` has them: :func:`read` gives them back."""
    return _plain(settings, tuples=False)


def flatten(settings: Any) -> dict[str, Any]:
    """``{"train.steps": 100, ...}`` of settings or of a config; tuples become lists."""
    return _flat(settings if isinstance(settings, Mapping | ml_collections.ConfigDict) else to_dict(settings))


def load(cls: type[T], folder: str | os.PathLike, *, others: bool = False) -> T:
    """Reads the settings of a workdir, of whatever version.

    Args:
      cls: which.
      folder: the workdir.
      others: whether `cls` is a part of them.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, so {str(folder)!r} is no workdir of a training run. "
            f"Make one with train.py --config=... --workdir={folder}"
        )
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"found a {type(content).__name__}, expected sections")
        return read(cls, content, others=others)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as e:
        raise UserError(f"{path}: not a config that train.py wrote ({e})") from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def save(settings: Any, folder: pathlib.Path) -> None:
    """Writes settings into a workdir; the file is replaced whole."""
    write_atomically(folder / FILE, (json.dumps(to_dict(settings), indent=2, sort_keys=True) + "\n").encode())


def describe(cls: type) -> dict[str, str]:
    """What each field of a dataclass means, as the ``Attributes`` of its docstring say."""
    text = re.split(r"\n *Attributes:\n", cls.__doc__ or "", maxsplit=1)[-1]
    indent = re.match(" *", text)[0]
    entries = re.findall(rf"^{indent}(\w+): (.+(?:\n{indent} +.+)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


@functools.cache
def _fields(cls: type) -> tuple[dict[str, dataclasses.Field], dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    return fields, {name: hints[name] for name in fields}


def _keys(kind: Any) -> list[str]:
    """The keys of a section; of a value, one empty name."""
    return list(_fields(kind)[0]) if dataclasses.is_dataclass(kind) else [""]


def _named(kind: Any) -> bool:
    """Whether a type is a tuple of dataclasses, whose names are keys."""
    return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0])


def _is_mapping(kind: Any) -> bool:
    origin = typing.get_origin(kind)
    return origin is not None and issubclass(origin, Mapping)


def _has(kind: Any, parts: Sequence[str]) -> bool:
    """Whether a type has the key of these parts, and it holds a value: no section, no mapping."""
    if not parts:
        return not (dataclasses.is_dataclass(kind) or _is_mapping(kind))
    if not dataclasses.is_dataclass(kind):
        return _is_mapping(kind) and len(parts) == 1
    types_of = _fields(kind)[1]
    rest = next((name for name, of in types_of.items() if _named(of)), None)
    if parts[0] in types_of.keys() - {rest}:
        return _has(types_of[parts[0]], parts[1:])
    return rest is not None and _has(typing.get_args(types_of[rest])[0], parts[1:])


def _read_named(kind: Any, name: str, entry: Any, where: str) -> Any:
    known = {key: field for key, field in _fields(kind)[0].items() if key != "name"}
    wanted = [key for key, field in known.items() if field.default is dataclasses.MISSING]  # others may be younger
    if not isinstance(entry, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{where}: unknown key, or not a section of {' and '.join(wanted)}, got {entry!r}")
    if not set(wanted) <= set(entry) <= set(known):
        more = "".join(f", may have {key}" for key in known if key not in wanted)
        raise UserError(f"{where} must have {' and '.join(wanted)}{more}, got {dict(entry)} ({_ALL_KEYS})")
    types_of = _fields(kind)[1]
    values = {key: _value(types_of[key], entry[key], f"{where}.{key}") for key in entry}
    try:
        return kind(name=name, **values)
    except UserError as e:
        raise UserError(f"{where.rpartition('.')[0]}.{e}") from e


def _value(kind: Any, found: Any, where: str) -> Any:
    """A config's value as a field's type has it. Raises UserError where it is of another."""

    def refuse(expected: str) -> typing.NoReturn:
        raise UserError(f"{where} must be {expected}, got {found!r}")

    if dataclasses.is_dataclass(kind):
        if not isinstance(found, Mapping | ml_collections.ConfigDict):
            refuse(f"a section with {', '.join(_fields(kind)[0])}")
        return read(kind, found, where=where)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if isinstance(found, str) or not isinstance(found, list | tuple):
            refuse("a list")
        return tuple(_value(typing.get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(found))
    if _is_mapping(kind):
        if not isinstance(found, Mapping | ml_collections.ConfigDict):
            refuse("a section")
        return {str(k): _value(typing.get_args(kind)[1], v, f"{where}.{k}") for k, v in found.items()}
    if kind is bool:
        return found if isinstance(found, bool) else refuse("True or False")
    if kind is str:
        return found if isinstance(found, str) else refuse("a text")
    if isinstance(found, bool) or not isinstance(found, int | float):
        refuse("a whole number" if kind is int else "a number")
    if kind is int:
        return found if isinstance(found, int) else refuse("a whole number")
    try:
        value = float(found)
    except OverflowError:  # a whole number of hundreds of digits
        refuse("finite")
    return value if math.isfinite(value) else refuse("finite")


def _plain(value: Any, *, tuples: bool) -> Any:
    if dataclasses.is_dataclass(value):
        out = {}
        for f in dataclasses.fields(value):
            if _named(_fields(type(value))[1][f.name]):
                for entry in getattr(value, f.name):
                    section = _plain(entry, tuples=tuples)
                    out[section.pop("name")] = section
            else:
                out[f.name] = _plain(getattr(value, f.name), tuples=tuples)
        return out
    if isinstance(value, Mapping | types.MappingProxyType):
        return {k: _plain(v, tuples=tuples) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) and not tuples else value


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
