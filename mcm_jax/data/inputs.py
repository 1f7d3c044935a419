"""What training sees of each example: its latent, its conditions on the latent's grid, its prompt's context.

The nets of the base that make them run once an example. A latent is the mean of the autoencoder's posterior, rounded to
float16, whether it is kept in memory or in a cache.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcm_jax import sharding
from mcm_jax.base import Base
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.data.pipeline import InMemory
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

PREPROCESSING = 1
"""Part of a cache's fingerprint. Raised when an example's picture, conditions, views or draws come out otherwise than
before: fitting to the base's size, a modality's resizing, cropping, timesteps, noise."""

# Pictures or prompts a call of a net, on each device: the autoencoder's encoder needs half a GiB for one of 512x512.
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Prepared examples.

    Attributes:
      source: ``latent`` (float16 ``[N, h, w, C]``; ``image``, uint8, for a base that works on pixels), each modality on
        the same grid, ``present`` (uint8 ``[N, M]``) where examples may miss some, and, for a text-conditional base,
        ``prompt`` (int32 ``[N]``, a row of `contexts`).
      contexts: what the base sees of each distinct prompt, ``[P, L, D]`` in the base's dtype, on the host; row 0 is the
        empty prompt's. None for an unconditional base.
    """

    source: InMemory
    contexts: np.ndarray | None


def prepare(base: Base, source: Sequence[dict], modalities: Sequence[Modality], mesh: jax.sharding.Mesh) -> Inputs:
    """Runs the autoencoder and the text encoder over a data set.

    Every process of a mesh calls this; each reads all examples and keeps all results, and its devices do their share.

    Args:
      base: the frozen model, its params on the mesh by :func:`mcm_jax.sharding.place`.
      source: random access to examples with ``image`` (uint8 ``[H, W, 3]``), every modality, and ``caption`` where the
        base wants prompts.
      modalities: which are kept.
      mesh: of devices that share the work.

    Raises:
      UserError: a file cannot be read, or the autoencoder gives a latent that is not finite.
    """
    parts: dict[str, list[np.ndarray]] = {}
    quick = isinstance(source, InMemory) and not base.is_latent
    with tqdm(total=len(source), desc="preparing", unit="example", disable=quick) as bar:
        for batch in encode(base, source, modalities, chunks(range(len(source)), mesh), mesh):
            for name, values in batch.items():
                parts.setdefault(name, []).append(values)
            bar.update(len(values))
    arrays = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    contexts = None
    if base.is_text_conditional:
        cuts = Cuts()
        arrays["prompt"], contexts = embed_distinct(base, arrays.pop("caption"), cuts)
        cuts.warn(stacklevel=2)
    return Inputs(InMemory(arrays), contexts)


def chunks(rows: Sequence[int], mesh: jax.sharding.Mesh) -> list[Sequence[int]]:
    """Rows in the portions that :func:`encode` takes; the last one may be short."""
    size = _BATCH * mesh.size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def load_example(base: Base, source: Sequence[dict], modalities: Sequence[Modality], index: int) -> dict:
    """One example: ``image`` and ``present`` as they are, conditions on the latent's grid, perhaps ``caption``."""
    height, width, _ = base.latent_shape
    example = source[index]
    found = {m.name: m.resize_all(example[m.name][None], height, width)[0] for m in modalities}
    found |= {name: example[name] for name in ("image", "present") if name in example}
    if base.is_text_conditional:
        found["caption"] = example["caption"]
    return found


def encode(
    base: Base,
    source: Sequence[dict],
    modalities: Sequence[Modality],
    portions: Sequence[Sequence[int]],
    mesh: jax.sharding.Mesh,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields each portion of rows, stacked: ``latent`` or ``image``, the modalities, ``present``, ``caption``.

    Threads read ahead while the caller's device works, but not far: pictures are large. The arguments and errors are
    those of :func:`prepare`; `portions` are from :func:`chunks`.
    """

    def load(rows: Sequence[int]) -> dict[str, np.ndarray]:
        examples = [load_example(base, source, modalities, int(row)) for row in rows]
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

    @jax.jit
    def net(params, image):
        latent = base.encode(params, image.astype(jnp.float32) / 127.5 - 1).astype(jnp.float16)
        return sharding.keep_whole(latent, mesh)  # for each process to read

    size = _BATCH * mesh.size
    own = sharding.local_rows(mesh, size)
    batches = grain.MapDataset.source(portions).map(load)
    for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)):
        if base.is_latent:
            image = batch.pop("image")
            count = len(image)
            padded = image[own % count]  # one shape is one compilation
            batch["latent"] = np.asarray(net(base.params, sharding.split_batch(padded, mesh)))[:count]
            if not np.isfinite(batch["latent"]).all():
                raise UserError(
                    f"the autoencoder of {base.name!r} overflows (a latent that float16 cannot hold); set "
                    f"config.base.dtype to float32"
                )
        yield batch


def embed_distinct(base: Base, captions: np.ndarray, cuts: Cuts) -> tuple[np.ndarray, np.ndarray]:
    """Rows of contexts, int32 ``[N]`` from 1, and contexts, as in :class:`Inputs`, of captions (texts ``[N]``).

    `cuts` counts the captions, and those that are too long, which there is no warning about here.
    """
    prompts, which = np.unique(captions, return_inverse=True)
    cut: dict[str, str] = {}
    contexts = embed(base, ["", *map(str, prompts)], cut)
    cuts.add(map(str, captions), cut)
    return (1 + which).astype(np.int32), contexts


def embed(base: Base, prompts: Sequence[str], cut: dict[str, str] | None = None) -> np.ndarray:
    """Contexts ``[len(prompts), L, D]`` of prompts in the base's dtype, some at a time; `cut` as in the base."""
    dtype = jax.tree.leaves(base.params["text_encoder"])[0].dtype
    contexts = None
    for start in range(0, len(prompts), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(prompts)))
        padded = [prompts[i] for i in rows] + [""] * (_BATCH - len(rows))
        part = np.asarray(base.embed_text(base.params, padded, cut)).astype(dtype)
        if contexts is None:
            contexts = np.empty((len(prompts), *part.shape[1:]), dtype)
        contexts[rows] = part[: len(rows)]
    return contexts
