"""What training sees of each example: its latent, its conditions on the latent's grid, its prompt's context.

The nets of the base that make them run once an example, before the first step. A latent is the mean of the
autoencoder's posterior.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcm_jax.base import Base
from mcm_jax.data.pipeline import InMemory
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

_BATCH = 8  # pictures or prompts a call of a net: the autoencoder's encoder needs half a GiB for a picture of 512x512


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Prepared examples.

    Attributes:
      source: ``latent`` (float32 ``[N, h, w, C]``; ``image``, uint8, for a base that works on pixels), each modality on
        the same grid, and, for a text-conditional base, ``prompt`` (int32 ``[N]``, a row of `contexts`).
      contexts: what the base sees of each distinct prompt, ``[P, L, D]`` in the base's dtype, on the host; row 0 is the
        empty prompt's. None for an unconditional base.
      digest: of the examples' names, where they have some: another set of files is another one.
    """

    source: InMemory
    contexts: np.ndarray | None
    digest: str


def prepare(base: Base, source: Sequence[dict], modalities: Sequence[Modality]) -> Inputs:
    """Runs the autoencoder and the text encoder over a data set.

    Args:
      base: the frozen model.
      source: random access to examples with ``image`` (uint8 ``[H, W, 3]``), every modality, and ``caption`` where the
        base wants prompts.
      modalities: which are kept.

    Raises:
      UserError: a file cannot be read, or the autoencoder gives a latent that is not finite.
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
    batches = grain.MapDataset.range(len(source)).map(load).batch(_BATCH)
    parts: dict[str, list[np.ndarray]] = {}
    quick = isinstance(source, InMemory) and not base.is_latent
    with tqdm(total=len(source), desc="preparing", unit="example", disable=quick) as bar:
        # Threads read ahead, but not far: reading is faster than encoding, and pictures are large.
        for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)):
            count = len(batch["image"])
            if base.is_latent:
                padded = batch.pop("image")[np.arange(_BATCH) % count]  # one shape is one compilation
                batch["latent"] = np.asarray(encode(base.params, padded))[:count]
                if not np.isfinite(batch["latent"]).all():
                    raise UserError(f"the autoencoder of {base.name!r} overflows; set config.base.dtype to float32")
            for name, values in batch.items():
                parts.setdefault(name, []).append(values)
            bar.update(count)
    arrays = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    contexts = None
    if base.is_text_conditional:
        prompts, which = np.unique(arrays.pop("caption"), return_inverse=True)
        arrays["prompt"] = (1 + which).astype(np.int32)
        contexts = embed(base, ["", *map(str, prompts)])
    names = "\n".join(getattr(source, "names", ()))
    return Inputs(InMemory(arrays), contexts, hashlib.sha256(f"{len(source)}\n{names}".encode()).hexdigest())


def embed(base: Base, prompts: Sequence[str]) -> np.ndarray:
    """Contexts ``[len(prompts), L, D]`` of prompts in the base's dtype, some at a time."""
    dtype = jax.tree.leaves(base.params["text_encoder"])[0].dtype
    contexts = None
    for start in range(0, len(prompts), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(prompts)))
        padded = [prompts[i] for i in rows] + [""] * (_BATCH - len(rows))
        part = np.asarray(base.embed_text(base.params, padded)).astype(dtype)
        if contexts is None:
            contexts = np.empty((len(prompts), *part.shape[1:]), dtype)
        contexts[rows] = part[: len(rows)]
    return contexts
