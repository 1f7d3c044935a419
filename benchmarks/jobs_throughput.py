"""A thousand jobs on a shipped MCM of scenes: programs, pictures a second beside single runs, and two interrupts.

python -m benchmarks.jobs_throughput --steps=4 --singles=20 --out=benchmarks/results/jobs_1000.json
python -m benchmarks.jobs_throughput --mcm=scenes-sd-mcm --steps=4 --out=benchmarks/results/jobs_1000_sd.json

Held-out maps in seven kinds of jobs: subsets, strengths, windows, a guidance schedule, a mask, a weight, a variation;
on a base with text each with the map's own prompt, and with text guidances and negative prompts that differ.
sample.py draws the list, is stopped twice by SIGINT and goes on; this process draws it without a break and counts
programs and pictures a second; both folders must hold the same bytes. Then a batch of each kind alternates with single
runs of it, of batch size 1; both are compiled before.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from benchmarks import common
from mcm_jax import assets, config, pictures
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.jobs import Drawer, read_jobs
from mcm_jax.training import RunSettings

KINDS = (
    {"of": ("segmentation", "sketch")},
    {"of": ("segmentation",), "guidance": 1.5},
    {"of": ("sketch",), "guidance": 2.0, "end": 0.5},
    {"of": ("segmentation", "sketch"), "strength": {"sketch": 0.5}},
    {"of": ("segmentation", "sketch"), "window": {"segmentation": [0, 0.5]}, "guidance_schedule": [2, 0]},
    {"of": ("segmentation",), "mask": "mask.png", "weights": [1.5]},
    {"of": (), "variation_seed": 1, "variation": 0.3},
)


def write_list(folder: pathlib.Path, drawer: Drawer, count: int, maps: int) -> pathlib.Path:
    """Files of held-out maps, and a list of jobs for them."""
    data, base = config.load(RunSettings, assets.resolve(drawer.workdirs[0])).data, drawer.pipeline.base
    held_out = HeldOut(data, base.card, drawer.pipeline.modalities, maps)
    for modality in drawer.pipeline.modalities:
        for i, condition in enumerate(held_out.conditions[modality.name]):
            pictures.save_png(folder / modality.name / f"{i:04d}.png", modality.pack(condition))
    half = np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)
    pictures.save_png(folder / "mask.png", np.broadcast_to(half, (32, 32)))
    lines = []
    for i in range(count):
        kind = dict(KINDS[i % len(KINDS)])
        conditions = {name: f"{name}/{i % maps:04d}.png" for name in kind.pop("of")}
        if base.is_text_conditional:
            kind |= {"prompt": held_out.captions[i % maps], "text_guidance": 2 + i % 3}
            kind |= {"negative_prompt": "night"} if i % 2 else {}
        lines.append({"name": f"{i % len(KINDS)}_{i:04d}", "conditions": conditions, "seed": i, **kind})
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "jobs.jsonl"


def interrupted(command: list[str], out: pathlib.Path, stops: list[int]) -> list[int]:
    """Runs a command to its end, stopped when so many pictures are in its folder; how many there were each time."""
    there = []
    for stop in [*stops, None]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while stop is not None and process.poll() is None and len(list(out.glob("*.png"))) < stop:
            time.sleep(0.05)
        if stop is not None:
            process.send_signal(signal.SIGINT)
        status = process.wait()
        assert status == (0 if stop is None else 130), status
        there.append(len(list(out.glob("*.png"))))
    return there


def beside_single_runs(drawer: Drawer, jobs: list, out: pathlib.Path, batch: int, singles: int) -> list[float]:
    """Of each kind, how many times as many pictures a second a batch gives as single runs."""
    ratios = []
    for job in (jobs[0], jobs[len(KINDS) - 1]):  # what a variation's noise takes is compiled by itself
        drawer.sample([job], 1)
    drawer.sample(jobs[len(KINDS) - 1 :: len(KINDS)][:batch], batch)
    for kind in range(len(KINDS)):
        of_kind = [job for job in jobs if job.name.startswith(f"{kind}_")][:batch]
        began = time.perf_counter()
        for job in of_kind[:singles]:
            image = drawer.sample([job], 1)[0]
            pictures.save_png(out / f"{job.name}_single.png", pictures.to_uint8(image))
        single = (time.perf_counter() - began) / len(of_kind[:singles])
        began = time.perf_counter()
        images = drawer.sample(of_kind, batch)
        for job, image in zip(of_kind, images, strict=True):
            pictures.save_png(out / f"{job.name}.png", pictures.to_uint8(image))
        ratios.append(single * len(of_kind) / (time.perf_counter() - began))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcm", default="scenes-mcm")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--maps", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--singles", type=int, default=5, help="runs of each kind")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/jobs"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    shutil.rmtree(args.workdir / "drawn", ignore_errors=True)
    conditions = args.workdir / args.mcm
    common.use_compilation_cache(args.workdir)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str((args.workdir / "compiled").absolute())
    how = {"sampler": "dpm++2m", "spacing": "trailing", "steps": args.steps, "batch_size": args.batch}
    drawer = Drawer(args.mcm, **how)
    path = write_list(conditions, drawer, args.jobs, min(args.maps, args.jobs))
    jobs, problems = read_jobs(path, drawer)
    assert not problems, problems

    broken, whole = (args.workdir / "drawn" / name for name in ("broken", "whole"))
    command = [sys.executable, "sample.py", f"--workdir={args.mcm}", f"--jobs={path}", f"--out={broken}"]
    command += [f"--{key}={value}" for key, value in how.items()]
    there = interrupted(command, broken, [args.jobs // 3, 2 * args.jobs // 3])
    began = time.perf_counter()
    drawer.sample(jobs[:1], args.batch)
    first = time.perf_counter() - began
    began = time.perf_counter()
    drawer.draw(jobs, whole)
    taken = time.perf_counter() - began
    compilations = drawer.pipeline.engine.compilations
    assert compilations == 1, compilations
    names = {p.name for p in whole.iterdir()}
    assert names == {p.name for p in broken.iterdir()} and len(names) == args.jobs
    differ = [name for name in sorted(names) if (whole / name).read_bytes() != (broken / name).read_bytes()]
    assert not differ, f"{len(differ)} of {args.jobs} differ, the first {differ[0]}"
    ratios = beside_single_runs(drawer, jobs, args.workdir / "drawn" / "beside", args.batch, args.singles)
    report = {
        "mcm": args.mcm,
        "jobs": args.jobs,
        "kinds": len(KINDS),
        "how": how,
        "compilations": compilations,
        "seconds_before_the_first_picture": round(first, 2),
        "seconds": round(taken, 2),
        "pictures_per_second": round(args.jobs / taken, 2),
        "times_single_runs": common.median(ratios, 2),
        "times_single_runs_by_kind": [round(r, 2) for r in ratios],
        "there_when_stopped": there,
        "interrupted_is_uninterrupted": "bit for bit",
    }
    common.write_report(args.out, __doc__, report)


if __name__ == "__main__":
    main()
