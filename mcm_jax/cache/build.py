"""Builds a cache: each shard's examples are encoded, embedded, noised and predicted, and written as one file.

Shards are independent of each other. That makes a build resumable (whole shards are kept), repairable (a damaged one is
built alone) and parallel over processes (each takes every P-th shard), with the same bytes in the end.
"""

import collections
import concurrent.futures
import dataclasses
import errno
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcm_jax import distributed, sharding
from mcm_jax.base import Base
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.cache import store
from mcm_jax.data import inputs
from mcm_jax.data.pipeline import to_float
from mcm_jax.data.unreadable import check_few
from mcm_jax.draws import Draws
from mcm_jax.errors import UserError
from mcm_jax.files import is_disk_error, write_atomically
from mcm_jax.modalities import Modality

DTYPES = ("float16", "bfloat16", "float32", "int8")
_IN_FLIGHT = 2  # batches that the device has before it is asked for the first one's result
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a cache is made.

    Attributes:
      base: the frozen model; its params are put on the mesh unless they are there, see :func:`mcm_jax.sharding.place`.
      source: random access to examples and their views, ``V`` rows for each (see :mod:`mcm_jax.data`).
      modalities: which conditions are kept.
      draws: timesteps, noise, dropped prompts.
      dtype: how predictions are stored, one of :data:`DTYPES`.
      batch_size: predictions at a time, over all devices of a process.
      mesh: this process's devices.
      grid: height and width of the conditions, :meth:`mcm_jax.mcm.Modulator.grid`; the latent's if left out.
    """

    base: Base
    source: Sequence[dict]
    modalities: Sequence[Modality]
    draws: Draws
    dtype: str
    batch_size: int
    mesh: jax.sharding.Mesh = dataclasses.field(default_factory=sharding.local_mesh)
    grid: tuple[int, int] | None = None


def quantise(eps: jax.Array, dtype: str) -> dict[str, jax.Array]:
    """Predictions ``[B, H, W, C]`` as they are stored: ``eps``, and ``eps_scale`` (float32 ``[B, C]``) for int8."""
    if dtype != "int8":
        return {"eps": eps.astype(dtype)}
    scale = jnp.max(jnp.abs(eps), axis=(1, 2)) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return {"eps": jnp.round(eps / scale[:, None, None, :]).astype(jnp.int8), "eps_scale": scale}


def dequantise(stored: Mapping[str, jax.Array]) -> jax.Array:
    """What :func:`quantise` gave, as float32."""
    eps = stored["eps"].astype(jnp.float32)
    return eps * stored["eps_scale"][:, None, None, :] if "eps_scale" in stored else eps


def build(folder: pathlib.Path, plan: store.Manifest, recipe: Recipe) -> list[str]:
    """Makes a cache complete: builds the shards that are missing or damaged.

    Every process of a cluster calls this. They share the shards out, and the first one writes the manifest.

    Args:
      folder: of the cache, which the first process holds by :func:`mcm_jax.cache.store.lock`. There is nothing yet, or
        a cache, complete or not, that was made of the same.
      plan: the manifest without its shards.
      recipe: what it describes.

    Returns:
      The names of the shards that all processes built.

    Raises:
      UserError: the folder holds something else, the disk is full or fails, a file of the data cannot be read, or a
        prediction is not finite. Shards that are complete stay, and the same call goes on.
    """
    try:
        return _build(folder, plan, recipe)
    except OSError as e:
        if not is_disk_error(e):
            raise
        raise UserError(
            f"{folder}: the cache could not be written ({e.strerror or e}: {e.filename or folder}). The shards that "
            f"are complete are kept: mend that, or take another config.cache.path, and run the same command again"
        ) from e


def _build(folder: pathlib.Path, plan: store.Manifest, recipe: Recipe) -> list[str]:
    process, processes = jax.process_index(), jax.process_count()
    if process == 0:
        kept = _kept(folder)
        for leftover in store.leftovers(folder):
            leftover.unlink()
        if not (folder / store.MANIFEST).exists():
            plan.write(folder / store.BUILDING)
        _restart_journal(folder, kept)
    distributed.synchronise("cache tidied")
    if process:
        kept = _kept(folder)
    whole = set.intersection(*map(set, distributed.everyones(sorted(kept)).values()))  # to all of them
    kept = {name: entry for name, entry in kept.items() if name in whole}
    _check_few(folder, dataclasses.replace(plan, shards=kept), recipe)
    names = [store.shard_name(i) for i in range(plan.shard_count)]
    missing = [i for i, name in enumerate(names) if name not in kept]
    own = missing[process::processes]
    each = bytes_of_an_example(plan, recipe)
    needed = each * sum(len(plan.rows(i)) for i in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the cache needs {needed / 2**20:,.1f} MiB more there, but {free / 2**20:,.1f} MiB are free. "
            f"Free space, take another config.cache.path, or store less (config.draws.count, config.cache.dtype)"
        )
    distributed.synchronise("cache kept")  # before the first process writes a file of its own
    written = 0

    def write(number: int, tensors: dict[str, np.ndarray]) -> int:
        path = folder / store.shard_name(number)
        entry = store.write_shard(path, tensors)
        passed_over = getattr(recipe.source, "skipped", {})
        if skipped := [i for i in plan.rows(number) if i in passed_over]:
            entry["skipped"] = skipped
        with (folder / store.JOURNAL.format(process)).open("a") as journal:
            journal.write("\n" + json.dumps({"shard": path.name, **entry}) + "\n")  # a torn line stays alone
        return len(plan.rows(number))

    try:
        # One shard is written while the device works on the next one.
        with concurrent.futures.ThreadPoolExecutor(1) as writer:
            pending = None
            for number, tensors in _shards(plan, recipe, own):
                written += pending.result() if pending else 0
                pending = writer.submit(write, number, tensors)
            written += pending.result() if pending else 0
    except OSError as e:
        if e.errno not in _FULL:
            raise
        left = needed - each * written
        raise UserError(
            f"{folder}: the disk is full ({e.strerror}); {left / 2**20:,.1f} MiB more are needed there. The shards "
            f"that are complete are kept: free space and run the same command again"
        ) from e
    distributed.synchronise("cache built")
    if process == 0:
        shards = kept | store.written_shards(folder)
        if absent := [name for name in names if name not in shards]:
            raise UserError(
                f"{folder}: {len(absent)} shards of other processes are not there, {absent[0]} the first. All "
                f"processes need one folder, on a file system that they share (config.cache.path)"
            )
        made = dataclasses.replace(plan, shards={name: shards[name] for name in names})
        _check_few(folder, made, recipe)
        made.write(folder / store.MANIFEST)
        for leftover in (folder / store.BUILDING, *folder.glob(store.JOURNAL.format("*"))):
            leftover.unlink(missing_ok=True)
    distributed.synchronise("cache manifest")
    return [names[i] for i in missing]


def _check_few(folder: pathlib.Path, made: store.Manifest, recipe: Recipe) -> None:
    """Refuses shards of which too many examples were passed over, by all processes and builds together."""
    names = getattr(recipe.source, "names", ())
    check_few(made.skipped, made.examples, names, f". Mend them and take another config.cache.path than {folder}")


def _kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The shards that are there and whole."""
    there = store.Manifest.find(folder)
    known = (there.shards if there else {}) | store.written_shards(folder)
    if strangers := store.clutter(folder):
        raise UserError(
            f"{folder}: holds files that are no part of a cache: {', '.join(list(strangers)[:3])}. Take a new folder "
            f"(config.cache.path)"
        )
    known = {name: known[name] for name in sorted(known)}
    wrong = store.verify(folder, known)
    return {name: entry for name, entry in known.items() if name not in wrong}


def _restart_journal(folder: pathlib.Path, kept: Mapping[str, Mapping[str, Any]]) -> None:
    """Leaves one journal, of what is kept: lines of earlier builds must not speak of shards that this one builds."""
    first = folder / store.JOURNAL.format(0)
    lines = [json.dumps({"shard": name, **entry}) + "\n" for name, entry in kept.items()]
    write_atomically(first, "".join(lines).encode())
    for journal in folder.glob(store.JOURNAL.format("*")):
        if journal != first:
            journal.unlink()


def bytes_of_an_example(plan: store.Manifest, recipe: Recipe) -> int:
    """What an example takes in a shard, all its draws and views together."""
    base, latent = recipe.base, int(np.prod(recipe.base.latent_shape))
    channels = base.latent_shape[-1]
    eps = latent * 1 + 4 * channels if recipe.dtype == "int8" else latent * jnp.dtype(recipe.dtype).itemsize
    example = inputs.load_example(base, recipe.source, recipe.modalities, 0, recipe.grid)
    view = 2 * latent if base.is_latent else example["image"].nbytes
    view += sum(example[name].nbytes for name in (*(m.name for m in recipe.modalities), "present") if name in example)
    return 4 + plan.draws * (eps + 4) + plan.views * view


def _shards(
    plan: store.Manifest, recipe: Recipe, numbers: Sequence[int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the tensors of each shard."""
    mesh = recipe.mesh
    base = dataclasses.replace(recipe.base, params=sharding.place(recipe.base.params, mesh))
    predict = _Predictor(base, recipe)
    per_shard = {
        number: inputs.chunks([i * plan.views + v for i in plan.rows(number) for v in range(plan.views)], mesh)
        for number in numbers
    }
    encoded = inputs.encode(base, recipe.source, recipe.modalities, sum(per_shard.values(), []), mesh, recipe.grid)
    total = sum(len(plan.rows(i)) for i in range(plan.shard_count)) * plan.draws
    left = sum(len(plan.rows(i)) for i in numbers) * plan.draws
    with tqdm(total=total, initial=total - left, desc="predicting", unit="draw", dynamic_ncols=True) as bar:
        for number in numbers:
            index = np.array(plan.rows(number), np.int32)
            parts = [next(encoded) for _ in per_shard[number]]
            views = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            captions = views.pop("caption")[:: plan.views] if base.is_text_conditional else None
            kept = {name: v.reshape(len(index), plan.views, *v.shape[1:]) for name, v in views.items()}
            with sharding.memory_errors(
                f"the base and {recipe.batch_size} predictions at a time",
                "Fewer at a time: config.cache.batch_size; or a smaller base: config.base.dtype=bfloat16",
            ):
                predicted = predict(index, kept, captions, plan.draws, bar.update)
            yield number, {"index": index, **kept, **predicted}
    predict.cuts.warn(stacklevel=3)


class _Predictor:
    """Predictions for all draws of some examples, in batches of one shape.

    Attributes:
      cuts: the captions of all calls, and those that were too long.
    """

    def __init__(self, base: Base, recipe: Recipe):
        self.cuts = Cuts()
        self._base, self._recipe, self._mesh = base, recipe, recipe.mesh
        draws, dtype = recipe.draws, recipe.dtype
        self._dropped = jax.jit(draws.prompt_is_dropped)

        @jax.jit
        def step(params, batch, context):
            x0 = to_float(batch, ())["image"] if "image" in batch else batch["latent"].astype(jnp.float32)
            x_t, _, t = draws.noised(base.schedule, x0, batch["index"], batch["draw"])
            eps = base.predict(params, x_t, t, *(() if context is None else (context,)))
            stored = quantise(eps, dtype)
            finite = jnp.isfinite(eps) & jnp.isfinite(dequantise(stored))  # int8 holds a NaN as 0
            return {**stored, "t": t}, finite.all(axis=(1, 2, 3))

        self._step = step

    def __call__(
        self,
        index: np.ndarray,
        kept: Mapping[str, np.ndarray],
        captions: np.ndarray | None,
        count: int,
        progress: Callable[[int], object],
    ) -> dict[str, np.ndarray]:
        """``eps``, ``t`` and perhaps ``eps_scale``, ``[n, K, ...]`` of the examples ``index``."""
        name = "latent" if "latent" in kept else "image"
        examples, views = kept[name].shape[:2]
        row, draw = (a.astype(np.int32) for a in np.divmod(np.arange(examples * count), count))
        which, contexts = None, None
        if captions is not None:
            which, contexts = inputs.embed_distinct(self._base, captions, self.cuts)
            dropped = np.asarray(self._dropped(index[row], draw))
            which = np.where(dropped, 0, which[row])

        def begin(start: int) -> tuple[int, Any]:
            at = np.minimum(np.arange(start, start + self._recipe.batch_size), len(row) - 1)  # one shape
            batch = {name: kept[name][row[at], draw[at] % views], "index": index[row[at]], "draw": draw[at]}
            context = None if which is None else sharding.split_batch(contexts[which[at]], self._mesh)
            return start, self._step(self._base.params, sharding.split_batch(batch, self._mesh), context)

        out: dict[str, np.ndarray] = {}

        def finish(start: int, result: tuple[dict[str, jax.Array], jax.Array]) -> None:
            size = min(self._recipe.batch_size, len(row) - start)
            values, finite = jax.device_get(result)
            if not finite[:size].all():
                bad = start + int(np.argmin(finite[:size]))
                raise UserError(
                    f"the prediction of {self._base.name!r} for example {index[row[bad]]}, draw {draw[bad]} (timestep "
                    f"{values['t'][bad - start]}) is not finite in {self._recipe.dtype}. Set config.cache.dtype to "
                    f"bfloat16 or float32, or config.base.dtype to float32"
                )
            for key, value in values.items():
                if key not in out:
                    out[key] = np.empty((len(row), *value.shape[1:]), value.dtype)
                out[key][start : start + size] = value[:size]
            progress(size)

        pending: collections.deque = collections.deque()
        for start in range(0, len(row), self._recipe.batch_size):
            pending.append(begin(start))
            if len(pending) > _IN_FLIGHT:
                finish(*pending.popleft())
        for item in pending:
            finish(*item)
        return {key: value.reshape(examples, count, *value.shape[1:]) for key, value in out.items()}
