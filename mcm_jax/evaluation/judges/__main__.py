"""Trains a judge of labels on your own pairs.

python -m mcm_jax.evaluation.judges train DATA --out=JUDGE

DATA is a folder of pairs (docs/data.md) or the name of a data set; evaluate.py --judge=MODALITY=JUDGE judges by it.
"""

import argparse
import sys

from mcm_jax.errors import UserError
from mcm_jax.evaluation.judges.train import RECIPE, data_of, train


def _classes(text: str) -> int | tuple[str, ...]:
    return int(text) if text.isdecimal() else tuple(name.strip() for name in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 1 and one message on bad input, 130 on Ctrl-C, with nothing written."""
    parser = argparse.ArgumentParser(
        prog="python -m mcm_jax.evaluation.judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_subparsers(required=True).add_parser("train", help="a small U-Net on pairs").add_argument
    add("data", help="a folder of pairs, or the name of a data set")
    add("--out", required=True, help="the judge's folder, new or empty")
    add("--modality", default="segmentation", help="which labels: the name of their folder (default: %(default)s)")
    add("--classes", type=_classes, help="how many, or their names: sky,sun,...; else as many as the maps have")
    add("--size", type=int, default=32, help="height and width at which it judges (default: %(default)s)")
    add("--steps", type=int, default=RECIPE["steps"], help="of training (default: %(default)s)")
    add("--seed", type=int, default=RECIPE["seed"], help="of weights, order and augmentation (default: %(default)s)")
    add("--ignore", type=int, default=-1, help="the label that means unknown, often 255; -1 for none")
    add("--no-flip", dest="flip", action="store_false", help="mirror nothing: classes know left from right")
    args = vars(parser.parse_args(arguments))
    try:
        train(data_of(args.pop("data")), args.pop("out"), **args)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
