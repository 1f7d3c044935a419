"""What an evaluation writes: its numbers as tables, in a terminal, in Markdown and in one HTML file."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mcm_jax.evaluation.judges import Judge
from mcm_jax.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading, column names and rows of texts."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _get(numbers: Mapping[str, Any], path: str, row: str) -> float | None:
    name, _, key = path.partition(".")
    found = numbers.get(name, {}).get(row)
    return found.get(key) if key and found is not None else found


def _cell(result: Mapping[str, Any], path: str, row: str) -> str:
    value, around = _get(result, path, row), _get(result["interval"], path, row)
    return "" if value is None else f"{value:.3f}" + ("" if around is None else f" ± {around:.3f}")


def tables(result: Mapping[str, Any], judges: Sequence[Judge]) -> list[Table]:
    """The headline's numbers of every row, then each judge's further ones.

    Args:
      result: of :func:`mcm_jax.evaluation.evaluate.evaluate`.
      judges: that it was made with.
    """
    names = [judge.headline[0].partition(".")[0] for judge in judges] + ["diversity"]
    rows = list(dict.fromkeys(row for name in names for row in result.get(name, {})))
    paths = [path for judge in judges for path in judge.headline]
    paths += ["diversity"] if result["diversity"] else []
    expected = result["expected"]
    more = any(expected.values())
    out = [
        Table(
            "",
            ("", *paths, *(["expected"] if more else [])),
            tuple(
                (row, *(_cell(result, path, row) for path in paths), *([expected.get(row, "")] if more else []))
                for row in rows
            ),
        )
    ]
    for name, found in result.items():
        sections = [v for v in found.values() if isinstance(v, Mapping)] if isinstance(found, Mapping) else []
        if name == "interval" or not sections:
            continue
        keys = list(sections[0])
        cells = tuple((row, *(_cell(result, f"{name}.{key}", row) for key in keys)) for row in rows if row in found)
        out.append(Table(name, ("", *keys), cells))
    return out


def as_text(result: Mapping[str, Any], judges: Sequence[Judge]) -> str:
    """The first table, for a terminal."""
    table = tables(result, judges)[0]
    widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in (table.columns, *table.rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _facts(result: Mapping[str, Any]) -> list[str]:
    """What was measured with."""
    share = result["mcm_parameters"] / result["base_parameters"]
    how = [f"{n} {key if n > 1 else key[:-1]}" for key in ("maps", "seeds", "steps") for n in (result[key],)]
    how += [
        f"{key} {result[key]}" for key in ("sampler", "guidance", "text_guidance", "seed") if result[key] is not None
    ]
    around = " ± is half of a 95% interval: over seeds (Student's t)" if result["seeds"] > 1 else ""
    if result["interval"]:
        around = f"{around}, of" if around else " ± is half of a 95% interval of"
        around += " FID and KID of one seed over pictures (jackknife)."
    lines = [
        f"MCM of {result['mcm_parameters']:,} parameters ({share:.1%} of {result['base']}), trained for "
        f"{result['mcm_step']:,} steps.",
        f"{', '.join(how)}.{around}",
        *(f"{name}: {how}." for name, how in result["judges"].items()),
        f"mcm_jax {result['versions']['mcm_jax']}, jax {result['versions']['jax']}, {result['device']}.",
    ]
    undefined: dict[str, list[str]] = {}
    for path, why in result["undefined"].items():
        undefined.setdefault(why, []).append(path)
    return lines + [f"Undefined, {why}: {', '.join(paths)}." for why, paths in undefined.items()]


def write(
    folder: pathlib.Path,
    result: Mapping[str, Any],
    judges: Sequence[Judge],
    sheets: Mapping[str, str],
    title: str,
) -> None:
    """Writes ``report.md`` and ``report.html``; the second has its pictures within.

    Args:
      folder: where.
      result: of :func:`mcm_jax.evaluation.evaluate.evaluate`.
      judges: that it was made with.
      sheets: file name of each picture in the folder, with what it shows.
      title: of the report.
    """
    found, facts = tables(result, judges), _facts(result)
    lines = [f"# Evaluation of {title}", "", *(f"- {fact}" for fact in facts), ""]
    for table in found:
        lines += [f"## {table.heading}", ""] if table.heading else []
        lines += [f"| {' | '.join(table.columns)} |", "|" + " --- |" * len(table.columns)]
        lines += [f"| {' | '.join(row)} |" for row in table.rows] + [""]
    for name, said in sheets.items():
        lines += [f"![{name}]({name})", "", said, ""]
    write_atomically(folder / "report.md", "\n".join(lines).encode())

    body = [f"<h1>Evaluation of {html.escape(title)}</h1>", "<ul>", *(f"<li>{html.escape(f)}" for f in facts), "</ul>"]
    for table in found:
        body += [f"<h2>{html.escape(table.heading)}</h2>"] if table.heading else []
        body += ["<table>", "<tr>" + "".join(f"<th>{html.escape(c)}" for c in table.columns)]
        body += ["<tr>" + "".join(f"<td>{html.escape(c)}" for c in row) for row in table.rows] + ["</table>"]
    for name, said in sheets.items():
        data = base64.b64encode((folder / name).read_bytes()).decode()
        body += [f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(name)}">']
        body += [f"<figcaption>{html.escape(said)}</figcaption></figure>"]
    page = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>Evaluation of {html.escape(title)}</title>",
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "td:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}figure{margin:2em 0}</style>",
        *body,
        "</html>",
    ]
    write_atomically(folder / "report.html", "\n".join(page).encode())
