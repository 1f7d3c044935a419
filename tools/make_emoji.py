"""Makes the shipped data set ``emoji`` from the SVGs of Noto Emoji: ``mcm_jax/assets/emoji/emoji.zip``.

    npm pack @iconify-json/noto@1.2.9
    pip install resvg-py==0.5.0
    python tools/make_emoji.py --package=iconify-json-noto-1.2.9.tgz --out=mcm_jax/assets/emoji/emoji.zip

About 6 minutes on 2 CPU cores. The package is Google's Noto Emoji under Apache-2.0, as is what is made of it. Each SVG
is rendered on white at 512x512 by resvg, and from that picture come, by the rules below,

- the image: the mean of 8x8 pixels, 64x64;
- segmentations of 32x32 and of 64x64: each pixel at 512x512 has the class of the nearest colour of the palette, in
  CIELAB (:func:`mcm_jax.data.emoji.classes_of`); each cell of the grid has the class of the largest area in it;
- sketches of 32x32 and of 64x64: the edges between colours, one pixel thin (:func:`edges`), of the picture at eight
  times the grid's resolution, brought to the grid as :class:`mcm_jax.modalities.Modality` of kind ``lines`` brings any
  line drawing. So a small drawing has fewer lines than a large one.

Signs, letters and flags are left out; a figure with skin tones is there without one and with one; of a group (the same
emoji in another tone, hair, gender, colour or direction, :func:`group_of`) at most six are there. A group is held out
as a whole, by a hash of its name.
"""

import argparse
import concurrent.futures
import hashlib
import io
import itertools
import json
import pathlib
import re
import tarfile
import zipfile

import numpy as np
import resvg_py
from PIL import Image
from scipy import ndimage

from mcm_jax.data.colours import to_lab
from mcm_jax.data.emoji import CLASSES, COLUMNS, PALETTE, SIZES, SPLITS, classes_of
from mcm_jax.modalities import Modality

RECIPE = {
    "source": "Noto Emoji by Google, https://github.com/googlefonts/noto-emoji",
    "licence": "Apache-2.0",
    "package": "@iconify-json/noto 1.2.9 of npm",
    "renderer": "resvg-py 0.5.0 of PyPI",
    "rendered_at": 512,
    "margin": "4 of 128 units on each side",
    "left_out": ["hidden", "Symbols", "Flags"],
    "most_of_a_group": 6,
    "held_out": 0.11,
    "sketch": {"blur": 2.5, "low": 6, "high": 15, "shortest": 24},
    "palette": {name: "#" + bytes(colour).hex() for name, colour in zip(CLASSES, PALETTE, strict=True)},
}
_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)-skin-tone")
# Words in which variants of one emoji differ.
_VARIED = """
man woman person men women people boy girl adult child baby old older and bald beard curly hair face facing left right
leftwards rightwards up down upwards downwards front oncoming large small medium light dark red orange yellow green blue
purple pink brown black white grey blond closed open raised lowered
"""
# Variants that words do not tell.
_KIN = (
    (re.compile(r"oclock|-thirty$"), "clock"),
    (re.compile(r"moon(-face)?$"), "moon"),
    (re.compile(r"^mer(maid|man|person)$"), "merperson"),
    (re.compile(r"^prince(ss)?$"), "prince"),
    (re.compile(r"claus$"), "claus"),
    (re.compile(r"^globe-showing"), "globe"),
    (re.compile(r"mailbox"), "mailbox"),
    (re.compile(r"-(evil-)?monkey$"), "monkey"),
)


def group_of(name: str) -> str:
    """The group of an emoji's name: what is left of it without the words in which variants differ."""
    name = _TONE.sub("", name)
    for pattern, group in _KIN:
        if pattern.search(name):
            return group
    return "-".join(word for word in name.split("-") if word not in _VARIED.split()) or "person"


def split_of(group: str) -> str:
    """``test`` for a share of the groups, by their names alone."""
    return "test" if _hash(group) < RECIPE["held_out"] else "train"


def caption_of(name: str) -> str:
    """The name in words: ``woman firefighter, medium skin tone``."""
    tones = list(dict.fromkeys(_TONE.findall(name)))
    words = _TONE.sub("", name).replace("-", " ")
    return words + (f", {' and '.join(t.replace('-', ' ') for t in tones)} skin tone" if tones else "")


def _hash(text: str) -> float:
    """Uniform in [0, 1), the same for the same text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def choose(icons: dict[str, dict], categories: dict[str, list[str]]) -> list[str]:
    """Names of the emoji that are in the data set, by groups."""
    allowed = itertools.chain(*(names for c, names in categories.items() if c not in RECIPE["left_out"]))
    names = sorted({n for n in allowed if n in icons and not icons[n].get("hidden")})
    tones: dict[str, list[str]] = {}
    for name in names:
        if _TONE.search(name):
            tones.setdefault(_TONE.sub("", name), []).append(name)
    plain = [n for n in names if not _TONE.search(n)]
    groups: dict[str, list[str]] = {}
    for name in plain + [min(variants, key=_hash) for variants in tones.values()]:
        groups.setdefault(group_of(name), []).append(name)
    chosen = [sorted(sorted(g, key=_hash)[: RECIPE["most_of_a_group"]]) for _, g in sorted(groups.items())]
    return list(itertools.chain(*chosen))


def render(body: str) -> np.ndarray:
    """An SVG's content of 128x128 units, with a margin, on white: uint8 ``[512, 512, 3]``."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="-4 -4 136 136">{body}</svg>'
    )
    size = RECIPE["rendered_at"]
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def reduced(picture: np.ndarray, size: int) -> np.ndarray:
    """A square picture at ``size`` x ``size``, each pixel the mean of those in it: uint8 ``[size, size, 3]``."""
    cell = len(picture) // size
    return np.round(picture.reshape(size, cell, size, cell, 3).mean((1, 3))).astype(np.uint8)


def edges(picture: np.ndarray) -> np.ndarray:
    """Where colours meet, one pixel thin: bool ``[H, W]``. Shading has no edges, and short lines are left out.

    Canny's detector (1986) on CIELAB: the gradient of Di Zenzo (1986), its ridges, those above the high threshold and
    what hangs together with them above the low one. Thresholds are distances in CIELAB between two sides of an edge.
    """
    rule = RECIPE["sketch"]
    lab = to_lab(picture)
    dy, dx = (
        np.stack([ndimage.gaussian_filter(lab[..., c], rule["blur"], order, mode="nearest") for c in range(3)])
        for order in ((1, 0), (0, 1))
    )
    yy, xx, xy = (dy * dy).sum(0), (dx * dx).sum(0), (dx * dy).sum(0)
    # A step of height h has a gradient of h / (sqrt(2 pi) blur) after the blur.
    strength = np.sqrt((yy + xx + np.hypot(xx - yy, 2 * xy)) / 2) * np.sqrt(2 * np.pi) * rule["blur"]
    angle = np.arctan2(2 * xy, xx - yy) / 2  # of the steepest change
    rows, columns = np.nonzero(strength > rule["low"])
    here, step = strength[rows, columns], np.stack([np.sin(angle[rows, columns]), np.cos(angle[rows, columns])])
    before, after = (
        ndimage.map_coordinates(strength, np.stack([rows, columns]) + sign * step, order=1, mode="nearest")
        for sign in (-1, 1)
    )
    ridge = np.zeros(strength.shape, bool)
    ridge[rows, columns] = (here >= before) & (here > after)
    parts, count = ndimage.label(ridge, np.ones((3, 3)))
    if not count:
        return ridge
    strongest = ndimage.maximum(strength, parts, np.arange(count + 1))
    length = np.bincount(parts.ravel())
    kept = (strongest > rule["high"]) & (length >= rule["shortest"])
    kept[0] = False
    return kept[parts]


def largest(labels: np.ndarray, size: int) -> np.ndarray:
    """The class of the largest area in each cell of a ``size`` x ``size`` grid; the first of equals."""
    cell = len(labels) // size
    cells = labels.reshape(size, cell, size, cell)
    return np.stack([(cells == c).sum((1, 3)) for c in range(len(CLASSES))]).argmax(0).astype(np.uint8)


def example(body: str) -> dict[str, np.ndarray]:
    """An SVG's content as the pictures of the archive, uint8, by their names there."""
    picture = render(body)
    labels, sketch = classes_of(picture), Modality("sketch", "lines", 1)
    found = {"image_64": reduced(picture, 64)}
    for size in SIZES:
        found[f"segmentation_{size}"] = largest(labels, size)
        lines = 1 - edges(reduced(picture, 8 * size)).astype(np.float32)
        found[f"sketch_{size}"] = np.round(sketch.resize(lines, size, size) * 255).astype(np.uint8)
    return found


def sheet(pictures: list[np.ndarray]) -> bytes:
    """Pictures of one size side by side as a PNG, row by row; what is left of the last row is black."""
    size = len(pictures[0])
    missing = -len(pictures) % COLUMNS
    cells = np.stack([*pictures, *[np.zeros_like(pictures[0])] * missing])
    rows = cells.reshape(-1, COLUMNS, *cells.shape[1:]).swapaxes(1, 2)
    data = io.BytesIO()
    Image.fromarray(rows.reshape(-1, COLUMNS * size, *cells.shape[3:])).save(data, "PNG", optimize=True)
    return data.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=pathlib.Path, required=True, help="the .tgz of npm pack")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the archive to write")
    parser.add_argument("--processes", type=int)
    args = parser.parse_args()
    with tarfile.open(args.package) as package:
        read = lambda name: json.load(package.extractfile(f"package/{name}"))  # noqa: E731
        about, icons, categories = read("package.json"), read("icons.json")["icons"], read("metadata.json")
    found = f"{about['name']} {about['version']} of npm"
    if (found, about["license"]) != (RECIPE["package"], RECIPE["licence"]):
        parser.error(f"--package is {found}, {about['license']}; the recipe is for {RECIPE['package']}")

    names = choose(icons, categories["categories"])
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        examples = list(pool.map(example, [icons[n]["body"] for n in names], chunksize=20))
    members, counts = {}, {}
    for split in SPLITS:
        mine = [(n, e) for n, e in zip(names, examples, strict=True) if split_of(group_of(n)) == split]
        facts = [{"name": n, "group": group_of(n), "caption": caption_of(n)} for n, _ in mine]
        members[f"{split}/examples.json"] = json.dumps(facts, indent=0).encode()
        for kind in examples[0]:
            members[f"{split}/{kind}.png"] = sheet([e[kind] for _, e in mine])
        labels = np.bincount(np.stack([e["segmentation_32"] for _, e in mine]).ravel(), minlength=len(CLASSES))
        shares = (labels / labels.sum()).round(4).tolist()
        groups = len({fact["group"] for fact in facts})
        counts[split] = {"examples": len(mine), "groups": groups, "shares": dict(zip(CLASSES, shares, strict=True))}
    members["recipe.json"] = (json.dumps(RECIPE | {"counts": counts}, indent=2) + "\n").encode()
    members["LICENSE"] = pathlib.Path(__file__).parents[1].joinpath("LICENSE").read_bytes()
    members["NOTICE"] = (
        b"Pictures of Noto Emoji, Copyright Google Inc., licensed under the Apache License, Version 2.0 (LICENSE).\n"
        b"Changed by tools/make_emoji.py of mcm-jax: rendered at 64x64 on white; colour classes, line drawings and "
        b"captions were made of them and of their names.\n"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    print(json.dumps(counts, indent=2), f"{args.out}: {args.out.stat().st_size:,} bytes", sep="\n")


if __name__ == "__main__":
    main()
