"""Reading a cache in training order: records a second from a cold and a warm page cache, memory, ArrayRecord beside.

python -m benchmarks.cache_read --out=benchmarks/results/cache_read.json

Records of SD 1.5's size: prediction and latent 64x64x4 float16, two 8-bit conditions. Written with random values, read
as training reads them: shuffled, stacked to batches, by the same iterator. ArrayRecord with Grain reads the same bytes,
one record each, as its documentation has it (group_size:1); its cold and warm runs alternate with the cache's.
"""

import argparse
import pathlib
import shutil
import subprocess
import time

import grain
import numpy as np
from array_record.python import array_record_module

from benchmarks import common
from mcm_jax.base import BaseCard
from mcm_jax.cache import Cache, store
from mcm_jax.data.pipeline import training_batches
from mcm_jax.schedules import Schedule

_SHAPE = (64, 64, 4)
_BATCH = 64


def write(folder: pathlib.Path, examples: int, draws: int, shard_examples: int = 200) -> Cache:
    """A cache of random values, through the cache's own writer."""
    folder.mkdir(parents=True)
    card = BaseCard(
        "random", "0" * 64, Schedule.from_config({"_class_name": "DDPMScheduler"}), _SHAPE, _SHAPE, False, 1, 1
    )
    plan = store.Manifest({}, card.to_json(), {}, examples, 1, draws, shard_examples, {})
    rng = np.random.default_rng(0)
    for number in range(plan.shard_count):
        n = len(plan.rows(number))
        tensors = {
            "index": np.array(plan.rows(number), np.int32),
            "t": rng.integers(0, 1000, (n, draws)).astype(np.int32),
            "eps": rng.standard_normal((n, draws, *_SHAPE), np.float32).astype(np.float16),
            "latent": rng.standard_normal((n, 1, *_SHAPE), np.float32).astype(np.float16),
            "segmentation": rng.integers(0, 150, (n, 1, *_SHAPE[:2])).astype(np.uint8),
            "sketch": rng.integers(0, 256, (n, 1, *_SHAPE[:2])).astype(np.uint8),
        }
        plan.shards[store.shard_name(number)] = store.write_shard(folder / store.shard_name(number), tensors)
    plan.write(folder / store.MANIFEST)
    return Cache(folder, verify=False)


def drop_page_cache(folder: pathlib.Path) -> None:
    """Writes a folder's files out and makes the system forget them; needs no privileges."""
    import os

    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def resident() -> float:
    """MiB of this process."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def read_cache(cache: Cache, records: int, threads: int) -> dict:
    """Reads as mcm_jax.training.feed does, but for the devices."""
    batches = training_batches(cache.read, len(cache), _BATCH, 0, cache.manifest.draws)
    count, memory, began = 0, [], time.perf_counter()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)
    for batch in batches[: records // _BATCH].to_iter_dataset(options):
        count += len(batch["eps"])
        if count % (_BATCH * 150) == 0:
            memory.append(round(resident(), 1))
    return {"records_per_second": round(count / (time.perf_counter() - began)), "resident_mib": memory}


def read_array_record(paths: list[str], examples: int, records: int, threads: int) -> dict:
    """The same through ArrayRecord and Grain."""
    size = int(np.prod(_SHAPE))

    def parse(record: bytes) -> dict:
        eps, latent = np.frombuffer(record, np.float16, 2 * size).reshape(2, *_SHAPE)
        maps = np.frombuffer(record, np.uint8, offset=4 * size).reshape(2, *_SHAPE[:2])
        return {"eps": eps, "latent": latent, "segmentation": maps[0], "sketch": maps[1]}

    source = grain.sources.ArrayRecordDataSource(paths)
    dataset = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(parse).batch(_BATCH)
    count, began = 0, time.perf_counter()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=16)
    for batch in dataset[: records // _BATCH].to_iter_dataset(options):
        count += len(batch["eps"])
    return {"records_per_second": round(count / (time.perf_counter() - began))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--compared", type=int, default=20_000, help="records of the comparison")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=8, help="as training has")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/cache_read"))
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    shutil.rmtree(args.workdir, ignore_errors=True)
    began = time.perf_counter()
    cache = write(args.workdir / "cache", args.examples, args.draws)
    wrote = time.perf_counter() - began
    beside = args.workdir / "array_record"
    beside.mkdir()
    for first in range(0, args.compared, 1_000):
        writer = array_record_module.ArrayRecordWriter(
            str(beside / f"{first:06d}.array_record"), "group_size:1,uncompressed"
        )
        for i in range(first, min(first + 1_000, args.compared)):
            record = cache.read(np.array([i % args.examples]), np.array([0]))
            writer.write(b"".join(record[k].tobytes() for k in ("eps", "latent", "segmentation", "sketch")))
        writer.close()
    paths = sorted(map(str, beside.iterdir()))
    found: dict[str, list] = {"cache_cold": [], "cache_warm": [], "array_record_cold": [], "array_record_warm": []}
    for _ in range(args.rounds):
        for kind in ("cold", "warm"):
            if kind == "cold":
                drop_page_cache(cache.folder)
            found[f"cache_{kind}"].append(read_cache(cache, args.compared, args.threads)["records_per_second"])
            if kind == "cold":
                drop_page_cache(beside)
            one = read_array_record(paths, args.compared, args.compared, args.threads)
            found[f"array_record_{kind}"].append(one["records_per_second"])
    drop_page_cache(cache.folder)
    whole = read_cache(cache, args.examples * args.draws, args.threads)
    began = time.perf_counter()
    Cache(cache.folder)
    size = sum(s["bytes"] for s in cache.manifest.shards.values())
    report = {
        "records": args.examples * args.draws,
        "cache_mib": round(size / 2**20),
        "array_record_mib_for_compared": round(sum(p.stat().st_size for p in beside.iterdir()) / 2**20),
        "compared": args.compared,
        "batch_size": _BATCH,
        "threads": args.threads,
        "median_records_per_second": {kind: round(common.median(v)) for kind, v in found.items()},
        "records_per_second": found,
        "all_records_from_cold": whole,
        "write_mib_per_second": round(size / 2**20 / wrote),
        "verify_mib_per_second": round(size / 2**20 / (time.perf_counter() - began)),
        "disk": subprocess.run(["df", "-T", args.workdir], capture_output=True, text=True).stdout.split()[9],
    }
    common.write_report(args.out, __doc__, report, ("grain", "array-record", "safetensors"))
    shutil.rmtree(args.workdir)


if __name__ == "__main__":
    main()
