"""What training sees of each example: its latent, its conditions on the latent's grid, its prompt's context.

The nets of the base that make them run once an example, before the first step. A latent is the mean of the
autoencoder's posterior.
"""

import dataclasses
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcm_jax.base import Base
from mcm_jax.data.pipeline import InMemory
from mcm_jax.modalities import Modality


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Prepared examples.

    Attributes:
      source: ``latent`` (float32 ``[N, h, w, C]``; ``image``, uint8, for a base that works on pixels), each modality on
        the same grid, and, for a text-conditional base, ``prompt`` (int32 ``[N]``, a row of `contexts`).
      contexts: what the base sees of each distinct prompt, ``[P, L, D]``; row 0 is the empty prompt's. None for an
        unconditional base.
    """

    source: InMemory
    contexts: jax.Array | None


def prepare(base: Base, source: Sequence[dict], modalities: Sequence[Modality], batch_size: int) -> Inputs:
    """Runs the autoencoder and the text encoder over a data set.

    Args:
      base: the frozen model.
      source: random access to examples with ``image`` (uint8 ``[H, W, 3]``), every modality, and ``caption`` where the
        base wants prompts.
      modalities: which are kept.
      batch_size: images or prompts a call of a net.
    """
    height, width, _ = base.latent_shape

    def load(index: int) -> dict:
        example = source[index]
        found = {m.name: m.resize_all(example[m.name][None], height, width)[0] for m in modalities}
        found["image"] = example["image"]
        if base.is_text_conditional:
            found["caption"] = example["caption"]
        return found

    encode = jax.jit(lambda params, image: base.encode(params, image.astype(jnp.float32) / 127.5 - 1))
    batches = grain.MapDataset.range(len(source)).map(load).batch(batch_size)
    parts: dict[str, list[np.ndarray]] = {}
    with tqdm(total=len(source), desc="preparing", unit="example", disable=not base.is_latent) as bar:
        for batch in batches.to_iter_dataset():  # read ahead by threads
            count = len(batch["image"])
            if base.is_latent:
                padded = batch.pop("image")[np.arange(batch_size) % count]  # one shape is one compilation
                batch["latent"] = np.asarray(encode(base.params, padded))[:count]
            for name, values in batch.items():
                parts.setdefault(name, []).append(values)
            bar.update(count)
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    contexts = None
    if base.is_text_conditional:
        prompts, which = np.unique(arrays.pop("caption"), return_inverse=True)
        arrays["prompt"] = (1 + which).astype(np.int32)
        contexts = embed(base, ["", *map(str, prompts)], batch_size)
    return Inputs(InMemory(arrays), contexts)


def embed(base: Base, prompts: Sequence[str], batch_size: int) -> jax.Array:
    """Contexts ``[len(prompts), L, D]`` of prompts, a batch at a time."""
    starts = range(0, len(prompts), batch_size)
    rows = [np.arange(start, start + batch_size) % len(prompts) for start in starts]
    parts = [base.embed_text(base.params, [prompts[i] for i in row]) for row in rows]
    return jnp.concatenate(parts)[: len(prompts)]
