"""A sweep that has run, as a result to keep: every trial's numbers, averaged over seeds, and each choice's best rate.

The best rate is that of these numbers: what it has is the higher for it, the more so the more rates were tried
(:mod:`.sweep_subsets` judges trials by maps that have chosen nothing).

python -m benchmarks.sweep_results --sweep=runs/paper_choices_sd --axis=choice \
    --out=benchmarks/results/paper_choices_scenes_sd.json
"""

import argparse
import csv
import json
import pathlib
import statistics
from collections.abc import Sequence

from benchmarks import common

NUMBERS = ("mean_iou", "edge_f1", "facts", "held_out_mse")


def done_trials(sweep: pathlib.Path, axes: Sequence[str], wanted: Sequence[int] | None = None) -> list[dict[str, str]]:
    """The lines of a sweep's results, or of some trials, by number, those too that diverged.

    Exits where some have not ended, or there is no such axis or trial.
    """
    with (sweep / "results.csv").open() as file:
        trials = {int(line["trial"]): line for line in csv.DictReader(file)}
    if unknown := sorted(set(wanted or ()) - trials.keys()):
        raise SystemExit(f"{sweep}: no trial {unknown[0]}; there are {len(trials)}, from 0")
    trials = {number: line for number, line in trials.items() if wanted is None or number in wanted}
    for axis in axes:
        if any(axis not in line for line in trials.values()):
            known = ", ".join(next(iter(trials.values())))
            raise SystemExit(f"{sweep}: nothing there is called {axis!r}; the columns of results.csv are {known}")
    if left := [str(number) for number, line in trials.items() if line["status"] not in ("done", "diverged")]:
        raise SystemExit(f"{sweep}: trials {', '.join(left)} are not done; the same train.py command goes on")
    return list(trials.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=pathlib.Path, required=True, help="the sweep's workdir")
    parser.add_argument("--axis", required=True, help="what is compared; each at its best learning rate")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    trials = done_trials(args.sweep, [args.axis, "learning_rate"])
    groups: dict[str, dict[str, list[dict]]] = {}
    for trial in trials:
        groups.setdefault(trial[args.axis], {}).setdefault(trial["learning_rate"], []).append(trial)
    rows = {}
    for name, rates in groups.items():
        found = {}
        for rate, same in rates.items():
            done = [t for t in same if t["status"] == "done"]
            found[rate] = {"trials": len(same)} | ({"diverged": len(same) - len(done)} if len(done) < len(same) else {})
            for number in NUMBERS:
                if values := [float(t[number]) for t in done if t.get(number)]:
                    spread = statistics.stdev(values) if len(values) > 1 else None
                    found[rate][number] = {"mean": round(statistics.mean(values), 4), "deviation": spread}
        whole = [rate for rate, numbers in found.items() if "diverged" not in numbers]
        best = max(whole, key=lambda rate: found[rate]["mean_iou"]["mean"], default=None)
        rows[name] = {"best_learning_rate": best, "rates": found}
    score = lambda row: row["rates"][row["best_learning_rate"]]["mean_iou"]["mean"] if row["best_learning_rate"] else 0  # noqa: E731
    rows = dict(sorted(rows.items(), key=lambda item: -score(item[1])))
    config = json.loads((args.sweep / "sweep.json").read_text())["config"]
    common.write_report(args.out, __doc__, {"base": config["base"]["path"], "axis": args.axis, "rows": rows})


if __name__ == "__main__":
    main()
