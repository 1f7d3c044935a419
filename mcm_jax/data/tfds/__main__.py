"""Builds data sets of TensorFlow Datasets from downloads, without TensorFlow (docs/tfds.md).

python -m mcm_jax.data.tfds build celeba_hq_mask --manual_dir=DOWNLOADS --data_dir=DATA
python -m mcm_jax.data.tfds build celeba_hq_mask --help     which files, from which page, and the options
python train.py --config=CONFIG --config.data.name=tfds --config.data.path=DATA/celeba_hq_mask --workdir=W
"""

import argparse
import dataclasses
import inspect
import sys

from mcm_jax.data.tfds import LAYOUTS
from mcm_jax.data.tfds.build import build
from mcm_jax.data.tfds.records import describe
from mcm_jax.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 1 and one message on bad input, 130 on Ctrl-C, with nothing written."""
    args = vars(_parser().parse_args(arguments))
    layout = LAYOUTS[args.pop("name")]
    try:
        options = {field.name: args.pop(field.name) for field in dataclasses.fields(layout)}
        target = build(layout(**options), **args)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    published = ", ".join(f"{count:,} {split}".strip() for split, count in layout.counts.items())
    print(
        f"{target}: {', '.join(describe(target).splits)}" + (f"; published: {published} examples" if published else "")
    )
    print(f"train with --config.data.name=tfds --config.data.path={target}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m mcm_jax.data.tfds", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="build")
    names = commands.add_parser("build", help="writes a data set").add_subparsers(
        required=True, dest="name", metavar="NAME", help=", ".join(LAYOUTS)
    )
    for name, layout in LAYOUTS.items():
        download = " ".join(layout.download.split())
        about = f"{inspect.getdoc(layout)}\n\nFrom {layout.page}: {download}\nUse: {layout.licence}."
        add = names.add_parser(name, description=about.replace("%", "%%"), formatter_class=raw).add_argument
        add("--manual_dir", default=".", help="the folder with the downloads")
        add("--data_dir", help="where TFDS keeps its data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
        add("--config", default="", help="what this version is called (default: by the options)")
        add("--overwrite", action="store_true", help="replace one of its name")
        for field in dataclasses.fields(layout):
            kind = _truth if field.type is bool else field.type
            add(f"--{field.name}", type=kind, default=field.default, help="(default: %(default)s)")
    return parser


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text == "True"


if __name__ == "__main__":
    main()
