"""A sweep that has run, as a result to keep: every trial's numbers, averaged over seeds, and each choice's best rate.

python -m benchmarks.sweep_results --sweep=runs/paper_choices_sd --axis=choice \
    --out=benchmarks/results/paper_choices_scenes_sd.json
"""

import argparse
import csv
import json
import pathlib
import statistics

from benchmarks import common

NUMBERS = ("mean_iou", "edge_f1", "facts", "held_out_mse")


def done_trials(sweep: pathlib.Path) -> list[dict[str, str]]:
    """The lines of a sweep's results, all of them done. Exits where some are not."""
    with (sweep / "results.csv").open() as file:
        trials = list(csv.DictReader(file))
    if left := [t["trial"] for t in trials if t["status"] != "done"]:
        raise SystemExit(f"{sweep}: trials {', '.join(left)} are not done; the same train.py command goes on")
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=pathlib.Path, required=True, help="the sweep's workdir")
    parser.add_argument("--axis", required=True, help="what is compared; each at its best learning rate")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    trials = done_trials(args.sweep)
    groups: dict[str, dict[str, list[dict]]] = {}
    for trial in trials:
        groups.setdefault(trial[args.axis], {}).setdefault(trial["learning_rate"], []).append(trial)
    rows = {}
    for name, rates in groups.items():
        found = {}
        for rate, same in rates.items():
            found[rate] = {"trials": len(same)}
            for number in NUMBERS:
                if values := [float(t[number]) for t in same if t.get(number)]:
                    spread = statistics.stdev(values) if len(values) > 1 else None
                    found[rate][number] = {"mean": round(statistics.mean(values), 4), "deviation": spread}
        best = max(found, key=lambda rate: found[rate]["mean_iou"]["mean"])
        rows[name] = {"best_learning_rate": best, "rates": found}
    rows = dict(sorted(rows.items(), key=lambda r: -r[1]["rates"][r[1]["best_learning_rate"]]["mean_iou"]["mean"]))
    config = json.loads((args.sweep / "sweep.json").read_text())["config"]
    common.write_report(args.out, __doc__, {"base": config["base"]["path"], "axis": args.axis, "rows": rows})


if __name__ == "__main__":
    main()
