"""What ``check`` found, to look at: tables as text, ``sheet.png``, and ``check.html``, which needs no other file."""

import base64
import csv
import dataclasses
import html
import io
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mcm_jax.data.folder import Tree
from mcm_jax.data.problems import Kind, Problem, alike, below, printable
from mcm_jax.data.reading import read_caption, read_condition, read_image
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.modalities import Modality

SIDE = 160
"""Pixels of the longer side of what is drawn."""

_GAP, _TEXT = 6, 14
_GREY, _INK, _RED = (244, 244, 244), (40, 40, 40), (190, 30, 30)
_DRAWN, _WORST = 60, 32  # examples of problems on the page, on the sheet
_OF_A_KIND = 2
_LISTED, _UNFOLDED = 6, 500  # files of one kind, before and behind a fold
_PROMPT = 160  # characters of one
_KINDS = 20  # of those that are alike
_ROWS = 24  # of a table as text
_SHARE = re.compile(r"([\d.]+)%")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of what a folder holds.

    Attributes:
      title: what it is about.
      columns: their names.
      rows: as many texts as columns; a share, ``12.3%``, is drawn as a bar on the page.
      colors: of the rows, RGB; None where they have none.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    colors: np.ndarray | None = None

    def text(self) -> str:
        """For a terminal; a long one is cut, and says so."""
        cells = [tuple(map(printable, row)) for row in (self.columns, *self.rows[:_ROWS])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
        more = [f"... and {len(self.rows) - _ROWS} more rows; --out has them all"] * (len(self.rows) > _ROWS)
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines + more)])


def draw_example(tree: Tree, name: str, modalities: Sequence[Modality]) -> list[Image.Image]:
    """An example's picture, each condition, and the first condition over the picture, at most :data:`SIDE` large.

    In the place of what is missing or cannot be read there is a crossed box.
    """
    picture = _small_picture(tree.root / "image" / tree.files["image"][name])
    drawn = [picture]
    for m in modalities:
        file = tree.files[m.name].get(name)
        drawn.append(_small_condition(tree.root / m.name / file, m, tree) if file else _crossed("none"))
    if len(drawn) > 1 and not any(d.info.get("crossed") for d in drawn[:2]):
        drawn.append(Image.blend(picture, drawn[1].resize(picture.size), 0.5))
    return drawn


def _small_picture(path: pathlib.Path) -> Image.Image:
    try:
        picture = read_image(path)
    except UserError:
        return _crossed("cannot be read")
    return picture.resize(_fitted(picture.size), Image.Resampling.LANCZOS)


def _small_condition(path: pathlib.Path, modality: Modality, tree: Tree) -> Image.Image:
    known = tree.classes.get(modality.name)
    try:
        condition = read_condition(path, modality, known)
    except UserError:
        return _crossed("cannot be read")
    width, height = _fitted(condition.shape[1::-1])
    small = modality.resize(condition, height, width)
    return Image.fromarray(np.ascontiguousarray(modality.show(small[None], known.colors if known else None)[0]))


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    """A size, at most :data:`SIDE`; what is much smaller is enlarged."""
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _crossed(text: str) -> Image.Image:
    box = Image.new("RGB", (SIDE, SIDE), _GREY)
    draw = ImageDraw.Draw(box)
    draw.line((0, 0, SIDE, SIDE), (220, 220, 220))
    draw.line((0, SIDE, SIDE, 0), (220, 220, 220))
    draw.text((SIDE / 2, SIDE / 2), text, _RED, ImageFont.load_default(20), "mm")
    box.info["crossed"] = True
    return box


def write_sheet(
    path: pathlib.Path,
    rows: Sequence[tuple[str, Sequence[Image.Image], tuple[int, int, int]]],
    columns: Sequence[str],
) -> None:
    """One picture of rows of drawings, each under its text in its colour, in a block or several side by side."""
    width, height = len(columns) * (SIDE + _GAP) + 3 * _GAP, SIDE + _GAP + _TEXT
    blocks = max(1, round((len(rows) * height / width) ** 0.5))
    deep = max(1, -(-len(rows) // blocks))
    sheet = Image.new("RGB", (blocks * width, _TEXT + 2 * _GAP + deep * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for left in range(0, sheet.width, width):
        for i, name in enumerate(columns):
            draw.text((left + 2 * _GAP + i * (SIDE + _GAP), _GAP), _ascii(name, SIDE), "grey", font)
    for r, (text, drawn, color) in enumerate(rows):
        x, y = r // deep * width + 2 * _GAP, _TEXT + 2 * _GAP + r % deep * height
        draw.text((x, y), _ascii(text, width - 3 * _GAP), color, font)
        for i, picture in enumerate(drawn):
            sheet.paste(picture, (x + i * (SIDE + _GAP), y + _TEXT + 2))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_atomically(path, data.getvalue())


def _ascii(text: str, width: int) -> str:
    """What Pillow's own font can write into a width."""
    text = text.encode("ascii", "backslashreplace").decode()
    most = width // 6
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _draw(path: str, trees: Mapping[str, Tree], modalities: Sequence[Modality]) -> list[Image.Image]:
    """:func:`draw_example` of the example that a file is of; nothing where it is of none."""
    file = pathlib.Path(path)
    stem = unicodedata.normalize("NFC", file.stem)
    for tree in trees.values():
        if stem in tree.files["image"] and file.parent.parent == tree.root:
            return draw_example(tree, stem, modalities)
    return []


def write(
    out: pathlib.Path,
    root: pathlib.Path,
    title: str,
    verdict: str,
    problems: Sequence[Problem],
    tables: Sequence[Table],
    trees: Mapping[str, Tree],
    modalities: Sequence[Modality],
    count: int,
) -> None:
    """Writes ``sheet.png``, ``check.html`` and ``problems.csv``.

    Args:
      out: the folder.
      root: what was checked; paths are shown relative to it.
      title: whose check it is.
      verdict: the last word, in a few lines.
      problems: fatal ones first.
      tables: what the folder holds.
      trees: its files, by split.
      modalities: which are drawn.
      count: examples that are drawn, the first of the training split.
    """
    examples = [(name, draw_example(trees["train"], name, modalities)) for name in trees["train"].names[:count]]
    groups, drawn = alike(problems), {}
    for kind in (kind for group in groups for kind in group[:_OF_A_KIND]):
        for path in kind.files[:_OF_A_KIND]:
            if len(drawn) < _DRAWN and path not in drawn and (pictures := _draw(path, trees, modalities)):
                drawn[path] = kind.found, pictures
    columns = ["picture", *(m.name for m in modalities), *["both"] * bool(modalities)]
    rows = [(name, pictures, _INK) for name, pictures in examples]
    worst = list(drawn.items())[:_WORST]
    rows += [(f"{pathlib.Path(p).name}: {below(found, root)}", pictures, _RED) for p, (found, pictures) in worst]
    write_sheet(out / "sheet.png", rows, columns)
    names = [m.name for m in modalities]
    for path, (found, pictures) in drawn.items():  # the page shows the condition that it is about
        own = pathlib.Path(path).parent.name
        i = 1 + (names.index(own) if own in names else 0)
        drawn[path] = found, [pictures[0], *pictures[i : i + 1]]
    page = _page(title, verdict, groups, drawn, tables, examples, root, trees)
    write_atomically(out / "check.html", page.encode())
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(("severity", "file", "problem", "fix"))
    for p in sorted(problems, key=lambda p: not p.fatal):
        writer.writerow((_severity(p.fatal), *(below(text, root) for text in (p.path, p.found, p.fix))))
    write_atomically(out / "problems.csv", lines.getvalue().encode())


# The page

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:76em;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.3em}h2{font-size:1.15em;margin:2em 0 .5em}
table{border-collapse:collapse}td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{font-weight:600;background:#f6f6f6}.numbers td:not(:first-child),.numbers th:not(:first-child){text-align:right}
.verdict{padding:.7em 1em;border-left:5px solid #2a7;background:#f2faf5;white-space:pre-wrap}
.refused{border-color:#c33;background:#fdf3f3}code,.file{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
.badge{font-size:12px;padding:.1em .6em;border-radius:1em;color:#fff;background:#a70}.FATAL{background:#c33}
img{max-width:96px;max-height:96px;margin:2px;border:1px solid #ccc;vertical-align:top}
.examples{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0}figure div{white-space:nowrap}
figcaption{font-size:13px;overflow-wrap:anywhere;width:0;min-width:100%}
.track{display:inline-block;width:7em;margin-left:.6em;text-align:left}
.bar{display:inline-block;height:.7em;background:#69c}
.swatch{display:inline-block;width:.9em;height:.9em;border:1px solid #999;margin-right:.5em;vertical-align:-.1em}
.problems img{max-width:72px;max-height:72px}.problems td:nth-child(5){white-space:nowrap}
.problems td:nth-child(2){width:24%}.problems td:nth-child(3),.problems td:nth-child(4){width:25%}
"""


def _page(
    title: str,
    verdict: str,
    groups: Sequence[Sequence[Kind]],
    drawn: Mapping[str, tuple[str, Sequence[Image.Image]]],
    tables: Sequence[Table],
    examples: Sequence[tuple[str, Sequence[Image.Image]]],
    root: pathlib.Path,
    trees: Mapping[str, Tree],
) -> str:
    refused = any(kind.fatal for group in groups for kind in group)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_safe(title)}</title><style>{_STYLE}</style>',
        f"<h1>{_safe(title)}</h1>",
        f'<div class="verdict{" refused" * refused}">{_safe(verdict, lines=True)}</div>',
    ]
    if groups:
        parts += ['<h2>Problems</h2><table class="problems"><tr><th><th>file<th>problem<th>fix<th>']
        for group in groups:
            parts += [_row(kind, drawn, root) for kind in group[:_KINDS]]
            if hidden := sum(len(kind.files) for kind in group[_KINDS:]):
                parts.append(f'<tr><td><td colspan="4">... and {hidden:,} more files like these: see problems.csv')
        parts.append("</table>")
    parts.append("<h2>Examples</h2><p>The picture, its conditions, and the first of them over the picture: they must")
    parts.append('show the same thing, the same way round.</p><div class="examples">')
    for name, pictures in examples:
        caption = _safe(name) + _prompt(trees, name)
        parts.append(f"<figure><div>{''.join(map(_img, pictures))}</div><figcaption>{caption}</figcaption></figure>")
    parts.append("</div>")
    parts += [_html_table(t) for t in tables]
    return "\n".join([*parts, "</html>\n"])


def _prompt(trees: Mapping[str, Tree], name: str) -> str:
    tree = trees["train"]
    text = tree.prompts.get(name, "")
    if file := tree.files.get("caption", {}).get(name):
        try:
            text = read_caption(tree.root / "caption" / file)
        except UserError:
            return ""
    return f"<br><i>{_safe(textwrap.shorten(text, _PROMPT))}</i>" if text else ""


def _row(kind: Kind, drawn: Mapping[str, tuple[str, Sequence[Image.Image]]], root: pathlib.Path) -> str:
    files = [f'<div class="file">{_safe(below(file, root))}</div>' for file in kind.files]
    shown = "".join(files[:_LISTED])
    if more := files[_LISTED:_UNFOLDED]:
        cut = f"<div>and {len(files) - _UNFOLDED:,} more: see problems.csv</div>" * (len(files) > _UNFOLDED)
        shown += f"<details><summary>{len(files) - _LISTED:,} more</summary>{''.join(more)}{cut}</details>"
    pictures = "".join(_img(p) for file in kind.files[:_OF_A_KIND] if file in drawn for p in drawn[file][1])
    severity = _severity(kind.fatal)
    texts = "".join(f"<td>{_safe(below(text, root))}" for text in (kind.found, kind.fix))
    return f'<tr><td><span class="badge {severity}">{severity}</span><td>{shown}{texts}<td>{pictures}'


def _html_table(t: Table) -> str:
    head = "".join(f"<th>{_safe(c)}" for c in t.columns)
    rows = []
    for i, row in enumerate(t.rows):
        cells = [_safe(cell) for cell in row]
        if t.colors is not None and i < len(t.colors):
            color = "#" + bytes(t.colors[i].tolist()).hex()
            cells[0] = f'<span class="swatch" style="background:{color}"></span>{cells[0]}'
        cells[1:] = [c + _bar(text) for c, text in zip(cells[1:], row[1:], strict=True)]
        rows.append("<tr><td>" + "<td>".join(cells))
    return f'<h2>{_safe(t.title)}</h2><table class="numbers"><tr>{head}{"".join(rows)}</table>'


def _bar(text: str) -> str:
    share = _SHARE.fullmatch(text)
    return f'<span class="track"><span class="bar" style="width:{float(share[1]):.0f}%"></span></span>' if share else ""


def _img(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85)
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _safe(text: str, lines: bool = False) -> str:
    return html.escape("\n".join(map(printable, text.split("\n"))) if lines else printable(text))


def _severity(fatal: bool) -> str:
    return "FATAL" if fatal else "warning"
