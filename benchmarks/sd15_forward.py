"""Time and memory of one forward pass of Stable Diffusion 1.5's U-Net on the CPU: here (jitted), and diffusers'.

python -m benchmarks.sd15_forward --out=benchmarks/results/sd15_forward.json

Random weights, float32, batch 1, latents 64x64x4, context 77x768. Each measurement is a process of its own, so that its
peak of resident memory counts, imports and compilation included; the two alternate. diffusers runs as it comes, without
torch.compile.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

# The published config says the same as diffusers' defaults but for these.
CONFIG = {"sample_size": 64, "cross_attention_dim": 768}


def prepare_jax(x: np.ndarray, t: np.ndarray, context: np.ndarray) -> Callable[[], None]:
    """Makes the network; returns a function that runs it once."""
    import jax
    import jax.numpy as jnp

    from mcm_jax.base.unet2d_condition import UNet2DCondition, UNet2DConditionConfig

    net, rng = UNet2DCondition(UNet2DConditionConfig.from_dict(CONFIG)), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)),
        jax.eval_shape(net.init, jax.random.key(0), x, t, context),
    )
    forward = jax.jit(net.apply)
    return lambda: jax.block_until_ready(forward(params, x, t, context))


def prepare_torch(x: np.ndarray, t: np.ndarray, context: np.ndarray) -> Callable[[], None]:
    """Makes the network; returns a function that runs it once."""
    import diffusers
    import torch

    net = diffusers.UNet2DConditionModel(**CONFIG).eval()
    arrays = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(t), torch.tensor(context)
    return torch.inference_mode()(lambda: net(*arrays))


def measure(framework: str, runs: int) -> dict:
    """Seconds of the first run (with compilation) and of each of the next, and the process's peak memory.

    CPU seconds, of all threads together, hardly feel what else runs on the machine.
    """
    rng = np.random.default_rng(1)
    x, context = rng.standard_normal((1, 64, 64, 4), np.float32), rng.standard_normal((1, 77, 768), np.float32)
    forward = {"jax": prepare_jax, "torch": prepare_torch}[framework](x, np.array([500], np.int32), context)
    seconds, cpu_seconds = [], []
    for _ in range(runs + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        forward()
        seconds.append(round(time.perf_counter() - began, 2))
        cpu_seconds.append(round(time.process_time() - cpu_began, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "peak_gib": round(peak / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each process, after one that warms up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each framework")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--framework", choices=("jax", "torch"), help="measure in this process and print the result")
    args = parser.parse_args()
    if args.framework:
        print(json.dumps(measure(args.framework, args.runs)))
        return
    found = {"jax": [], "torch": []}
    for _ in range(args.rounds):
        for framework, results in found.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.sd15_forward",
                f"--framework={framework}",
                f"--runs={args.runs}",
            ]
            load = round(os.getloadavg()[0], 1)  # other processes' share explains a slow run
            out = subprocess.run(
                command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            results.append(json.loads(out.splitlines()[-1]) | {"load_before": load})
            print(framework, results[-1], flush=True)

    def median(key: str) -> dict:
        return {
            name: round(statistics.median(s for r in results for s in r[key]), 2) for name, results in found.items()
        }

    report = {
        "what": __doc__.splitlines()[0],
        "runs": args.runs,
        "median_seconds": median("seconds"),
        "median_cpu_seconds": median("cpu_seconds"),
        "fastest_seconds": {name: min(s for r in results for s in r["seconds"]) for name, results in found.items()},
        "peak_gib": {name: max(r["peak_gib"] for r in results) for name, results in found.items()},
        "processes": found,
        "hardware": f"{platform.machine()}, {os.cpu_count()} logical CPU(s)",
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "torch", "diffusers")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
