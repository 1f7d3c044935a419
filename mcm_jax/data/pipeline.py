"""From a source of paired examples to numpy batches.

A source is anything with ``len`` and ``[i]`` that gives an array for each modality, and ``image`` (uint8 ``[H, W, C]``)
or what was made of it (:mod:`.inputs`). It is shuffled anew every epoch, and batch k is a function of (source, seed,
k): a resumed run needs no iterator state to see what the uninterrupted one would have seen.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcm_jax.data.scenes import Scenes

if TYPE_CHECKING:
    import grain

_ENDLESS = 2**40  # batches


def _render(scenes: Scenes, index: int) -> dict[str, np.ndarray]:
    example = scenes[index]
    return {
        "image": np.round((example["image"] + 1) * 127.5).astype(np.uint8),
        "segmentation": example["segmentation"],
        "sketch": np.round(example["sketch"] * 255).astype(np.uint8),
        "caption": np.array(example["caption"]),
    }


def _ignore_interrupts() -> None:
    """Ctrl-C is the parent's business; a worker would only add its traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class InMemory:
    """A source held in memory, 8 bits a value: ``image``, ``segmentation``, ``sketch`` and ``caption`` of each example.

    Args:
      arrays: stacked over examples.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    @classmethod
    def render(cls, scenes: Scenes) -> "InMemory":
        """Renders all scenes, about 10 ms each at 32x32, on all cores where there are many."""
        indices = range(len(scenes))
        render = functools.partial(_render, scenes)
        if len(scenes) < 400:
            examples = [render(i) for i in indices]
        else:  # spawned, since a process with JAX's threads must not be forked
            context = multiprocessing.get_context("spawn")
            workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
            with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts) as pool:
                examples = list(pool.map(render, indices, chunksize=50))
        return cls({key: np.stack([e[key] for e in examples]) for key in examples[0]})

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[index] for key, value in self.arrays.items()}


def to_float(example: dict[str, np.ndarray], maps: Sequence[str]) -> dict[str, np.ndarray]:
    """8-bit values as the API has them: the image in [-1, 1], each of ``maps`` in [0, 1], all float32."""
    out = dict(example)
    if "image" in out:
        out["image"] = example["image"].astype(np.float32) / 127.5 - 1
    for name in maps:
        out[name] = example[name].astype(np.float32) / 255
    return out


class Order:
    """Which examples a step sees: all of them once an epoch, in an order that is drawn anew for each.

    Args:
      examples: how many there are.
      batch_size: examples a step.
      seed: of the order.
    """

    def __init__(self, examples: int, batch_size: int, seed: int):
        self._examples, self._batch_size = examples, batch_size

        @functools.lru_cache(maxsize=2)  # whole epochs: Grain's own shuffle takes longer than reading a record
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)

        self._order = order

    def __call__(self, step: int, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Examples of a step (from 0), and how often each was seen before: int32 ``[B]``, or of some rows of it."""
        own = np.arange(self._batch_size) if rows is None else rows
        seen, place = np.divmod(step * self._batch_size + own, self._examples)
        index = np.concatenate([self._order(int(epoch))[place[seen == epoch]] for epoch in np.unique(seen)])
        return index, seen.astype(np.int32)


def training_batches(
    read: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
    examples: int,
    batch_size: int,
    seed: int,
    repeat: int = 0,
    rows: np.ndarray | None = None,
) -> "grain.MapDataset":
    """All batches of a training run, as a sequence without end: ``training_batches(...)[step]``.

    Args:
      read: gives the stacked examples of (index, draw), both int32 ``[B]``, e.g. :meth:`mcm_jax.cache.Cache.read`.
      examples: how many there are.
      batch_size: examples a batch; a batch may span two epochs, so fewer examples than a batch work too.
      seed: of the order, which differs in every epoch.
      repeat: the draws of an example after which they come again; 0 is never.
      rows: which of a batch's rows are read, ascending; all if left out. What a row holds does not depend on it:
        processes that share batches out see, together, what one by itself would.

    Returns:
      What `read` gives, with ``index`` (which example), ``seen`` (how often before) and ``draw`` (which draw: `seen`,
      or what is left of it by `repeat`), int32 ``[B]``, or as long as `rows`. Index and draw name an example's noise.
    """

    order = Order(examples, batch_size, seed)

    def load(step: int) -> dict[str, np.ndarray]:
        index, seen = order(step, rows)
        draw = seen % repeat if repeat else seen
        return read(index, draw) | {"index": index, "seen": seen, "draw": draw}

    import grain  # not where pictures are only drawn

    return grain.MapDataset.range(_ENDLESS).map(load)
