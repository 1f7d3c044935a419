"""What each option of training costs or buys: control at equal steps, pace and memory, on scenes from one cache.

python -m benchmarks.training_options --out=benchmarks/results/training_options.json

`configs/demo.py` with the MCM of 2.9% of the base, one seed; each row changes one thing. Mean IoU over held-out maps,
both conditions, without guidance, 12 steps of the config's sampler (docs/training.md has DDIM, the default then);
held-out loss is the run's own (where the weighting is another, so is it). Pace is the median of a run's reports, memory
what the compiler counts for a step. The same command goes on.
"""

import argparse
import contextlib
import io
import json
import pathlib
import re
import statistics

import numpy as np

from benchmarks import common
from configs import default, demo
from mcm_jax import sampling
from mcm_jax.config import read
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import Row, Sampler
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings, train_and_evaluate

OPTIONS = {
    "as configured: adamw, cosine, v weighting, EMA 0.99": {},
    "schedule linear": {"train.schedule": "linear"},
    "schedule constant": {"train.schedule": "constant"},
    "schedule wsd, decay over the last fifth": {"train.schedule": "wsd"},
    "optimizer lion, a fifth of the rate": {"train.optimizer": "lion", "train.learning_rate": 4e-4},
    "optimizer muon": {"train.optimizer": "muon"},
    "weighting min_snr, gamma 5": {"loss.weighting": "min_snr"},
    "weighting min_snr, gamma 1": {"loss.weighting": "min_snr", "loss.snr_gamma": 1.0},
    "weighting eps": {"loss.weighting": "eps"},
    "bfloat16 computation": {"mcm.dtype": "bfloat16"},
    "remat": {"mcm.remat": True},
    "no EMA": {"train.ema_decay": 0.0},
    "no clipping": {"train.clip_norm": 0.0},
    "no weight decay": {"train.weight_decay": 0.0},
    "begun with scenes-mcm (init_from), medium": {"train.init_from": "scenes-mcm"},
    "accumulate 4": {"train.accumulate": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--only", nargs="*", help="words; options with one of them")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/training_options"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    common.use_compilation_cache(args.workdir)
    rows, judges = {}, []
    for name, changes in OPTIONS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        config = demo.get_config()
        config.mcm.update(default.SIZES["medium" if "medium" in name else "small"])
        config.cache.path = str(args.workdir / "cache")
        config.train.update(steps=args.steps, checkpoint_every=args.steps, decay_steps=args.steps // 5)
        config.train.update(evaluate_every=args.steps, log_every=20)
        config.update_from_flattened_dict(changes)
        workdir = args.workdir / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{args.steps}"
        said, how = io.StringIO(), {"maps": args.maps, "changes": changes}
        if (workdir / "row.json").exists():
            there = json.loads((workdir / "row.json").read_text())
            if {k: there.get(k) for k in how} != how:
                raise SystemExit(f"{workdir}/row.json was judged otherwise; take another --workdir")
        else:
            with contextlib.redirect_stdout(said):
                train_and_evaluate(config, workdir)
            pipeline = Pipeline.from_folder(workdir)
            settings = read(RunSettings, config)
            if not judges:
                held_out = HeldOut(settings.data, pipeline.base.card, pipeline.modalities, args.maps)
                judges = judges_of(held_out, {})
            everything = Row("both", tuple(m.name for m in pipeline.modalities), 1.0)
            sampler = Sampler(pipeline, held_out, pipeline.settings.but(steps=12))
            images = sampler(everything, sampling.sample_keys(0, args.maps), np.arange(args.maps))
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
            memory = re.search(r"([\d,]+) MiB on each device", said.getvalue())
            numbers = (judge.watch(images, np.arange(args.maps)).items() for judge in judges)
            row = {k: round(v, 4) for found in numbers for k, v in found}
            row |= {k: round(v, 5) for line in lines for k, v in line.items() if k.startswith("held_out")}
            pace = [line["images_per_second"] for line in lines[1:] if "images_per_second" in line]
            row |= {
                "images_per_second": round(statistics.median(pace), 1),
                "mib_of_a_step": int(memory[1].replace(",", "")) if memory else None,
                **how,
            }
            (workdir / "row.json").write_text(json.dumps(row))
        rows[name] = json.loads((workdir / "row.json").read_text())
        print(name, rows[name], flush=True)
        what = {"steps": args.steps, "batch_size": config.train.batch_size, "maps": args.maps, "rows": rows}
        with contextlib.redirect_stdout(io.StringIO()):
            common.write_report(args.out, __doc__, what)


if __name__ == "__main__":
    main()
