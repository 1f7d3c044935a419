"""Loads a frozen base model from a folder in diffusers format, without PyTorch and without unpickling.

Such a folder is what ``pipeline.save_pretrained(folder)`` writes: ``model_index.json`` names a pipeline class and its
components, each with a folder of its own (``unet/config.json``, ``unet/diffusion_pytorch_model.safetensors``,
``scheduler/scheduler_config.json``). All configs are read and checked before any weight is.

A network's weights are matched against the names and shapes that its Flax module asks for (``jax.eval_shape`` of its
``init``), so an error can list both sides. The file is trusted for nothing else.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.errors import UserError
from mcm_jax.predictions import to_eps
from mcm_jax.schedules import Schedule

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_PIPELINES = {"DDPMPipeline": ("unet", "scheduler"), "DDIMPipeline": ("unet", "scheduler")}
_WEIGHTS = "diffusion_pytorch_model"
# Attention layers as diffusers named them before 0.12; files with these names are still on the Hub.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class BaseLoadError(UserError):
    """A folder that cannot be loaded as a base; says which file, what was found and what is expected."""


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A frozen diffusion model. Its methods are pure, take its params as an argument and work under ``jit``, ``grad``.

    Attributes:
        name: the folder's name.
        params: pytree of the networks' parameters, one entry per component (``{"unet": ...}``), in the asked-for dtype.
        unet: the network that predicts.
        schedule: the noise schedule that the network was trained with.
        latent_shape: ``(H, W, C)`` of what is diffused; a pixel base's is the image's.
        image_shape: ``(H, W, C)`` of the images.
        fingerprint: SHA-256, as hex, of all that decides the value of :meth:`predict`: configs, parameters, dtype. It
            does not depend on where the folder lies or on how its files are laid out.
    """

    name: str
    params: Any
    unet: UNet2D
    schedule: Schedule
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    fingerprint: str

    def predict(self, params: Any, x_t: jax.Array, t: jax.Array, context: Any = None) -> jax.Array:
        """Predicts the noise in x_t, whatever the network's own parameterisation.

        Args:
            params: :attr:`params`, or a pytree like it.
            x_t: float32 ``[B, H, W, C]``, noisy latents; H and W need not be those of :attr:`latent_shape`.
            t: int32 ``[B]``, timesteps in 0..T-1.
            context: must be None: this base is unconditional.

        Returns:
            float32 ``[B, H, W, C]``, eps.

        Raises:
            ValueError: a context is given, or the shapes do not fit.
        """
        if context is not None:
            raise ValueError(f"context: base {self.name!r} is unconditional and takes none")
        prediction = self.unet.apply({"params": params["unet"]}, x_t, t)
        return to_eps(prediction, x_t, self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.prediction_type)

    def encode(self, params: Any, image: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Image ``[B, H, W, 3]`` in [-1, 1] to latent. The identity, as this base works on pixels; needs no `rng`."""
        del params, rng
        return image

    def decode(self, params: Any, latent: jax.Array) -> jax.Array:
        """Latent to image ``[B, H, W, 3]`` in [-1, 1]. The identity, as this base works on pixels."""
        del params
        return latent

    def embed_text(self, params: Any, prompts: Sequence[str]) -> jax.Array:
        """Always an error: an unconditional base has no text encoder.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"prompts: base {self.name!r} is unconditional, it has no text encoder")


def load_base(path: str | os.PathLike, dtype: str = "float32") -> Base:
    """Loads a base from a local folder in diffusers format.

    Args:
        path: the folder; holds ``model_index.json`` and a folder for each component.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the parameters are cast to, once, and what the network
            computes in.

    Returns:
        The base, its params on the default device.

    Raises:
        BaseLoadError: anything in the folder that is missing, damaged or not supported.
        ValueError: another `dtype`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BaseLoadError(
            f"{folder}: not a directory; expected a local folder in diffusers format "
            "(for a model on the Hugging Face Hub, download it first with huggingface_hub.snapshot_download)"
        )
    index_file = folder / "model_index.json"
    index = _read_json(index_file)
    components = _PIPELINES.get(_class_name(index_file, index, _PIPELINES))
    if absent := [name for name in components if not index.get(name)]:
        raise BaseLoadError(f"{index_file}: found no {' and no '.join(absent)}, expected {', '.join(components)}")

    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    try:
        schedule = Schedule.from_config(_read_json(scheduler_file))
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, BaseLoadError) else BaseLoadError(f"{scheduler_file}: {error}") from error
    unet_file = folder / "unet" / "config.json"
    config = _read_unet_config(unet_file)
    size = config.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    shape = (height, width, config.in_channels)

    unet = UNet2D(config, dtype=jnp.dtype(DTYPES[dtype]))
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    expected = jax.eval_shape(unet.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.int32))["params"]
    params = {"unet": load_weights(folder / "unet", expected, dtype)}
    facts = {
        "unet": _decisive(config),
        "dtype": dtype,
        "prediction_type": schedule.prediction_type,
        "alphas_cumprod": schedule.alphas_cumprod.tobytes().hex(),
    }
    return Base(
        name=folder.resolve().name,
        params=jax.tree.map(jnp.asarray, params),
        unet=unet,
        schedule=schedule,
        latent_shape=shape,
        image_shape=shape,
        fingerprint=_fingerprint(facts, params),
    )


def load_weights(folder: Path, expected: Any, dtype: str) -> Any:
    """Reads the safetensors file of one component into the pytree that its Flax module expects.

    Args:
        folder: the component's folder.
        expected: pytree of ``jax.ShapeDtypeStruct``, the module's parameters.
        dtype: a key of :data:`DTYPES`.

    Returns:
        A pytree of numpy arrays, like `expected` but of `dtype`.

    Raises:
        BaseLoadError: no file to read, a damaged file, or tensors other than the expected ones.
    """
    file = _find_weights(folder)
    try:
        # Numpy cannot name bfloat16, so safetensors' flax reader is the one that reads every dtype.
        with safe_open(file, framework="flax") as tensors:
            tensors = {name: np.asarray(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BaseLoadError(f"{file}: damaged or truncated, not a readable safetensors file ({error})") from error
    try:
        return params_from_torch(tensors, expected, DTYPES[dtype])
    except ValueError as error:
        raise BaseLoadError(f"{file}: {error}") from error


def torch_name(path: Sequence[str]) -> str:
    """The PyTorch name of a Flax parameter: ``("resnets_0", "conv1", "kernel")`` is ``resnets.0.conv1.weight``.

    An index at the end of a module's name is an element of a list in PyTorch; ``linear_1`` is a plain name there.
    """
    *modules, leaf = path
    modules = [name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def torch_shape(leaf: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in PyTorch of a Flax parameter: kernels are HWIO or IO here and OIHW or OI there."""
    return (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else tuple(shape)


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
    tensors = {_modern_name(name): tensor for name, tensor in tensors.items()}
    leaves = traverse_util.flatten_dict(expected)
    shapes = {torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in leaves.items()}
    wrong = [
        f"{name} (found {list(tensors[name].shape)}, expected {list(shape)})"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{label}: {_some(names)}"
        for label, names in (
            ("missing tensors", sorted(shapes.keys() - tensors.keys())),
            ("unexpected tensors", sorted(tensors.keys() - shapes.keys())),
            ("wrong shapes", wrong),
        )
        if names
    ]
    if problems:
        raise ValueError("the weights do not fit the config. " + "; ".join(problems))
    if odd := [f"{name} ({tensors[name].dtype})" for name in shapes if not _is_floating(tensors[name].dtype)]:
        raise ValueError(f"tensors that are not float16, bfloat16, float32 or float64: {_some(odd)}")
    with np.errstate(over="ignore"):  # what overflows is reported below, by name
        cast = {name: tensors[name].astype(dtype) for name in shapes}
    if infinite := [name for name, tensor in cast.items() if not np.isfinite(tensor.astype(np.float32)).all()]:
        raise ValueError(f"NaN or infinity (as {np.dtype(dtype).name}) in {_some(infinite)}")

    def to_flax(path: tuple[str, ...]) -> np.ndarray:
        tensor = cast[torch_name(path)]
        if path[-1] != "kernel":
            return tensor
        return np.ascontiguousarray(np.transpose(tensor, (*range(2, tensor.ndim), 1, 0)))

    return traverse_util.unflatten_dict({path: to_flax(path) for path in leaves})


def _modern_name(name: str) -> str:
    old = "|".join(_LEGACY_ATTENTION)
    return re.sub(
        rf"(attentions\.\d+)\.({old})\.(weight|bias)$",
        lambda match: f"{match[1]}.{_LEGACY_ATTENTION[match[2]]}.{match[3]}",
        name,
    )


def _is_floating(dtype: np.dtype) -> bool:
    return dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


def _some(names: Sequence[str], limit: int = 20) -> str:
    """The names, or the first of them and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _read_unet_config(file: Path) -> UNet2DConfig:
    """The config of a network that can be a base: as many channels out as in, and a known size."""
    raw = _read_json(file)
    _class_name(file, raw, ("UNet2DModel",))
    try:
        config = UNet2DConfig.from_dict(raw)
    except (ValueError, TypeError) as error:
        raise BaseLoadError(f"{file}: {error}") from error
    size, factor = config.sample_size, 2 ** (len(config.block_out_channels) - 1)
    sizes = size if isinstance(size, tuple) else (size, size)
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 and s % factor == 0 for s in sizes):
        raise BaseLoadError(f"{file}: sample_size: found {size!r}, supported: a multiple of {factor}, or two")
    if config.out_channels != config.in_channels:
        raise BaseLoadError(
            f"{file}: out_channels: found {config.out_channels}, supported: as many as in_channels, "
            f"{config.in_channels} (a network that also predicts variances is not)"
        )
    return config


def _class_name(file: Path, config: Mapping[str, Any], supported: Any) -> str:
    name = config.get("_class_name")
    if name not in tuple(supported):
        raise BaseLoadError(f"{file}: _class_name: found {name!r}, supported: {', '.join(supported)}")
    return name


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise BaseLoadError(
            f"{file}: no such file; a base in diffusers format holds model_index.json, "
            f"scheduler/scheduler_config.json, unet/config.json and unet/{_WEIGHTS}.safetensors"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise BaseLoadError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise BaseLoadError(f"{file}: found a JSON {type(content).__name__}, expected an object")
    return content


def _find_weights(folder: Path) -> Path:
    """The component's safetensors file; that of a variant (``.fp16.safetensors``) if it is the only one there."""
    plain = folder / f"{_WEIGHTS}.safetensors"
    if plain.is_file():
        return plain
    if (sharded := folder / f"{_WEIGHTS}.safetensors.index.json").is_file():
        raise BaseLoadError(f"{sharded}: weights in several files are not supported, expected {plain.name}")
    variants = sorted(folder.glob(f"{_WEIGHTS}.*.safetensors"))
    if len(variants) == 1:
        return variants[0]
    if variants:
        names = ", ".join(file.name for file in variants)
        raise BaseLoadError(f"{plain}: no such file, and more than one variant of it: {names}; leave one of them")
    if pickles := sorted(folder.glob("*.bin")):
        raise BaseLoadError(
            f"{plain}: no such file, only {pickles[0].name}, a pickle, which can run any code when it is opened and is "
            "never read here; convert it with diffusers: pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    raise BaseLoadError(f"{plain}: no such file")


def _decisive(config: UNet2DConfig) -> dict[str, Any]:
    """What a config says beyond the defaults, numbers as floats: a key added one day leaves old fingerprints alone."""
    silent = ("dropout", "num_train_timesteps")  # without effect on a prediction
    values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config) if f.name not in silent}
    said = {name: value for name, (value, default) in values.items() if value != default}
    plain = lambda v: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v  # noqa: E731
    return {k: [plain(x) for x in v] if isinstance(v, tuple) else plain(v) for k, v in said.items()}


def _fingerprint(facts: Mapping[str, Any], params: Any) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path, tensor in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(f"\n{path} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
