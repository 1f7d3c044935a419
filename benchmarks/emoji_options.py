"""What makes classes follow on emoji: one change of `configs/emoji.py` a row, all at equal steps.

python -m benchmarks.emoji_options --steps=700 --out=benchmarks/results/emoji_options.json

Mean IoU (by colour, without the pixels that a border runs through) and F1 of lines over held-out examples, at the
strengths given, 16 steps of the config's sampler (docs/emoji.md has DDIM, the default then), one seed; each row at the
learning rates given. The same command goes on.
"""

import argparse
import contextlib
import importlib
import io
import json
import pathlib

import numpy as np

from benchmarks import common
from mcm_jax import sampling
from mcm_jax.config import read
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Sampler, rows_of
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings, train_and_evaluate

PLAIN = {"draws.offset": 0.0}
OPTIONS = {
    "without offset noise": PLAIN,
    "offset noise 0.25": {"draws.offset": 0.25},
    "offset noise 0.5": {"draws.offset": 0.5},
    "offset noise 1": {"draws.offset": 1.0},
    "draws three times as dense at high t": PLAIN | {"draws.density": (1, 2, 3)},
    "drop rate 0.1": PLAIN | {"modalities.drop_rate": 0.1},
    "weighting x0": PLAIN | {"loss.weighting": "x0"},
    "weighting min_snr": PLAIN | {"loss.weighting": "min_snr"},
    "another coarse level, attending": PLAIN
    | {"mcm.channels": 12, "mcm.multipliers": (1, 2, 2, 3), "mcm.attention": (0, 1, 1, 1)},
    "x0_clip 2": PLAIN | {"mcm.x0_clip": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="emoji")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--maps", type=int, default=96)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3])
    parser.add_argument("--strengths", type=float, nargs="*", default=[1.0, 1.5])
    parser.add_argument("--only", nargs="*", help="words; options with one of them")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/emoji_options"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    rows, judges = {}, []
    for name, changes in OPTIONS.items():
        for rate in args.rates:
            workdir = args.workdir / f"{name.replace(' ', '_').replace(',', '')}_{rate:g}_{args.steps}"
            how = {"config": args.config, "maps": args.maps, "strengths": args.strengths}
            row_file = workdir / "row.json"
            if row_file.exists() and not how.items() <= (there := json.loads(row_file.read_text())).items():
                other = {k: there.get(k, "not said") for k in how}
                raise SystemExit(f"{row_file} was judged otherwise ({other}, now {how}); take another --workdir")
            if not row_file.exists():
                if args.only and not any(word in name for word in args.only):
                    continue
                config = importlib.import_module(f"configs.{args.config}").get_config()
                config.train.update(steps=args.steps, checkpoint_every=args.steps, validate_every=0)
                config.train.learning_rate = rate
                config.update_from_flattened_dict(changes)
                of_draws = {k: v for k, v in changes.items() if k.startswith("draws.") and v}
                config.cache.path = str(args.workdir / ("cache" + "".join(f"_{k}={v}" for k, v in of_draws.items())))
                config.cache.load_base = False
                train_and_evaluate(config, workdir)
                pipeline, settings = Pipeline.from_folder(workdir), read(RunSettings, config)
                modalities = pipeline.modalities
                if not judges:
                    held_out = HeldOut(settings.data, pipeline.base.card, modalities, args.maps)
                    judges = judges_of(held_out, settings.evaluation.judges)
                sampler = Sampler(pipeline, held_out, pipeline.settings)
                found = {}
                for row in rows_of([m.name for m in modalities], args.strengths[0], args.strengths[1:], False):
                    images = sampler(row, sampling.sample_keys(0, args.maps), np.arange(args.maps))
                    watched = (judge.watch(images, np.arange(args.maps)).items() for judge in judges)
                    found[row.name] = {k: round(v, 4) for numbers in watched for k, v in numbers}
                (workdir / "row.json").write_text(json.dumps(found | how | {"changes": changes, "learning_rate": rate}))
            rows[f"{name}, rate {rate:g}"] = found = json.loads((workdir / "row.json").read_text())
            print(name, rate, found, flush=True)
            what = {"config": args.config, "steps": args.steps, "maps": args.maps, "rows": rows}
            with contextlib.redirect_stdout(io.StringIO()):
                common.write_report(args.out, __doc__, what)


if __name__ == "__main__":
    main()
