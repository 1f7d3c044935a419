"""One MCM on fine-tunes of its base: does the shipped MCM of scenes-sd control bases that now draw winter?

python -m tools.finetune_base --method=full --out=runs/winter-full --work=runs/winter
python -m tools.finetune_base --method=lora --out=runs/winter-lora --work=runs/winter
python -m tools.finetune_base --method=lora --scale=0.5 --out=runs/winter-half --work=runs/winter
python -m benchmarks.accept_base --out=benchmarks/results/accept_base.json

The same held-out maps, captions and noise on each base; sampled as the shipped MCM's config says. Labels are read by
one net for all, trained here on scenes in both palettes alike (kept in --workdir). Real pictures of both palettes, as
they are and through the bases' autoencoder, bound what can be reached. `season` is where the classes' mean colours lie
between those of real summer pictures (0) and of the same in winter (1). Rows that are there are not measured again.
About 20 minutes on one CPU core.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from benchmarks import common
from mcm_jax import assets, config, pictures, sampling
from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.judges.readers import resize_images
from mcm_jax.evaluation.judges.train import RECIPE, fit, save, score
from mcm_jax.evaluation.rows import Row, Sampler, subsets
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings
from tools.winter import winter

MCM = "scenes-sd-mcm"
SIZE = 32  # at which the net reads labels
_SHOWN, _BATCH = 8, 32
SEED = 1  # of the scenes that it learns from: those of no base and no MCM


def both_palettes(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes in summer, then the same in winter: uint8 ``[2 N, 32, 32, 3]`` and their classes."""
    fine = list(Scenes(split, count, 2 * SIZE, 2 * SIZE, seed=SEED))
    images = [s["image"] for s in fine] + [winter(s["image"], s["segmentation"]) for s in fine]
    labels = np.stack([s["segmentation"] for s in Scenes(split, count, SIZE, SIZE, seed=SEED)])
    small = resize_images(np.stack(images), SIZE, SIZE)
    return np.round((small + 1) * 127.5).astype(np.uint8), np.concatenate([labels, labels])


def train_judge(folder: pathlib.Path, steps: int) -> None:
    """A net that reads the labels of both palettes."""
    images, labels = both_palettes("train", 1_200)
    watched = both_palettes("test", 96)
    net, log = fit(images, labels, CLASSES, watched, RECIPE | {"steps": steps})
    net.config["held_out"] = score(net, watched[0].astype(np.float32) / 127.5 - 1, watched[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    save(folder, net, log)


def mean_colours(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each class, ``[classes, 3]``."""
    return np.stack([images[labels == c].mean(0) if (labels == c).any() else np.zeros(3) for c in range(len(CLASSES))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/accept_base"))
    parser.add_argument("--bases", nargs="+", default=[f"runs/winter-{name}" for name in ("full", "lora", "half")])
    parser.add_argument("--maps", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--strengths", type=float, nargs="*", default=[2.5], help="of all modalities, further ones")
    parser.add_argument("--judge_steps", type=int, default=1_000)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--picture", type=pathlib.Path)
    args = parser.parse_args()
    judge = args.workdir / "judge"
    if not judge.exists():
        train_judge(judge, args.judge_steps)
    reader = load_segmenter(judge)
    settings = config.load(RunSettings, assets.resolve(MCM))
    pipelines = {"original": Pipeline.from_folder(MCM)}
    for path in args.bases:
        pipelines[pathlib.Path(path).name] = Pipeline.from_folder(MCM, base=path, accept_base=True)
    modalities = pipelines["original"].modalities
    held_out = HeldOut(settings.data, pipelines["original"].base.card, modalities, args.maps)
    judges = judges_of(held_out, {"segmentation": str(judge), "caption": "none"})
    labels = held_out.conditions["segmentation"]
    real = {"summer": held_out.images, "winter": winter(held_out.images, labels)}
    truth = held_out.at(SIZE, SIZE)["segmentation"]
    warm, cold = (mean_colours(resize_images(images, SIZE, SIZE), truth) for images in real.values())
    keys, which = sampling.sample_keys(args.seed, args.maps), np.arange(args.maps)

    def measure(images: np.ndarray) -> dict[str, float]:
        found = {k: round(float(v), 4) for judge in judges for k, v in judge.watch(images, which).items()}
        seen = resize_images(images, SIZE, SIZE)
        there = mean_colours(seen, reader.predict(seen)) - warm
        return found | {"season": round(float((there * (cold - warm)).sum() / ((cold - warm) ** 2).sum()), 3)}

    base = pipelines["original"].base
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    how = {"mcm": MCM, "maps": args.maps, "seed": args.seed, "judge_steps": reader.config["recipe"]["steps"]}
    how["fingerprints"] = {name: pipeline.base.fingerprint for name, pipeline in pipelines.items()}
    rows = before["rows"] if all(before.get(key) == value for key, value in how.items()) else {}
    through = jax.jit(lambda images: base.decode(base.params, base.encode(base.params, images)))
    for season, images in real.items() if not rows else ():
        decoded = np.concatenate([through(part) for part in np.split(images, range(_BATCH, len(images), _BATCH))])
        rows |= {f"real, {season}": measure(images), f"autoencoder, {season}": measure(np.clip(decoded, -1, 1))}
    shown = [pictures.show(m, held_out.conditions[m.name][:_SHOWN], settings.data.palette(m.name)) for m in modalities]
    names = subsets([m.name for m in modalities])
    chosen = [Row("base"), *(Row(name, given, settings.sampling.guidance) for name, given in names.items())]
    chosen += [Row(f"both@{strength:g}", names["both"], strength) for strength in args.strengths]
    for name, pipeline in pipelines.items():
        sampler = Sampler(pipeline, held_out, settings.sampling)
        for row in chosen:
            key, is_shown = f"{name}, {row.name}", args.picture and row.name in ("base", "both")
            if key in rows and not is_shown:
                continue
            images = sampler(row, keys, which)
            rows[key] = measure(images)
            print(key, rows[key], flush=True)
            if is_shown:
                shown.append(pictures.to_uint8(images[:_SHOWN]))
    control = {}
    for key in ("mean_iou", "edge_f1"):
        for name in (row.name for row in chosen[1:]):
            of = [rows[f"{base}, {name}"][key] for base in pipelines]
            most = [rows[f"autoencoder, {s}"][key] for s in ("summer", *["winter"] * len(args.bases))]
            control[f"{key}, {name}"] = {
                "absolute": [round(v - of[0], 4) for v in of[1:]],
                "relative_to_autoencoder": [
                    round(v / m - of[0] / most[0], 4) for v, m in zip(of[1:], most[1:], strict=True)
                ],
            }
    if args.picture:
        pictures.save_png(args.picture, pictures.grid(shown, least_size=64))
    differences = {f"minus original, of {', '.join(args.bases)}": control}
    common.write_report(args.out, __doc__, {**how, "rows": rows, **differences})


if __name__ == "__main__":
    main()
