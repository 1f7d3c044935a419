"""Does a judge that a user trained on their own pairs rank as the shipped one does? 300 scenes, written as files.

python -m benchmarks.own_judge --out=benchmarks/results/own_judge.json

An MCM is trained on the folder, and evaluated twice: by a judge of labels trained on the same pairs, and by the net
that ships, which was trained on 6,000 other scenes. What is there is not made again. About half an hour on 2 cores.
"""

import argparse
import json
import pathlib

import numpy as np
from PIL import Image

from benchmarks import common
from configs import demo
from mcm_jax.data.scenes import Scenes
from mcm_jax.evaluation.evaluate import evaluate
from mcm_jax.evaluation.judges.train import data_of, train
from mcm_jax.training import train_and_evaluate

SEED = 5  # of the scenes: those of no base, net or MCM
SPLITS = {"train": 300, "test": 96}


def write_pairs(folder: pathlib.Path) -> None:
    for split, count in SPLITS.items():
        for i, scene in enumerate(Scenes(split, count, seed=SEED)):
            arrays = {"image": (scene["image"] + 1) * 127.5, "sketch": scene["sketch"] * 255}
            for name, array in (arrays | {"segmentation": scene["segmentation"]}).items():
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.round(array).astype(np.uint8)).save(folder / split / name / f"{i:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/own_judge"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    data, judge, run = (args.workdir / name for name in ("data", "judge", "run"))
    if not data.exists():
        write_pairs(data)
    if not judge.exists():
        train(data_of(str(data)), judge)
    config = demo.get_config()
    config.data.update(name="folder", path=str(data))
    config.draws.count = 10
    config.cache.load_base = True
    config.train.update(evaluate_every=300, best="mean_iou")
    config.evaluation.judges.segmentation = str(judge)
    train_and_evaluate(config, run)
    found = {}
    for name, spec in (("own", str(judge)), ("shipped", "scenes")):
        out = args.workdir / name / "metrics.json"
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            evaluate(run, out, judges={"segmentation": spec}, seeds=args.seeds)
        found[name] = json.loads(out.read_text())
    rows = {row: {name: round(found[name]["miou"][row], 4) for name in found} for row in found["own"]["miou"]}
    ranks = {name: sorted(rows, key=lambda row: -found[name]["miou"][row]) for name in found}
    numbers = {
        "mean_iou": rows,
        "ranking": ranks,
        "largest_difference": max(abs(r["own"] - r["shipped"]) for r in rows.values()),
    }
    of = {key: found["own"][key] for key in ("maps", "seeds", "guidance", "steps", "mcm_step")}
    common.write_report(args.out, __doc__, {"pairs": SPLITS, **of, **numbers})


if __name__ == "__main__":
    main()
