"""Where training's predictions come from: the base itself, or a cache. The loop sees one iterator of records."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax import sharding
from mcm_jax.base import Base, BaseCard
from mcm_jax.cache import Cache
from mcm_jax.cache.build import dequantise
from mcm_jax.data.inputs import Inputs, Streamed
from mcm_jax.data.pipeline import training_batches
from mcm_jax.draws import Draws
from mcm_jax.training.step import Record, micro_batches

_STORED = ("eps", "eps_scale")  # of a cache's batch; all else is what the base's own has, too
_ON_HOST = ("caption",)


@dataclasses.dataclass(frozen=True)
class Feed:
    """A source of batches, and how each gets its prediction.

    Attributes:
      card: what is known of the base.
      data: SHA-256 of the fingerprints of the data.
      examples: how many.
      read: stacked examples of (index, draw), int32 ``[B]``.
      predict: ``eps`` (float32, on the devices) of this process's rows of a batch and the record that was made of it.
      repeat: K, where the same draws come again after K epochs; 0 where they never do.
      names: of the examples, where they have any.
      skipped: examples that could not be read so far, in whose places others are: :mod:`mcm_jax.data.unreadable`.
      encode: where batches have pictures in the place of latents: the latents of this process's.
    """

    card: BaseCard
    data: str
    examples: int
    read: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    predict: Callable[[Mapping[str, Any], Record], jax.Array]
    repeat: int
    names: Sequence[str] = ()
    skipped: Collection[int] = ()
    encode: Callable[[np.ndarray], np.ndarray] | None = None

    def records(
        self,
        noise_step: Callable[[Mapping[str, jax.Array]], Record],
        *,
        batch_size: int,
        seed: int,
        steps: range,
        mesh: jax.sharding.Mesh,
        waited: Callable[[float], object] = lambda seconds: None,
    ) -> Iterator[Record]:
        """Yields the record of each step: x_t, noise, t, conditions and ``eps``. Threads read ahead.

        Each process reads the rows that its devices hold, of the batches that one process by itself would see.

        Args:
          noise_step: from :func:`mcm_jax.training.step.make_noise_step`.
          batch_size: examples a batch.
          seed: of the order.
          steps: which; a resumed run begins later.
          mesh: what batches are split over.
          waited: is told, before each record, how many seconds its batch was not there yet.
        """
        rows = sharding.local_rows(mesh, batch_size)
        batches = training_batches(self.read, self.examples, batch_size, seed, self.repeat, rows)
        later = _ON_HOST + ("image",) * (self.encode is not None)

        def split(batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
            return batch, sharding.split_batch({k: v for k, v in batch.items() if k not in later}, mesh)

        ahead = batches[steps.start : steps.stop].map(split)
        ready = iter(ahead.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)))
        for _ in steps:
            began = time.perf_counter()
            batch, on_device = next(ready)
            waited(time.perf_counter() - began)
            if self.encode:
                on_device["latent"] = sharding.split_batch(self.encode(batch["image"]), mesh)
            record = noise_step({k: v for k, v in on_device.items() if k not in _STORED})
            stored = {k: v for k, v in on_device.items() if k in _STORED}
            yield record | {"eps": self.predict(stored or batch, record)}


def online(
    base: Base,
    inputs: Inputs | Streamed,
    draws: Draws,
    views: int,
    data: Mapping[str, str],
    mesh: jax.sharding.Mesh,
    *,
    accumulate: int = 1,
    names: Sequence[str] = (),
    skipped: Collection[int] = (),
) -> Feed:
    """Predictions by the base, as they are needed: new draws without end.

    Args:
      base: the frozen model, its params on the mesh by :func:`mcm_jax.sharding.place`.
      inputs: the examples, `views` rows for each.
      draws: timesteps, noise, dropped prompts.
      views: of each example; each group of K draws takes the first, second, ... of them in turn.
      data: fingerprints of the data.
      mesh: what batches are split over.
      accumulate: parts that the base sees a batch in, one after the other: as much less memory for activations.
      names: of the examples.
      skipped: those that could not be read so far.
    """

    @jax.jit
    def predict(params: Any, *args: jax.Array) -> jax.Array:
        # Without a fourth argument where there is no context: any function of three can stand for a base's predict.
        if accumulate == 1:
            return base.predict(params, *args).astype(jnp.float32)
        parts = [micro_batches(a, accumulate) for a in args]
        eps = jax.lax.map(lambda part: base.predict(params, *part).astype(jnp.float32), parts)
        return jnp.moveaxis(eps, 0, 1).reshape(args[0].shape)

    dropped = jax.jit(draws.prompt_is_dropped)

    def fresh(batch: Mapping[str, np.ndarray], record: Record) -> jax.Array:
        args = [record["x_t"], record["t"]]
        if base.is_text_conditional:
            context = inputs.context(batch, np.asarray(dropped(batch["index"], batch["draw"])))
            args.append(sharding.split_batch(context, mesh))
        return predict(base.params, *args)

    def read(index: np.ndarray, draw: np.ndarray) -> dict[str, np.ndarray]:
        return inputs.read(index * views + draw % draws.count % views)

    return Feed(
        base.card, _digest(data), len(inputs) // views, read, fresh, 0, names, skipped=skipped, encode=inputs.encode
    )


def cached(cache: Cache) -> Feed:
    """Predictions from a cache: the base is neither run nor in memory."""
    undo = jax.jit(dequantise)
    m = cache.manifest
    predict = lambda batch, record: undo(batch)  # noqa: E731
    return Feed(cache.card, _digest(m.data), m.examples, cache.read, predict, repeat=m.draws, skipped=m.skipped)


def _digest(fingerprints: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(fingerprints), sort_keys=True).encode()).hexdigest()
