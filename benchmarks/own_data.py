"""A folder of one's own, by the commands of the docs: what modalities, gaps and synthetic pairs are worth on scenes.

python -m benchmarks.own_data tutorial modalities three gaps synthetic --out=benchmarks/results/own_data.json

tutorial: 300 bare pictures, three commands. modalities: all of docs/data.md at once, in one MCM, each judged alone.
three: every subset of three. gaps: half of the conditions removed, at two rates of hiding; 10% of the label pixels
unknown. synthetic: pairs from the base itself beside real ones. Pictures are scenes written as files; held out are
scenes of the test split. A part that is in `--out` already stays; delete it there to run it again.
"""

import argparse
import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from benchmarks import common
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.scenes import Scenes

SIZE = 32
MAPS = "benchmarks.scene_maps"
PLUGINS = {name: f"{name}={MAPS}:{name}" for name in ("depth", "normals", "pose")}
LABELS = "segmentation=mcm_jax.evaluation.extractors:scenes"
DRAWN = ("canny", "soft_edges", "sketch", "strokes", "inpainting", "low_resolution", "grey")
JUDGES = {
    "segmentation": "scenes",
    "depth": f"depth:reader={MAPS}:depth",
    "normals": f"normals:reader={MAPS}:normals",
    "pose": f"pck:reader={MAPS}:points",
}
SMALL = ["--config.mcm.channels=8", "--config.mcm.multipliers=(1, 2, 4)", "--config.mcm.attention=(0, 0, 0)"]
SMALL += ["--config.mcm.head_dim=0"]


def write_scenes(folder: pathlib.Path, split: str, count: int, masks: bool = False) -> None:
    """Writes pictures (and their true segmentations, where asked for) as PNGs."""
    arrays = InMemory.render(Scenes(split, count, SIZE, SIZE, 2)).arrays
    wanted = {"image": arrays["image"]} | ({"segmentation": arrays["segmentation"]} if masks else {})
    for name, pictures in wanted.items():
        target = folder / name if masks or split == "test" or folder.name == "train" else folder
        target.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(target / f"{i:05}.png")


def run(*command: str) -> str:
    """Runs a command of ours as a user types it, and returns what it prints."""
    print("  $ python", " ".join(command), flush=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def make(data: pathlib.Path, *extractors: str) -> None:
    run("-m", "mcm_jax.data", "make", str(data), f"--extract={','.join(extractors)}")


def train(data: pathlib.Path, workdir: pathlib.Path, *flags: str) -> float:
    """Trains with configs/folder.py; returns seconds."""
    began = time.perf_counter()
    run("train.py", "--config=configs/folder.py", f"--workdir={workdir}", f"--config.data.path={data}", *flags)
    return time.perf_counter() - began


def measure(workdir: pathlib.Path, judged: Sequence[str], maps: int, *flags: str) -> dict:
    """Evaluates; returns the numbers by metric and row."""
    out = workdir / "metrics.json"
    judges = [f"--judge={name}={JUDGES[name]}" for name in judged if name in JUDGES]
    run("evaluate.py", f"--workdir={workdir}", f"--out={out}", f"--maps={maps}", *judges, *flags)
    found = json.loads(out.read_text())
    kept = ("miou", "edge_f1", "ms_ssim", "delta_e", "depth", "pck", "angular_error")
    return {k: v for k, v in found.items() if k.split("/")[-1] in kept} | {"parameters": found["mcm_parameters"]}


def tutorial(root: pathlib.Path, args: argparse.Namespace) -> dict:
    data = root / "bare"
    write_scenes(data, "train", 300)
    make(data, "sketch", "canny")
    said = run("-m", "mcm_jax.data", "check", str(data))
    seconds = train(data, root / "mine")
    how = {"pictures": 300, "maps": 30, "check": said.splitlines()[-12:], "seconds": seconds}
    return how | measure(root / "mine", (), 30)


def modalities(root: pathlib.Path, args: argparse.Namespace) -> dict:
    data = root / "all"
    for split, count in (("train", args.pictures), ("test", args.maps)):
        write_scenes(data / split, split, count)
    make(data, LABELS, *DRAWN, *PLUGINS.values())
    flags = [*SMALL, f"--config.train.steps={2 * args.steps}", "--config.modalities.drop_rate=0.8"]
    seconds = train(data, root / "all_run", *flags, "--config.draws.count=4")
    found = measure(root / "all_run", ("segmentation", *PLUGINS), args.maps)
    return {"steps": 2 * args.steps, "seconds": seconds} | found


def three(root: pathlib.Path, args: argparse.Namespace) -> dict:
    data = root / "three"
    for split, count in (("train", args.pictures), ("test", args.maps)):
        write_scenes(data / split, split, count)
    make(data, LABELS, "sketch", "strokes")
    seconds = train(
        data, root / "three_run", *SMALL, f"--config.train.steps={2 * args.steps}", "--config.draws.count=4"
    )
    return {"steps": 2 * args.steps, "seconds": seconds} | measure(root / "three_run", ("segmentation",), args.maps)


def gaps(root: pathlib.Path, args: argparse.Namespace) -> dict:
    full = root / "full"
    for split, count in (("train", args.pictures), ("test", args.maps)):
        write_scenes(full / split, split, count, masks=True)
    make(full, "sketch")
    rng, found = np.random.default_rng(0), {}

    def halved(data: pathlib.Path) -> None:
        for name in ("segmentation", "sketch"):
            for file in sorted((data / "train" / name).iterdir()):
                if rng.random() < 0.5:
                    file.unlink()

    def ignored(data: pathlib.Path) -> None:
        for file in sorted((data / "train" / "segmentation").iterdir()):
            labels = np.asarray(Image.open(file)).copy()
            labels[rng.random(labels.shape) < 0.1] = 255
            Image.fromarray(labels).save(file)

    changes: dict[str, tuple[Callable, list[str]]] = {
        "full": (lambda data: None, []),
        "half of the conditions removed": (halved, ["--config.data.partial=True"]),
        "half of the conditions removed, drop rate 0": (
            halved,
            ["--config.data.partial=True", "--config.modalities.drop_rate=0.0"],
        ),
        "10% of the label pixels unknown": (ignored, []),
    }
    for number, (name, (change, flags)) in enumerate(changes.items()):
        data, workdir = root / f"gaps{number}", root / f"gaps{number}_run"
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(full, data)
        change(data)
        seconds = train(
            data,
            workdir,
            *SMALL,
            f"--config.train.steps={args.steps}",
            "--config.draws.count=2",
            "--config.modalities.segmentation.channels=6",
            *flags,
        )
        found[name] = {"seconds": seconds} | measure(workdir, ("segmentation",), args.maps)
    return {"steps": args.steps, "runs": found}


def synthetic(root: pathlib.Path, args: argparse.Namespace) -> dict:
    made, real, found = root / "synthetic", root / "real", {}
    extractors = (LABELS, "canny", "soft_edges")
    run(
        "-m",
        "mcm_jax.data",
        "synthesise",
        "--base=scenes-ddpm",
        f"--out={made}",
        f"--count={args.pictures}",
        "--steps=25",
        f"--extract={','.join(extractors)}",
    )
    write_scenes(real / "train", "train", args.pictures)
    for data in (made, real):
        write_scenes(data / "test", "test", args.maps)
        make(data, *extractors)
        workdir = root / f"{data.name}_run"
        seconds = train(data, workdir, *SMALL, f"--config.train.steps={args.steps}", "--config.draws.count=2")
        found[data.name] = {"seconds": seconds} | measure(workdir, ("segmentation",), args.maps)
    return {"steps": args.steps, "runs": found}


PARTS = {f.__name__: f for f in (tutorial, modalities, three, gaps, synthetic)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--pictures", type=int, default=1_000)
    parser.add_argument("--maps", type=int, default=128)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs/own_data"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    parts = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}
    for name in args.parts:
        if name in parts:
            print(f"{name}: kept, as {args.out} has it; another --out measures it again")
        else:
            print(name, flush=True)
            how = {"pictures": args.pictures, "maps": args.maps, "commit": common.COMMIT}
            parts[name] = how | PARTS[name](args.root, args)
        with contextlib.redirect_stdout(io.StringIO()):
            common.write_report(args.out, __doc__, {"parts": parts})


if __name__ == "__main__":
    main()
