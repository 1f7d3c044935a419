"""The cells of :mod:`.run` as one table: each method at its best rate and guidance, means with 95% intervals.

python -m benchmarks.peers.table --config=scenes_sd --steps=500 --workdir=runs/peers \
    --out=benchmarks/results/peers_scenes_sd.json

Intervals are over the seeds, by Student's t. A cell that is not there is named, and never filled. Seconds of trainings
are no measurement, which :mod:`.cost` is: they may have had company.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.peers import run
from benchmarks.peers.judging import NONE
from mcm_jax.evaluation.evaluate import interval

SHOWN = {"miou": "mean IoU", "edge_f1.f1": "edge F1", "kid": "KID", "diversity": "diversity"}


def row_of(folder: pathlib.Path, seeds: int) -> dict[str, Any]:
    """What is known of a method, and which cells are missing."""
    cells, reports = run.read_cells(folder)
    scores = run.scores_of(cells)
    swept = {rate: of[0] for rate, of in scores.items()}
    refused = folder / run.REFUSED
    if not swept:
        return {"missing": [f"all: {refused.read_text().strip()}" if refused.exists() else "all"]}
    best = run.best_of(scores)
    below, above = ([r for r in swept if 0.49 < (r / best) ** sign < 0.99] for sign in (1, -1))
    missing = [f"rate {rate:.3g}" for rate, near in ((best / 2, below), (2 * best, above)) if not near]
    file = folder / run.GUIDANCE
    guidance = json.loads(file.read_text()) if file.exists() else {}
    if guidance.get("rate") != best or "best" not in guidance:
        guidance = {}
        missing.append("guidance")
    suffix = "" if guidance.get("best") in (None, str(NONE)) else f"@{guidance['best']}"
    for s in range(seeds):
        rows = reports.get((best, s), {}).get("rows", {})
        if not any(name.endswith(suffix) for name in rows):
            missing.append(f"rate {best:.3g}, seed {s}")
    row = {
        "rate": best,
        "guidance": guidance.get("best"),
        "guidances": guidance.get("scores"),
        "rates": {f"{rate:.3g}": score for rate, score in sorted(swept.items())},
        "fell_back": {f"{rate:.3g}": of for rate, of in scores.items() if not run.holds(of)},
        "parameters": cells[best, 0]["parameters"],
        "weighting": cells[best, 0].get("weighting"),
        "commits": sorted({one["commit"] for one in (*cells.values(), *reports.values()) if "commit" in one}),
        "seconds": [cells[best, s].get("seconds") for s in range(seeds) if (best, s) in cells],
        "missing": missing,
    }
    there = [reports[best, s]["rows"] for s in range(seeds) if (best, s) in reports]
    for given in dict.fromkeys(name for rows in there for name in rows):
        having, row[given] = [rows[given] for rows in there if given in rows], {}
        for number in dict.fromkeys(key for numbers in having for key in numbers):
            row[given][number] = over_seeds([numbers[number] for numbers in having if number in numbers])
    return row


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and half of the 95% interval where there are several."""
    spread = round(interval(values), 4) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "interval": spread, "seeds": len(values)}


def markdown(rows: dict[str, dict]) -> str:
    """For people; the first subset is everything."""
    keys = ([k for k in row if isinstance(row[k], dict) and "miou" in row[k] and "@" not in k] for row in rows.values())
    subsets = next(filter(None, keys), [])
    titles = ["method", "parameters", "rate", "guidance", *(f"IoU, {given}" for given in subsets)]
    titles += [f"{name}, {subsets[0]}" for key, name in SHOWN.items() if key != "miou"] if subsets else []
    titles.append("missing")
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]

    def number(row: dict, given: str, key: str) -> str:
        found = row.get(given, {}).get(key)
        if found is None:
            return "-"
        return f"{found['mean']:.3f}" + ("" if found["interval"] is None else f" +- {found['interval']:.3f}")

    for name, row in rows.items():
        if "rate" not in row:
            lines.append(f"| {name} | {' | '.join(['-'] * (len(titles) - 2))} | {'; '.join(row['missing'])} |")
            continue
        for guidance in [str(NONE), *dict.fromkeys(k.partition("@")[2] for k in row if "@" in k)]:
            given = subsets if guidance == str(NONE) else [f"{subset}@{guidance}" for subset in subsets]
            best = " (best)" * (guidance == row["guidance"])
            values = [f"{row['parameters']:,}", f"{row['rate']:.3g}", guidance + best]
            values += [number(row, one, "miou") for one in given]
            values += [number(row, given[0], key) for key in SHOWN if key != "miou"] if given else []
            values.append("; ".join(row["missing"]) or "nothing")
            lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = run.arguments()
    parser.description = __doc__
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    about = run.folder_of(args, "settings.json")
    if not about.exists():
        raise SystemExit(f"{about.parent}: nothing was run there yet; python -m benchmarks.peers.run comes first")
    rows = {name: row_of(run.folder_of(args, name), args.seeds) for name in args.methods}
    report = {"config": args.config, "steps": args.steps, "settings": json.loads(about.read_text()), "rows": rows}
    common.write_report(args.out, __doc__, report)
    print(markdown(rows))


if __name__ == "__main__":
    main()
