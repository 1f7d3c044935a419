"""What training sees of each example: its latent, its conditions on the grid of the MCM's, its prompt's context.

Prepared examples (:class:`Inputs`) are made once, before training, and kept in memory. Streamed ones
(:class:`Streamed`) are made anew for each batch, in memory that does not grow with the data set: the same values, but
for the rounding of the nets, which on CPUs depends on an example's place among those that they see at a time. A latent
is the mean of the autoencoder's posterior, rounded to float16, wherever it is kept.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

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
        its grid, ``present`` (uint8 ``[N, M]``) where examples may miss some, and, for a text-conditional base,
        ``prompt`` (int32 ``[N]``, a row of `contexts`).
      contexts: what the base sees of each distinct prompt, ``[P, L, D]`` in the base's dtype, on the host; row 0 is the
        empty prompt's. None for an unconditional base.
    """

    source: InMemory
    contexts: np.ndarray | None

    encode = None
    """Latents are there."""

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some examples, stacked."""
        return self.source[rows]

    def context(self, batch: Mapping[str, np.ndarray], dropped: np.ndarray) -> np.ndarray:
        """What the base sees of a batch's prompts, ``[B, L, D]``; of the empty one where `dropped`, bool ``[B]``."""
        return self.contexts[np.where(dropped, 0, batch["prompt"])]


class Streamed:
    """What :class:`Inputs` gives, of examples that are read, encoded and embedded for each batch.

    Args:
      base: the frozen model, its params on the mesh by :func:`mcm_jax.sharding.place`.
      source: as :func:`prepare` takes it.
      modalities: which are kept.
      mesh: what batches are split over.
      grid: as :func:`prepare` takes it.

    Attributes:
      encode: of a latent base: this process's pictures of a batch, uint8 ``[B, H, W, 3]``, to their latents. Every
        process of a mesh calls it for the same batches, in their order. None for a base that works on pixels.

    Raises:
      UserError: prompts, in several processes, which would not embed the same ones. With :meth:`read`: a file cannot
        be read.
    """

    def __init__(
        self,
        base: Base,
        source: Sequence[dict],
        modalities: Sequence[Modality],
        mesh: jax.sharding.Mesh,
        grid: tuple[int, int] | None = None,
    ):
        if base.is_text_conditional and jax.process_count() > 1:
            raise UserError(
                f"config.data.stream: prompts are not streamed in {jax.process_count()} processes. Train from a cache "
                f"(config.cache.mode=build), or set data.stream to off"
            )
        self._base, self._source, self._modalities, self._grid = base, source, modalities, grid
        self.encode = make_encode(base, mesh) if base.is_latent else None
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some examples, stacked: ``image`` in the place of ``latent``, ``caption`` in that of ``prompt``."""
        return load(self._base, self._source, self._modalities, rows, self._grid)

    def context(self, batch: Mapping[str, np.ndarray], dropped: np.ndarray) -> np.ndarray:
        """As :meth:`Inputs.context`."""
        cuts = Cuts()
        which, contexts = embed_distinct(self._base, np.where(dropped, "", batch["caption"]), cuts)
        if cuts.count and not self._has_warned:
            self._has_warned = True
            cuts.warn(stacklevel=2)
        return contexts[which]


def prepared_bytes(
    base: Base,
    source: Sequence[dict],
    modalities: Sequence[Modality],
    grid: tuple[int, int] | None = None,
    views: int = 1,
) -> int:
    """What :func:`prepare` would keep of a data set, if each example has a prompt of its own: by the first one.

    Args:
      base: as :func:`prepare` takes it, as are source, modalities and grid.
      source: ``views`` rows for each example.
      modalities: which are kept.
      grid: height and width of the conditions.
      views: of each example, which share its prompt.
    """
    example = load_example(base, source, modalities, 0, grid)
    own = 2 * int(np.prod(base.latent_shape)) if base.is_latent else example["image"].nbytes
    if base.is_text_conditional:
        ids = jax.ShapeDtypeStruct((1, base.tokenizer.length), jnp.int32)
        context = jax.eval_shape(base.encode_tokens, base.params, ids)
        own += context.size * jax.tree.leaves(base.params["text_encoder"])[0].dtype.itemsize / views
    own += sum(v.nbytes for name, v in example.items() if name not in ("image", "caption"))
    return round(len(source) * own)


def prepare(
    base: Base,
    source: Sequence[dict],
    modalities: Sequence[Modality],
    mesh: jax.sharding.Mesh,
    grid: tuple[int, int] | None = None,
) -> Inputs:
    """Runs the autoencoder and the text encoder over a data set.

    Every process of a mesh calls this; each reads all examples and keeps all results, and its devices do their share.

    Args:
      base: the frozen model, its params on the mesh by :func:`mcm_jax.sharding.place`.
      source: random access to examples with ``image`` (uint8 ``[H, W, 3]``), every modality, and ``caption`` where the
        base wants prompts.
      modalities: which are kept.
      mesh: of devices that share the work.
      grid: height and width of the conditions, :meth:`mcm_jax.mcm.Modulator.grid`; the latent's if left out.

    Raises:
      UserError: a file cannot be read, or the autoencoder gives a latent that is not finite.
    """
    parts: dict[str, list[np.ndarray]] = {}
    quick = isinstance(source, InMemory) and not base.is_latent
    with tqdm(total=len(source), desc="preparing", unit="example", disable=quick) as bar:
        for batch in encode(base, source, modalities, chunks(range(len(source)), mesh), mesh, grid):
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


def load_example(
    base: Base,
    source: Sequence[dict],
    modalities: Sequence[Modality],
    index: int,
    grid: tuple[int, int] | None = None,
) -> dict:
    """One example: ``image`` and ``present`` as they are, conditions on their grid, perhaps ``caption``."""
    height, width = grid or base.latent_shape[:2]
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
    grid: tuple[int, int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields each portion of rows, stacked: ``latent`` or ``image``, the modalities, ``present``, ``caption``.

    Threads read ahead while the caller's device works, but not far: pictures are large. The arguments and errors are
    those of :func:`prepare`; `portions` are from :func:`chunks`.
    """

    net = _make_net(base, mesh) if base.is_latent else None
    own = sharding.local_rows(mesh, _BATCH * mesh.size)
    import grain  # not where pictures are only drawn

    batches = grain.MapDataset.source(portions).map(lambda rows: load(base, source, modalities, rows, grid))
    for batch in batches.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)):
        if net:
            image = batch.pop("image")
            batch["latent"] = net(image[own % len(image)])[: len(image)]
        yield batch


def load(
    base: Base,
    source: Sequence[dict],
    modalities: Sequence[Modality],
    rows: Sequence[int],
    grid: tuple[int, int] | None,
) -> dict[str, np.ndarray]:
    """:func:`load_example` of some rows, stacked."""
    examples = [load_example(base, source, modalities, int(row), grid) for row in rows]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def make_encode(base: Base, mesh: jax.sharding.Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function of pictures, uint8 ``[n, H, W, 3]``, to latents, float16: of this process's rows of any batch.

    They go through the net in portions of the size that :func:`encode` has.
    """
    net, own = _make_net(base, mesh), sharding.local_rows(mesh, _BATCH * mesh.size)

    def run(images: np.ndarray) -> np.ndarray:
        parts = [images[start : start + len(own)] for start in range(0, len(images), len(own))]
        return np.concatenate([net(part[np.arange(len(own)) % len(part)])[own[: len(part)]] for part in parts])

    return run


def _make_net(base: Base, mesh: jax.sharding.Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function of this process's rows of a portion to all its latents: one shape is one compilation."""

    @jax.jit
    def net(params, image):
        latent = base.encode(params, image.astype(jnp.float32) / 127.5 - 1).astype(jnp.float16)
        return sharding.keep_whole(latent, mesh)  # for each process to read

    def run(images: np.ndarray) -> np.ndarray:
        with sharding.memory_errors(
            f"the base and its autoencoder's work on {_BATCH} pictures", "A smaller base: config.base.dtype=bfloat16"
        ):
            latents = np.asarray(net(base.params, sharding.split_batch(images, mesh)))
        if not np.isfinite(latents).all():
            raise UserError(
                f"the autoencoder of {base.name!r} overflows (a latent that float16 cannot hold); set "
                f"config.base.dtype to float32"
            )
        return latents

    return run


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
