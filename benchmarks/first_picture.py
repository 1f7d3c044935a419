"""How long the first picture takes, in a first process and in later ones, which find the compiled programs on disk.

python -m benchmarks.first_picture --out=benchmarks/results/first_picture_cpu.json

`sample.py` as a user types it, one picture of 16 steps, in processes of their own with one new folder for compiled
programs: seconds of the whole process, of which an import of the package takes the part that is stated.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import common


def run(command: list[str], cache: str) -> float:
    """Seconds of a process."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache})
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdirs", nargs="+", default=["scenes-mcm", "scenes-sd-mcm"])
    parser.add_argument("--later", type=int, default=3, help="processes after the first")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    report = {}
    for workdir in args.workdirs:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "sample.py", f"--workdir={workdir}", "--num_samples=1", "--steps=16"]
            command += ["--sketch=docs/examples/sketch.png", f"--out={folder}/out"]
            imports = [sys.executable, "-c", "import mcm_jax.jobs"]
            first, *later = (run(command, f"{folder}/compiled") for _ in range(1 + args.later))
            empty = common.median([run(imports, f"{folder}/compiled") for _ in range(args.later)], 1)
            report[workdir] = {"first": round(first, 1), "later": common.median(later, 1), "import": empty}
    common.write_report(args.out, __doc__, {"seconds": report})


if __name__ == "__main__":
    main()
