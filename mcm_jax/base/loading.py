"""Loads a frozen base model from a folder in diffusers format, or from the Hugging Face Hub.

Such a folder is what ``pipeline.save_pretrained(folder)`` writes: ``model_index.json`` names a pipeline class and its
components, each with a folder of its own (``unet/config.json``, ``unet/diffusion_pytorch_model.safetensors``,
``scheduler/scheduler_config.json``). All configs are read and checked, each by itself and against the others, before
any weight is read (:mod:`mcm_jax.base.weights`) or downloaded.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mcm_jax import assets, sharding
from mcm_jax.base.autoencoders import AutoencoderKL, AutoencoderKLConfig, VQConfig, VQModel
from mcm_jax.base.base import Base
from mcm_jax.base.clip import CLIPText, CLIPTextConfig, normalise_names
from mcm_jax.base.tokenizer import Tokenizer
from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.base.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mcm_jax.base.weights import (
    DTYPES,
    NETWORK,
    TEXT_MODEL,
    BaseLoadError,
    find_weights,
    load_params,
    open_weights,
    read_json,
)
from mcm_jax.errors import UserError, expect
from mcm_jax.schedules import Schedule

# Each pipeline's components. Others in its folder, such as a safety checker, are never looked at.
_PIPELINES = {
    "DDPMPipeline": ("unet", "scheduler"),
    "DDIMPipeline": ("unet", "scheduler"),
    "LDMPipeline": ("vqvae", "unet", "scheduler"),
    "StableDiffusionPipeline": ("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
}
_UNETS = {"UNet2DModel": (UNet2D, UNet2DConfig), "UNet2DConditionModel": (UNet2DCondition, UNet2DConditionConfig)}
_AUTOENCODERS = {"AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig), "VQModel": (VQModel, VQConfig)}
_OF_DIFFUSERS = 0.18215  # scaling_factor of a VQModel that nobody gave one
_CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
# Keys of configs without effect on any value, as the networks run here.
_SILENT = {
    *("dropout", "num_train_timesteps", "upcast_attention", "force_upcast", "use_attention_mask", "architectures"),
    *("mid_block_only_cross_attention", "addition_embed_type_num_heads"),
}
_LORA = "pytorch_lora_weights.safetensors"
_SD = "a Stable Diffusion 1.x or 2.x text-to-image model"
# U-Nets that look like a text-to-image model's but for the channels they see beside the latent.
_MORE_CHANNELS = {5: "depth-to-image", 7: "image editing", 8: "image editing", 9: "inpainting"}


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """Which frozen base. The config's section ``base``.

    Attributes:
        path: a folder in diffusers format, the name of a shipped one, or a name on the Hugging Face Hub.
        dtype: of the frozen weights and the base's computation: ``float32``, ``bfloat16``, ``float16``.
    """

    path: str = "scenes-ddpm"
    dtype: str = "float32"

    def __post_init__(self):
        expect(self.path != "", "path", "a folder or a shipped name", self.path)
        expect(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)

    def load(self, mesh: jax.sharding.Mesh | None = None) -> Base:
        """:func:`load_base`, onto a mesh: split over its axis ``fsdp``, whole along ``data``."""
        put = jnp.asarray if mesh is None else functools.partial(sharding.place, mesh=mesh)
        return load_base(assets.resolve_base(self.path), self.dtype, put)

    def outline(self) -> Base:
        """:func:`outline`."""
        return outline(assets.resolve_base(self.path), self.dtype)

    def stamp(self) -> str | None:
        """SHA-256 of the names, sizes and times of the base's files; None where it is not at hand."""
        try:
            folder = find_folder(assets.resolve_base(self.path))
        except UserError:
            return None
        if folder is None:
            return None
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_base(
    path: str | os.PathLike, dtype: str = "float32", put: Callable[[np.ndarray], jax.Array] = jnp.asarray
) -> Base:
    """Loads a base from a local folder in diffusers format, or by its name on the Hugging Face Hub.

    Args:
        path: the folder, which holds ``model_index.json`` and a folder for each component; or ``organisation/name``
            where there is no such folder (needs the extra ``hub``).
        dtype: ``float32``, ``bfloat16`` or ``float16``: what the parameters are cast to, once, and what the networks
            compute in.
        put: takes each tensor to where it belongs as soon as it is read, before the next one is:
            ``functools.partial(sharding.place, mesh=mesh)`` splits a base that is larger than a device. Left out, all
            of them go to the default device.

    Returns:
        The base, its params as `put` gave them.

    Raises:
        BaseLoadError: anything in the folder that is missing, damaged or not supported.
        ValueError: another `dtype`.
    """
    return _load(path, dtype, put)


def outline(path: str | os.PathLike, dtype: str = "float32") -> Base:
    """The base that :func:`load_base` gives, fingerprint and all, with shapes in place of its params.

    The arguments and errors are those of :func:`load_base`. One tensor is in memory at a time, none on the device.
    """
    return _load(path, dtype, lambda tensor: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))


def find_folder(path: str | os.PathLike) -> Path | None:
    """The local folder of a base: itself, or the Hugging Face Hub's cache of a name. None where there is none."""
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), local_files_only=True))
    except Exception:  # not installed, not a name, never downloaded: of many kinds
        return None


def _load(path: str | os.PathLike, dtype: str, put: Callable[[np.ndarray], Any]) -> Base:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    folder, hub_name = Path(path).expanduser(), None
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        hub_name = str(path)
        folder = _download(hub_name, ["*.json", "*/*.json", "tokenizer/*"])
    _refuse_what_is_no_folder_of_a_pipeline(folder)

    index_file = folder / "model_index.json"
    index = read_json(index_file, "; a base in diffusers format holds it beside a folder for each component")
    components = _components(index_file, index)
    files = {name: _config_file(folder, name) for name in components}
    expected = "; a base in diffusers format holds " + _contents(components)
    configs = {name: read_json(file, expected) for name, file in files.items()}

    schedule = _checked(files["scheduler"], Schedule.from_config, configs["scheduler"])
    nets = _networks(files, configs, jnp.dtype(DTYPES[dtype]))
    latent_shape = _latent_shape(files["unet"], nets["unet"])
    tokenizer, text_encoder = None, nets.get("text_encoder")
    if text_encoder is not None:
        c, file = text_encoder.config, files["text_encoder"]
        tokenizer = Tokenizer(files["tokenizer"].parent, c.vocab_size, c.max_position_embeddings, file)
    autoencoder = nets.get("vae") or nets.get("vqvae")
    factor = autoencoder.config.factor if autoencoder else 1

    facts = {name: _decisive(net.config) for name, net in nets.items()} | {
        "dtype": dtype,
        "prediction_type": schedule.prediction_type,
        "alphas_cumprod": schedule.alphas_cumprod.tobytes().hex(),
    }
    if tokenizer:
        facts["tokenizer"] = tokenizer.facts
    if hub_name:
        _download_weights(hub_name, folder.name, {name: files[name].parent.relative_to(folder) for name in nets})
    params, digest = _load_params(facts, nets, files, latent_shape, factor, dtype, put)
    return Base(
        name=hub_name.split("/")[1] if hub_name else folder.resolve().name,
        params=params,
        unet=nets["unet"],
        schedule=schedule,
        latent_shape=latent_shape,
        image_shape=(latent_shape[0] * factor, latent_shape[1] * factor, 3) if autoencoder else latent_shape,
        fingerprint=digest,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def _refuse_what_is_no_folder_of_a_pipeline(path: Path) -> None:
    """Tells what the path leads to instead, where that is a common thing."""
    lora = "a LoRA, which changes a base and is none; load it into its base with diffusers, then fuse_lora and "
    has_index = (path / "model_index.json").is_file()
    if path.name == _LORA or ((path / _LORA).is_file() and not has_index):
        raise BaseLoadError(f"{path}: {lora}save_pretrained(folder)")
    if path.is_file() and path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise BaseLoadError(
            f"{path}: not a directory but a model in a single file; convert it with diffusers: "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    if not path.is_dir():
        raise BaseLoadError(
            f"{path}: not a directory; expected a local folder in diffusers format, or the name of a model on the "
            "Hugging Face Hub such as google/ddpm-cat-256 (huggingface_hub.snapshot_download makes a folder of one)"
        )
    if (path / "config.json").is_file() and not has_index:
        found = read_json(path / "config.json").get("_class_name", "of one component")
        raise BaseLoadError(
            f"{path / 'model_index.json'}: no such file, but a config.json ({found}): this is a component by itself; "
            "expected the folder of the whole pipeline, which is often the one above"
        )


def _components(file: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The components of the pipeline, all there and of supported classes as far as the index tells."""
    pipeline = str(index.get("_class_name"))
    if pipeline not in _PIPELINES:
        hint = ""
        if re.search("Inpaint|Depth2Img|InstructPix2Pix|Img2Img|ControlNet|Adapter|Upscale|UnCLIP", pipeline):
            hint = f"; take the text-to-image model that it was made from, {_SD}"
        elif "XL" in pipeline or pipeline.startswith("StableDiffusion3"):
            hint = f"; this one has other networks and several text encoders, take {_SD}"
        raise BaseLoadError(f"{file}: _class_name: found {pipeline!r}, supported: {', '.join(_PIPELINES)}{hint}")
    components = _PIPELINES[pipeline]
    classes = {name: (index.get(name) or [None])[-1] for name in components}
    if absent := [name for name, found in classes.items() if not found]:
        raise BaseLoadError(f"{file}: found no {' and no '.join(absent)}, expected {', '.join(components)}")
    if (encoder := classes.get("text_encoder", "CLIPTextModel")) != "CLIPTextModel":
        raise BaseLoadError(f"{file}: text_encoder: found {encoder!r}, supported: CLIPTextModel; take {_SD}")
    return components


def _config_file(folder: Path, component: str) -> Path:
    """Where a component's config is: in its folder, or, as in the oldest repositories, beside the index."""
    name = _CONFIG_FILES.get(component, "config.json")
    beside = not (folder / component).is_dir() and (folder / name).is_file()
    return folder / name if beside else folder / component / name


def _contents(components: tuple[str, ...]) -> str:
    configs = [f"{name}/{_CONFIG_FILES.get(name, 'config.json')}" for name in sorted(components)]
    nets = [name for name in sorted(components) if name not in _CONFIG_FILES]
    weights = [f"{name}/{_stem(name)}.safetensors" for name in nets]
    return ", ".join(["model_index.json", *configs]) + f" and {', '.join(weights)}"


def _networks(files: Mapping[str, Path], configs: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The modules of all components that are networks, which fit each other."""
    unets = ("UNet2DConditionModel",) if "text_encoder" in files else ("UNet2DModel",)
    nets = {"unet": _network(files["unet"], configs["unet"], {name: _UNETS[name] for name in unets}, dtype)}
    for name in files.keys() & {"vae", "vqvae"}:
        raw = configs[name]
        # Older than the key, and trained on latents as they are: https://github.com/huggingface/diffusers/issues/6725
        is_vq = raw.get("_class_name") == "VQModel"
        before = {"scaling_factor": 1.0} if is_vq else {}
        if is_vq and raw.get("scaling_factor") == _OF_DIFFUSERS:
            warnings.warn(
                f"{files[name]}: scaling_factor is {_OF_DIFFUSERS}, diffusers' default, which its save_pretrained also "
                f"writes for models that are older than the key. If this is one of CompVis' (ldm-celebahq-256), whose "
                f"latents are not scaled, set it to 1.0 there",
                stacklevel=2,
            )
        nets[name] = _network(files[name], before | raw, _AUTOENCODERS, dtype)
        _check_channels(files["unet"], nets["unet"].config, files[name], nets[name].config)
    if "text_encoder" in files:
        file = files["text_encoder"]
        config = _checked(file, CLIPTextConfig.from_dict, configs["text_encoder"])
        nets["text_encoder"] = CLIPText(config, dtype)
        if (width := nets["unet"].config.cross_attention_dim) != config.hidden_size:
            raise BaseLoadError(
                f"{files['unet']}: cross_attention_dim: found {width}, expected hidden_size of {file}, "
                f"{config.hidden_size}"
            )
    return nets


def _network(file: Path, raw: Mapping[str, Any], classes: Mapping[str, tuple], dtype: Any) -> Any:
    """A module of the class that the config names."""
    name = raw.get("_class_name")
    if name not in tuple(classes):
        raise BaseLoadError(f"{file}: _class_name: found {name!r}, supported: {', '.join(classes)}")
    module, config = classes[name]
    return module(_checked(file, config.from_dict, raw), dtype=dtype)


def _checked(file: Path, read: Any, content: Mapping[str, Any]) -> Any:
    """What `read` makes of a config; its complaints name the file."""
    try:
        return read(content)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # wrong types fail in many ways
        raise BaseLoadError(f"{file}: {error}") from error


def _check_channels(unet_file: Path, unet: Any, file: Path, autoencoder: Any) -> None:
    channels, depth = unet.in_channels, autoencoder.depth
    if channels != depth:
        kind = _MORE_CHANNELS.get(channels) if depth == 4 else None
        hint = f" (a model for {kind}; take the text-to-image model that it was made from)" if kind else ""
        raise BaseLoadError(
            f"{unet_file}: in_channels: found {channels}, expected the channels of a latent of {file}, {depth}{hint}"
        )
    if (autoencoder.in_channels, autoencoder.out_channels) != (3, 3):
        raise BaseLoadError(
            f"{file}: in_channels and out_channels: found {autoencoder.in_channels} and {autoencoder.out_channels}, "
            "supported: 3, RGB images"
        )


def _latent_shape(file: Path, unet: UNet2D | UNet2DCondition) -> tuple[int, int, int]:
    """The shape of what the U-Net was trained on; it must be known, and the output must be of the same."""
    config = unet.config
    # UNet2DConditionModel fits its upsampling to any size.
    factor = 1 if isinstance(unet, UNet2DCondition) else 2 ** (len(config.block_out_channels) - 1)
    size = config.sample_size
    sizes = size if isinstance(size, tuple) else (size, size)
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 and s % factor == 0 for s in sizes):
        raise BaseLoadError(f"{file}: sample_size: found {size!r}, supported: a multiple of {factor}, or two")
    if config.out_channels != config.in_channels:
        raise BaseLoadError(
            f"{file}: out_channels: found {config.out_channels}, supported: as many as in_channels, "
            f"{config.in_channels} (a network that also predicts variances is not)"
        )
    return (*sizes, config.in_channels)


def _load_params(
    facts: Mapping[str, Any],
    nets: Mapping[str, Any],
    files: Mapping[str, Path],
    latent: tuple,
    factor: int,
    dtype: str,
    put: Callable[[np.ndarray], Any],
) -> tuple[dict[str, Any], str]:
    """Reads the parameters of all networks, and takes the fingerprint on the way: of the facts, then of each tensor."""
    float32, int32, key = jnp.float32, jnp.int32, jax.random.key(0)
    shape, params = jax.ShapeDtypeStruct, {}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    sources = {name: find_weights(files[name].parent, _stem(name)) for name in sorted(nets)}
    stored = {name: open_weights(file) for name, file in sources.items()}  # all, before the first is read
    for name, file in sources.items():
        net = nets[name]
        if name == "unet":
            inputs = [shape((1, *latent), float32), shape((1,), int32)]
            if isinstance(net, UNet2DCondition):
                inputs.append(shape((1, 1, net.config.cross_attention_dim), float32))
        elif name == "text_encoder":
            inputs = [shape((1, 1), int32)]
            stored[name] = _checked(file, normalise_names, stored[name])
        else:
            inputs = [shape((1, factor, factor, 3), float32)]
        expected = jax.eval_shape(net.init, key, *inputs)["params"]
        component = {}
        for path, tensor in load_params(file, stored.pop(name), expected, dtype):
            digest.update(f"\n{'/'.join((name, *path))} {tensor.dtype.name} {tensor.shape}\n".encode())
            digest.update(tensor.reshape(-1).view(np.uint8))
            component[path] = put(tensor)
        params[name] = traverse_util.unflatten_dict(component)
    return params, digest.hexdigest()


def _stem(component: str) -> str:
    """What the files of a component's weights are called."""
    return TEXT_MODEL if component == "text_encoder" else NETWORK


def _decisive(config: Any) -> dict[str, Any]:
    """What a config says beyond the defaults, numbers as floats: a key added one day leaves old fingerprints alone."""
    silent = _SILENT | ({"sample_size"} if isinstance(config, tuple(c for _, c in _AUTOENCODERS.values())) else set())
    values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config) if f.name not in silent}
    said = {name: value for name, (value, default) in values.items() if value != default}
    plain = lambda v: float(v) if isinstance(v, int | float) and not isinstance(v, bool) else v  # noqa: E731
    return {k: [plain(x) for x in v] if isinstance(v, tuple) else plain(v) for k, v in said.items()}


def _download(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local snapshot of a model on the Hugging Face Hub, with the files that match; its name is the revision."""
    way_out = f"to use a model without the Hub, pass the path of a local folder (there is none called {name})"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BaseLoadError(
            f"{name}: not a directory, and as a name on the Hugging Face Hub it needs pip install 'mcm-jax[hub]'; "
            f"{way_out}"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # of many kinds: no network, no such model, no permission, a full disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseLoadError(
            f"{name}: not a directory, and not to be had from the Hugging Face Hub ({reason}); {way_out}"
        ) from error


def _download_weights(name: str, revision: str, folders: Mapping[str, Path]) -> None:
    """Downloads each network's plain weights; of a network that has none, those of the variant fp16."""
    for variant in ("", ".fp16"):
        patterns = []
        for component, inner in folders.items():
            patterns += [
                (inner / f"{_stem(component)}{variant}{end}").as_posix() for end in (".safetensors", "-*.safetensors")
            ]
        snapshot = _download(name, patterns, revision)
        folders = {c: inner for c, inner in folders.items() if not any((snapshot / inner).glob("*.safetensors"))}
        if not folders:
            return
    raise BaseLoadError(
        f"{name}: found no safetensors files of {', '.join(folders)} on the Hugging Face Hub or in its cache; "
        "download it with huggingface_hub.snapshot_download and pass the folder, whose .bin files can be read"
    )
