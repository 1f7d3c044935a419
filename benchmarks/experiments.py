"""The paper's experiments, as far as they run here: prompts that say little, one map under several prompts, few pairs.

python -m benchmarks.experiments --out=benchmarks/results/experiments.json
python -m benchmarks.experiments --parts pairs --out=benchmarks/results/experiments.json

* ``prompts``: the shipped MCM of scenes-sd with each held-out map's own caption, with a vague prompt, with words that
  the base does not know (also without text guidance), with the empty prompt, and with the caption of another map: mean
  IoU, edge F1 and, of the own captions' facts, how many the pictures show.
* ``guidance``: own captions and vague prompts, both conditions, against text guidance and what of it is modulated.
* ``styles``: one map under five prompts, and the base alone under them, four seeds: docs/experiments.png.
* ``pairs``: MCMs trained on 50 to 4,000 pairs, equal steps, judged on the same held-out maps; two seeds.

Same noise in every row. A part that is done is kept in --out; the same command goes on.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.peers.judging import Drawer, judged
from benchmarks.peers.methods import make_method
from benchmarks.peers.train import Trainer
from benchmarks.peers.world import open_world
from mcm_jax import config, pictures, sampling
from mcm_jax.assets import resolve
from mcm_jax.evaluation import diversity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import judges_of
from mcm_jax.evaluation.rows import subsets
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import RunSettings

NUMBERS = ("miou", "edge_f1.f1", "facts.mean")
VAGUE = ("a mountain", "a mountain meadow", "a mountain lake", "mountain")  # words that the base knows
STRANGE = ("a picture", "a landscape", "nature", "something beautiful")  # words that it does not
STYLES = ("by day", "at dawn", "at sunset", "at night")


class Shipped:
    """The MCM that ships, with held-out maps and judges."""

    def __init__(self, args: argparse.Namespace):
        self.pipeline = Pipeline.from_folder(args.mcm)
        settings = config.load(RunSettings, resolve(args.mcm))
        self.held_out = HeldOut(settings.data, self.pipeline.base.card, self.pipeline.modalities, args.maps)
        self._judges, self._which = judges_of(self.held_out, {}), np.arange(len(self.held_out))
        at_hand, grid = self.held_out.conditions, self.pipeline.grid
        self.maps = {m.name: m.resize_all(at_hand[m.name], *grid) for m in self.pipeline.modalities}

    def row(self, names: Sequence[str], texts: Sequence[str], **how: Any) -> dict[str, float]:
        """Numbers of pictures that are told these modalities and texts."""
        keys = sampling.sample_keys(0, len(texts))
        images = self.pipeline({name: self.maps[name] for name in names}, keys, prompts=texts, **how)
        return {k: v for k, v in common.numbers_of(self._judges, images, self._which).items() if "class_iou" not in k}


def guidance(args: argparse.Namespace) -> dict[str, Any]:
    shipped = Shipped(args)
    count, rows = len(shipped.held_out), {}
    told = {"own caption": shipped.held_out.captions, "vague": [VAGUE[i % len(VAGUE)] for i in range(count)]}
    for where in ("before_cfg", "after_cfg"):
        for scale in (1.0, 1.5, 2.0, 3.0, 5.0):
            for words, texts in told.items():
                key = f"{words}, {where}, text guidance {scale:g}"
                rows[key] = shipped.row(list(shipped.maps), texts, modulate=where, text_guidance=scale)
                print(key, rows[key], flush=True)
    return {"mcm": args.mcm, "maps": count, "rows": rows}


def prompts(args: argparse.Namespace) -> dict[str, Any]:
    shipped = Shipped(args)
    held_out, pipeline, maps, count = shipped.held_out, shipped.pipeline, shipped.maps, len(shipped.held_out)
    strange, text_guidance = [STRANGE[i % len(STRANGE)] for i in range(count)], pipeline.settings.text_guidance
    told = {
        "own caption": (held_out.captions, text_guidance),
        "vague": ([VAGUE[i % len(VAGUE)] for i in range(count)], text_guidance),
        "empty": ([""] * count, text_guidance),
        "unknown words": (strange, text_guidance),
        "unknown words, text guidance 1": (strange, 1.0),
        "another's caption": (held_out.captions[1:] + held_out.captions[:1], text_guidance),
    }
    rows: dict[str, dict[str, float]] = {}
    for words, (texts, scale) in told.items():
        for given, names in {**subsets(list(maps)), "base": ()}.items():
            strength = pipeline.settings.guidance if names else 0.0
            rows[f"{given}, {words}"] = shipped.row(names, texts, guidance=strength, text_guidance=scale)
            print(f"{given}, {words}", rows[f"{given}, {words}"], flush=True)
    return {"mcm": args.mcm, "maps": count, "rows": rows}


def styles(args: argparse.Namespace) -> dict[str, Any]:
    shipped = Shipped(args)
    pipeline, held_out, one = shipped.pipeline, shipped.held_out, slice(args.map, args.map + 1)
    caption = held_out.captions[args.map]
    time = next((words for words in STYLES if words in caption), None)
    texts = [caption.replace(time, words) if time else f"{caption} {words}" for words in STYLES] + [""]
    seeds, sheet, spread = 4, [], {}
    keys = sampling.sample_keys(0, seeds)
    for guidance in (pipeline.settings.guidance, 0.0):
        drawn = []
        for text in texts:
            given = {name: np.repeat(values[one], seeds, 0) for name, values in shipped.maps.items()}
            images = np.clip(pipeline(given, keys, prompts=[text] * seeds, guidance=guidance), -1, 1)
            drawn.append(images)
            name = "base alone" if guidance == 0 else "both"
            spread[f"{name}, {text or 'empty'}"] = round(float(diversity(images[:, None])), 4)
        for seed in range(seeds if guidance else 1):
            sheet.append(pictures.to_uint8(np.stack([images[seed] for images in drawn])))
    shown = [
        np.repeat(pictures.show(m, held_out.conditions[m.name][one], held_out.data.palette(m.name)), len(texts), 0)
        for m in pipeline.modalities
    ]
    file = pathlib.Path("docs/experiments.png")
    pictures.save_png(file, pictures.grid([*shown, *sheet]))
    return {"prompts": texts, "diversity_over_seeds": spread, "picture": str(file)}


def pairs(args: argparse.Namespace, found: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    keys = ("method", "steps", "rate", "seeds", "maps", "batch_size", "sampling_steps")
    how = {key: getattr(args, key) for key in keys}
    if found and found["how"] != how:
        raise SystemExit(f"{args.out} holds pairs of {found['how']}, not of {how}; take another --out")
    found = {"rows": {}, "how": how} | found
    for config_name in args.configs:
        for count in args.pairs:
            key = f"{config_name}, {count} pairs"
            if key in found["rows"]:
                continue
            world = open_world(config_name, pairs=count, select=1, report=args.maps - 1, references=0)
            method = make_method(args.method, world.base, world.modalities, world.run.mcm)
            trainer = Trainer(args.method, world, method, args.steps, args.batch_size)
            draw, row = Drawer(world, method, args.sampling_steps), {}
            for seed in range(args.seeds):
                params, _ = trainer(args.rate, seed)
                which = np.arange(len(world.held_out))
                for given, numbers in judged(world, draw, params, which, seed).items():
                    for number in NUMBERS:
                        if number in numbers:
                            row.setdefault(f"{given}.{number}", []).append(numbers[number])
            found["rows"][key] = row
            print(key, row, flush=True)
            keep(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("prompts", "guidance", "styles", "pairs")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:3])
    parser.add_argument("--mcm", default="scenes-sd-mcm")
    parser.add_argument("--maps", type=int, default=128)
    parser.add_argument("--map", type=int, default=1, help="of styles: which held-out one")
    parser.add_argument("--configs", nargs="+", default=["scenes", "scenes_sd"], help="of pairs, as the next ones")
    parser.add_argument("--method", default="mcm-small")
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 200, 1_000, 4_000])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--sampling_steps", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    report = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}

    def keep(part: str, found: dict[str, Any]) -> None:
        report[part] = found | {"commit": common.COMMIT}
        common.write_report(args.out, __doc__, {"parts": report})

    for part in args.parts:
        if part == "pairs":
            pairs(args, report.get(part, {}), lambda found: keep("pairs", found))
        elif part in report:
            print(f"{part}: kept, as {args.out} has it; another --out measures it again")
        else:
            keep(part, {"prompts": prompts, "guidance": guidance, "styles": styles}[part](args))


if __name__ == "__main__":
    main()
