"""Finds and reads the weights of one component of a base: names, shapes and dtypes first, then tensor by tensor.

A component's folder holds them in one safetensors file, in several with an index (``*.safetensors.index.json``), or in
a variant of either (``.fp16.``). A ``.bin`` file, which is a pickle, is read only where there is nothing else and
PyTorch is installed, and by its reader that unpickles tensors alone.

The stored tensors are matched against the names and shapes that a Flax module asks for (``jax.eval_shape`` of its
``init``), so an error can list both sides; the files are trusted for nothing else. Each tensor is read, cast and
dropped before the next one: there are never two copies of a model in memory.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from mcm_jax.errors import UserError

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# safetensors' names of the types that are read
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_FLOATING = ("float64", "float32", "float16", "bfloat16")
# What the files of a component are called: diffusers' networks and transformers' models.
NETWORK, TEXT_MODEL = "diffusion_pytorch_model", "model"
_PICKLED = {NETWORK: NETWORK, TEXT_MODEL: "pytorch_model"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
# Attention layers as diffusers named them before 0.12; files with these names are still on the Hub.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONVERT = "convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)"


class BaseLoadError(UserError):
    """A folder that cannot be loaded as a base; says which file, what was found and what is expected."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read.

    Attributes:
        shape: as stored, in PyTorch's layout.
        dtype: its name; a type that numpy or ml_dtypes does not have keeps the file's own name.
        read: returns the tensor; called once.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_json(file: Path, expected: str = "") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        file: where it is.
        expected: what a message on a missing file ends in.

    Raises:
        BaseLoadError: no such file, or it holds something else.
    """
    if not file.is_file():
        raise BaseLoadError(f"{file}: no such file{expected}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:  # malformed JSON, or not UTF-8
        raise BaseLoadError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BaseLoadError(f"{file}: found a JSON {type(content).__name__}, expected an object")
    return content


def find_weights(folder: Path, stem: str) -> Path:
    """The file to read, or the index of several.

    Args:
        folder: the component's.
        stem: :data:`NETWORK` or :data:`TEXT_MODEL`.

    Raises:
        BaseLoadError: nothing to read, or more than one variant.
    """
    files = sorted(file for file in folder.glob("*") if file.is_file())
    for name, suffix in ((stem, "safetensors"), (_PICKLED[stem], "bin")):
        plain, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}.index.json"
        if first := [file for file in (plain, index) if file in files]:
            return first[0]
        names = rf"{name}\.([\w-]+\.{suffix}|{suffix}\.index\.[\w-]+\.json|[\w-]+\.{suffix}\.index\.json)"
        variants = [file for file in files if re.fullmatch(names, file.name) and not _SHARD.search(file.name)]
        if len(variants) == 1:
            return variants[0]
        if variants:
            listed = ", ".join(file.name for file in variants)
            raise BaseLoadError(f"{plain}: no such file, and more than one variant of it: {listed}; leave one of them")
        if shards := [file for file in files if re.match(rf"{name}.*-\d{{5}}-of-\d{{5}}\.{suffix}$", file.name)]:
            raise BaseLoadError(f"{index}: no such file; it says which tensor is in files like {shards[0].name}")
    raise BaseLoadError(f"{folder / stem}.safetensors: no such file")


def open_weights(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a weights file, or of all files of an index, by name; none is read yet.

    Args:
        file: from :func:`find_weights`.

    Raises:
        BaseLoadError: a damaged file, or an index that does not fit its files.
    """
    if file.suffix == ".json":
        return _open_several(file)
    return _open_pickle(file) if file.suffix == ".bin" else _open_safetensors(file)


def load_params(
    file: Path, tensors: Mapping[str, StoredTensor], expected: Any, dtype: str
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Reads one component's tensors as the parameters of its Flax module, one by one.

    Args:
        file: where they are from, named in messages.
        tensors: from :func:`open_weights`.
        expected: pytree of ``jax.ShapeDtypeStruct``, the module's parameters.
        dtype: a key of :data:`DTYPES`.

    Yields:
        Path and value of each parameter, in the order of the paths joined by ``/``.

    Raises:
        BaseLoadError: tensors other than the expected ones, or values that are not finite.
    """
    try:
        yield from _convert(tensors, expected, DTYPES[dtype])
    except (ValueError, OSError) as error:
        raise BaseLoadError(f"{file}: {error}") from error


def params_from_torch(tensors: Mapping[str, np.ndarray], expected: Any, dtype: Any) -> Any:
    """Brings PyTorch tensors into the names and layouts of a Flax module.

    Args:
        tensors: by PyTorch name, of any floating type; attention layers may have diffusers' old names.
        expected: pytree of ``jax.ShapeDtypeStruct``, the module's parameters.
        dtype: numpy dtype of the result.

    Returns:
        A pytree of numpy arrays like `expected`.

    Raises:
        ValueError: missing, extra or wrong-shaped tensors (all of them, in PyTorch's names), tensors that are not
            floating-point, or values that are not finite.
    """
    stored = {name: StoredTensor(a.shape, a.dtype.name, lambda a=a: a) for name, a in tensors.items()}
    return traverse_util.unflatten_dict(dict(_convert(stored, expected, dtype)))


def torch_name(path: Sequence[str]) -> str:
    """The PyTorch name of a Flax parameter: ``("resnets_0", "conv1", "kernel")`` is ``resnets.0.conv1.weight``.

    An index at the end of a module's name is an element of a list in PyTorch; ``linear_1`` is a plain name there. A
    parameter that belongs to no layer keeps its name: ``("embeddings", "class_embedding")``.
    """
    *modules, leaf = path
    modules = [name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def torch_shape(leaf: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in PyTorch of a Flax parameter: kernels are HWIO or IO here and OIHW or OI there."""
    return (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else tuple(shape)


def _convert(
    tensors: Mapping[str, StoredTensor], expected: Any, dtype: Any
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Paths and values of all parameters; what can be told without reading a tensor is checked before the first."""
    tensors = {_modern_name(name): tensor for name, tensor in tensors.items()}
    paths = sorted(traverse_util.flatten_dict(expected).items(), key=lambda item: "/".join(item[0]))
    shapes = {torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in paths}
    wrong = [
        f"{name} (found {list(tensors[name].shape)}, expected {list(shape)})"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{label}: {some(names)}"
        for label, names in (
            ("missing tensors", sorted(shapes.keys() - tensors.keys())),
            ("unexpected tensors", sorted(tensors.keys() - shapes.keys())),
            ("wrong shapes", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError("the weights do not fit the config. " + "; ".join(problems))
    if odd := [f"{name} ({tensors[name].dtype})" for name in shapes if tensors[name].dtype not in _FLOATING]:
        raise ValueError(f"tensors that are not float16, bfloat16, float32 or float64: {some(odd)}")
    infinite = []
    for path, _ in paths:
        name = torch_name(path)
        tensor = tensors.pop(name).read()
        with np.errstate(over="ignore"):  # what overflows is reported below, by name
            tensor = tensor.astype(dtype, copy=False)
        if not np.isfinite(tensor).all():
            infinite.append(name)
        if path[-1] == "kernel":
            tensor = np.ascontiguousarray(np.transpose(tensor, (*range(2, tensor.ndim), 1, 0)))
        yield path, tensor
    if infinite:
        raise ValueError(f"NaN or infinity (as {np.dtype(dtype).name}) in {some(infinite)}")


def _modern_name(name: str) -> str:
    old = "|".join(_LEGACY_ATTENTION)
    return re.sub(
        rf"(attentions\.\d+)\.({old})\.(weight|bias)$",
        lambda match: f"{match[1]}.{_LEGACY_ATTENTION[match[2]]}.{match[3]}",
        name,
    )


def some(names: Sequence[str], limit: int = 20) -> str:
    """The names, or the first of them and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="numpy"):  # holds header, offsets, shapes and the file's length together
            pass
        with file.open("rb") as content:
            start = 8 + int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(start - 8))
    except (SafetensorError, OSError, ValueError) as error:
        raise BaseLoadError(f"{file}: damaged or truncated, not a readable safetensors file ({error})") from error

    def stored(dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> StoredTensor:
        # Read by numpy, since safetensors' own reader for it has no bfloat16.
        kind, offset = np.dtype(_STORED.get(dtype, np.void)), start + data_offsets[0]
        read = lambda: np.fromfile(file, kind, math.prod(shape), offset=offset).reshape(shape)  # noqa: E731
        name = kind.name if dtype in _STORED else re.sub(r"^I(?=\d+$)", "int", dtype)
        return StoredTensor(tuple(shape), name, read)

    header.pop("__metadata__", None)
    return {name: stored(**entry) for name, entry in header.items()}


def _open_several(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BaseLoadError(f"{index}: found no weight_map, expected one: which of several files holds each tensor")
    shards = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if Path(name).name != name or file.suffix not in (".safetensors", ".bin"):
            raise BaseLoadError(f"{index}: names the file {name!r}, expected weights beside it")
        if not file.is_file():
            raise BaseLoadError(f"{file}: no such file, but {index.name} says that it holds tensors")
        shards[name] = open_weights(file)
    if absent := [f"{name} ({shard})" for name, shard in weight_map.items() if name not in shards[shard]]:
        raise BaseLoadError(f"{index}: names tensors that are not in the files it names for them: {some(absent)}")
    if strays := [name for shard in shards.values() for name in shard if name not in weight_map]:
        raise BaseLoadError(f"{index}: does not name all tensors of its files: {some(strays)}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    try:
        import torch

        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):  # CVE-2025-32434, CVE-2026-24747
            raise ImportError(f"PyTorch {torch.__version__} is too old")
    except ImportError as error:
        raise BaseLoadError(
            f"{file}: a pickle, which can run any code when it is opened, and there is no safetensors file beside it. "
            f"Either {CONVERT}; or pip install 'mcm-jax[torch]', to read the tensors and nothing else ({error})"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name: tensor.detach() for name, tensor in state.items()}
        del state
    except Exception as error:  # of many kinds; PyTorch's text advises to switch the safe reader off, so it is left out
        plain = next(stem for stem, pickled in _PICKLED.items() if file.name.startswith(pickled))
        raise BaseLoadError(
            f"{file}: damaged, or not tensors alone (PyTorch's reader: {type(error).__name__}); expected "
            f"{file.with_name(plain)}.safetensors, or a state dict. If you trust the file, {CONVERT}"
        ) from error

    def read(name: str) -> np.ndarray:
        tensor = tensors.pop(name)
        if tensor.dtype == torch.bfloat16:  # numpy knows it by ml_dtypes only
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {
        name: StoredTensor(tuple(tensor.shape), dtypes[name], lambda name=name: read(name))
        for name, tensor in tensors.items()
    }
