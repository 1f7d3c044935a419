"""``classes.json``: names and colours of a folder's label classes, what means unknown, and what mirroring exchanges.

::

    {"classes": [{"name": "sky", "color": [135, 206, 235]}, {"name": "left_eye", "color": [255, 0, 0]}, ...],
     "ignore": 255,
     "ignore_color": [0, 0, 0],
     "swap": {"left_eye": "right_eye"}}

The position of a class is its value in greyscale and palette PNGs. All but ``classes`` and ``name`` may be left out.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically

FILE = "classes.json"
_KEYS = ("classes", "ignore", "ignore_color", "swap")
_MOST_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is known of the classes of a modality of labels.

    Attributes:
      names: of each class, all different; the position is the class.
      colors: uint8 ``[classes, 3]``, RGB, all different; None where the file gives none.
      ignore: the value that is no class but means unknown; -1 for none.
      swap: by name, which class a mirrored picture shows in a class's place: both ways.
      ignore_color: RGB of pixels that are unknown, read as :attr:`ignore`; None for none.
    """

    names: tuple[str, ...]
    colors: np.ndarray | None = None
    ignore: int = -1
    swap: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore_color: tuple[int, int, int] | None = None

    @property
    def mirrored(self) -> np.ndarray:
        """int32 ``[classes]``: what each class becomes when the picture is mirrored."""
        position = {name: i for i, name in enumerate(self.names)}
        return np.array([position[self.swap.get(name, name)] for name in self.names], np.int32)


def classes_path(root: str | os.PathLike, modality: str) -> pathlib.Path | None:
    """Where the classes of a modality are described: ``MODALITY.classes.json``, else ``classes.json``, else None."""
    found = (pathlib.Path(root) / f"{modality}.{FILE}", pathlib.Path(root) / FILE)
    return next((path for path in found if os.path.isfile(path)), None)


def read_classes(path: str | os.PathLike) -> Classes:
    """Reads a ``classes.json``.

    Raises:
      UserError: it is missing, no JSON, or contradicts itself: names the file, the key and what was found.
    """
    path = pathlib.Path(path)

    def expect(holds: bool, key: str, expected: str, found: object) -> None:
        if not holds:
            raise UserError(f"{path}: {key} must be {expected}, got {_short(found)}")

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, far more than names and colours take")
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f'{path}: cannot be read ({e}). Expected JSON, {{"classes": [{{"name": "sky"}}, ...]}}') from e
    expect(isinstance(content, dict), "it", 'an object, {"classes": [...]}', content)
    strangers = sorted(content.keys() - set(_KEYS))
    expect(not strangers, "its keys", f"of {', '.join(_KEYS)}", ", ".join(strangers))
    entries = content.get("classes")
    expect(
        isinstance(entries, list) and bool(entries), "classes", 'a list of {"name": ..., "color": [r, g, b]}', entries
    )
    for i, entry in enumerate(entries):
        well = isinstance(entry, dict) and {"name"} <= entry.keys() <= {"name", "color"}
        expect(well, f"classes[{i}]", '{"name": ...} or {"name": ..., "color": [r, g, b]}', entry)
        expect(
            isinstance(entry["name"], str) and entry["name"].strip() != "",
            f"classes[{i}].name",
            "a text",
            entry["name"],
        )
    names = tuple(entry["name"] for entry in entries)
    twice = _first_repeated(names)
    expect(twice is None, "classes", "of different names", f"{twice!r} more than once")

    ignore = content.get("ignore", -1)
    well = type(ignore) is int and (ignore == -1 or len(names) <= ignore < 2**16)
    expect(well, "ignore", f"-1 for none, or a value that is no class, {len(names)}..{2**16 - 1}", ignore)

    colors = [entry["color"] for entry in entries if "color" in entry]
    without = next((entry["name"] for entry in entries if "color" not in entry), None)
    expect(not colors or without is None, "color", "given for every class or for none", f"none for {without!r}")
    for name, color in zip(names, colors, strict=False):
        expect(_is_color(color), f"color of {name!r}", "three whole numbers of 0 to 255, [r, g, b]", color)
    again = _first_repeated([tuple(color) for color in colors])
    same = [name for name, color in zip(names, colors, strict=False) if tuple(color) == again]
    expect(again is None, "color", "another one for each class", f"{again} for {' and '.join(same)}")

    void = content.get("ignore_color")
    if void is not None:
        expect(_is_color(void), "ignore_color", "three whole numbers of 0 to 255, [r, g, b]", void)
        expect(bool(colors), "ignore_color", "left out where classes have no color", void)
        expect(ignore != -1, "ignore_color", "given with ignore, the value that such pixels are read as", void)
        owner = next((name for name, color in zip(names, colors, strict=True) if color == void), None)
        expect(owner is None, "ignore_color", "no class's color", f"that of {owner!r}")

    given = content.get("swap", {})
    expect(isinstance(given, dict), "swap", "an object, {name: name}", given)
    swap: dict[str, str] = {}
    for pair in given.items():
        unknown = next((name for name in pair if name not in names), None)
        expect(unknown is None, "swap", f"of names among classes ({', '.join(names)})", unknown)
        for one, other in (pair, pair[::-1]):
            expect(swap.get(one, other) == other, "swap", f"one class for {one!r}", f"{swap.get(one)!r} and {other!r}")
            swap[one] = other
    table = np.array(colors, np.uint8) if colors else None
    return Classes(names, table, ignore, swap, tuple(void) if void is not None else None)


def write_classes(classes: Classes, root: str | os.PathLike, modality: str) -> None:
    """Writes what :func:`read_classes` gives back, as ``MODALITY.classes.json`` in a folder. Raises OSError."""
    entries = [{"name": name} for name in classes.names]
    for entry, color in zip(entries, [] if classes.colors is None else classes.colors.tolist(), strict=False):
        entry["color"] = color
    content = {"classes": entries, "ignore": classes.ignore, "swap": dict(classes.swap)}
    if classes.ignore_color is not None:
        content["ignore_color"] = list(classes.ignore_color)
    write_atomically(pathlib.Path(root) / f"{modality}.{FILE}", (json.dumps(content, indent=1) + "\n").encode())


def labels_of_colors(pixels: np.ndarray, classes: Classes, ignore: int, source: str) -> np.ndarray:
    """Classes of a picture that shows each by its colour.

    Args:
      pixels: uint8 ``[H, W, 3]``.
      classes: with colours.
      ignore: what pixels of :attr:`Classes.ignore_color` become; -1 where none may be unknown.
      source: for messages.

    Returns:
      int32 ``[H, W]``.

    Raises:
      UserError: a pixel has a colour that is no class's: names the most frequent one, how many there are, and the class
        that is nearest.
    """
    table = dict(zip(_codes(classes.colors).tolist(), range(len(classes.names)), strict=True))
    if classes.ignore_color is not None and ignore != -1:
        table[int(_codes(np.array(classes.ignore_color)))] = ignore
    found, where, counts = np.unique(_codes(pixels), return_inverse=True, return_counts=True)
    unknown = [i for i, code in enumerate(found.tolist()) if code not in table]
    if unknown:
        code = int(found[most := max(unknown, key=counts.__getitem__)])
        color = np.array([code >> 16, code >> 8 & 255, code & 255])
        nearest = int(((classes.colors.astype(int) - color) ** 2).sum(-1).argmin())
        count, others = int(counts[unknown].sum()), len(unknown) - 1
        blended = (
            " Mixed colours along the borders come from anti-aliasing, from resizing or from a JPEG: draw or save "
        )
        blended += "the map without (nearest neighbour, PNG)."
        raise UserError(
            f"{source}: {count:,} of {pixels.shape[0] * pixels.shape[1]:,} pixels have a colour that is no class's: "
            f"{color.tolist()} in {counts[most]:,} of them{f', and {others:,} other(s)' if others else ''}; the "
            f"nearest class is {classes.names[nearest]!r}, {classes.colors[nearest].tolist()}.{blended} A colour that "
            f"is a class belongs into {FILE}, one that means unknown there as ignore_color"
        )
    return np.array([table[code] for code in found.tolist()], np.int32)[where].reshape(pixels.shape[:2])


def contradicts(indices: np.ndarray, pixels: np.ndarray, classes: Classes) -> bool:
    """Whether a pixel of a palette picture has the colour of another class than its index.

    Args:
      indices: ``[H, W]``.
      pixels: their colours, uint8 ``[H, W, 3]``.
      classes: with colours.
    """
    table = {code: i for i, code in enumerate(_codes(classes.colors).tolist())}
    pairs = np.unique(_codes(pixels) << 8 | indices.astype(np.int64)).tolist()  # an index has 8 bits
    return any(table.get(pair >> 8, pair & 255) != pair & 255 for pair in pairs)


def _codes(colors: np.ndarray) -> np.ndarray:
    """Colours ``[..., 3]`` as numbers."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)


def _first_repeated(values: Any) -> Any:
    seen = set()
    return next((v for v in values if v in seen or seen.add(v)), None)


def _short(found: object) -> str:
    text = found if isinstance(found, str) else json.dumps(found)
    return text if len(text) <= 200 else f"{text[:200]}..."
