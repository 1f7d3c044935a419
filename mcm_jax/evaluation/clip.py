"""A CLIP that judges how well pictures and captions belong together, from a folder that transformers wrote.

The folder holds ``config.json`` and ``model.safetensors`` of a ``CLIPModel``, its image processor's
``preprocessor_config.json`` (or ``processor_config.json``) and its tokenizer's files. It computes in float32.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from PIL import Image

from mcm_jax.base import blocks
from mcm_jax.base.clip import CLIP, END_BEFORE_4_31, CLIPConfig
from mcm_jax.base.tokenizer import Cuts, Tokenizer
from mcm_jax.base.weights import TEXT_MODEL, BaseLoadError, find_weights, load_params, open_weights, read_json
from mcm_jax.evaluation import nets
from mcm_jax.pictures import to_uint8

_BATCH = 64  # pictures or texts a call
_HOLDS = (
    "; a CLIP's folder holds config.json, model.safetensors, preprocessor_config.json and a tokenizer's files: "
    "save_pretrained(folder) of transformers' CLIPModel and CLIPProcessor writes them"
)


@dataclasses.dataclass(frozen=True)
class ImageProcessor(blocks.Config):
    """What a CLIP is shown of a picture: the keys of transformers' ``CLIPImageProcessor`` that matter, its defaults.

    Attributes:
      size: of the shorter side after resizing, in pixels.
      crop_size: of the square that is cut out of the centre, in pixels.
      resample: PIL's number of a filter; 3 is bicubic.
      rescale_factor: what 8-bit values are multiplied with.
      image_mean: then taken from each channel.
      image_std: what each channel is then divided by.

    Raises:
      ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    size: int = 224
    crop_size: int = 224
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed ``preprocessor_config.json``, as transformers 4 and 5 write it.

        Raises:
          ValueError: a value that is not supported; names the key, what was found and what is supported.
        """
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise ValueError(f"{step}: found {config[step]!r}, supported: true")
        found = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}
        for key, names in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
            sides = found.get(key)
            if isinstance(sides, Mapping):
                if sorted(sides) != sorted(names) or len(set(sides.values())) != 1:
                    one = ", ".join(f'"{name}": 224' for name in names)
                    raise ValueError(f"{key}: found {sides}, supported: {{{one}}}, of any number")
                found[key] = sides[names[0]]
        return super().from_dict(found)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(self.size > 0, "size", "a whole number above 0")
        self._expect(0 < self.crop_size <= self.size, "crop_size", f"1..{self.size}, the size")
        self._expect(self.resample in list(Image.Resampling), "resample", "one of PIL's filters, 0..5")
        self._expect(min(self.image_std) > 0, "image_std", "numbers above 0")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Pictures, uint8 ``[N, H, W, 3]``, as the network sees them, float32 ``[N, crop_size, crop_size, 3]``.

        The steps, and the precision of each, are those of transformers' ``CLIPImageProcessorPil``.
        """
        height, width = images.shape[1:3]
        short, long = self.size, int(self.size * max(height, width) / min(height, width))
        height, width = (short, long) if height < width else (long, short)
        top, left = (height - self.crop_size) // 2, (width - self.crop_size) // 2
        cut = np.s_[top : top + self.crop_size, left : left + self.crop_size]
        shown = [np.asarray(Image.fromarray(i).resize((width, height), self.resample))[cut] for i in images]
        values = (np.stack(shown) * np.float64(self.rescale_factor)).astype(np.float32)
        return (values - np.float32(self.image_mean)) / np.float32(self.image_std)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipModel:
    """A CLIP with its weights and what prepares pictures and texts for it. Its features have length 1.

    Attributes:
      name: the folder's.
      net: the Flax module.
      params: its float32 weights.
      processor: of pictures.
      tokenizer: of texts.
    """

    name: str
    net: CLIP
    params: Mapping
    processor: ImageProcessor
    tokenizer: Tokenizer

    def embed_images(self, images: np.ndarray, batch: int = _BATCH) -> np.ndarray:
        """Features of pictures.

        Args:
          images: float ``[N, H, W, 3]`` in [-1, 1]; they are rounded to 8 bits first, as PNGs would be.
          batch: pictures a call of the net; every call has this size, so that one compilation serves all.

        Returns:
          float32 ``[N, projection_dim]``.

        Raises:
          ValueError: another shape or dtype, values outside [-1, 1] or not finite.
        """
        call = self._features("embed_images")
        _, height, width, _ = images.shape
        size = {"height": height, "width": width}
        return nets.predict(lambda part: call(self.processor(to_uint8(part))), images, size, batch)

    def embed_texts(self, texts: Sequence[str], cuts: Cuts) -> np.ndarray:
        """Features of texts, float32 ``[N, projection_dim]``; `cuts` counts them, and those that are too long."""
        cut: dict[str, str] = {}
        ids = self.tokenizer(texts, cut)
        cuts.add(texts, cut)
        return nets.in_batches(self._features("embed_texts"), ids, min(_BATCH, len(ids)))

    def _features(self, method: str) -> Callable[[np.ndarray], jax.Array]:
        return functools.partial(_unit, self.net, method, self.params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unit(net: CLIP, method: str, params: Mapping, x: jax.Array) -> jax.Array:
    found = net.apply({"params": params}, x, method=method)
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)


def load_clip(folder: str | os.PathLike) -> ClipModel:
    """Loads a CLIP from a folder as ``save_pretrained`` of transformers' ``CLIPModel`` and ``CLIPProcessor`` write it.

    Raises:
      BaseLoadError: anything in the folder that is missing, damaged or not supported; names the file.
        ``pytorch_model.bin`` is refused, a pickle.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise BaseLoadError(f"{folder}: no such folder{_HOLDS}")
    file = folder / "config.json"
    config = _checked(file, CLIPConfig, read_json(file, _HOLDS))
    processor = _load_processor(folder, config.vision_config.image_size)
    text = config.text_config
    tokenizer = Tokenizer(folder, text.vocab_size, text.max_position_embeddings, file)
    end = tokenizer.facts["ends"]["eos_token"]
    if config.eos_token_id not in (end, END_BEFORE_4_31):
        raise BaseLoadError(
            f"{file}: text_config: eos_token_id: found {config.eos_token_id}, but the tokenizer beside it ends texts "
            f"with token {end}"
        )
    net = CLIP(config)
    return ClipModel(folder.resolve().name, net, _load_params(folder, net, processor), processor, tokenizer)


def _checked(file: pathlib.Path, kind: Any, content: Mapping[str, Any]) -> Any:
    try:
        return kind.from_dict(content)
    except (ValueError, TypeError) as error:
        raise BaseLoadError(f"{file}: {error}") from error


def _load_processor(folder: pathlib.Path, size: int) -> ImageProcessor:
    """The image processor by its own file, or, as transformers prefers, by the part of the whole processor's."""
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    content = read_json(whole).get("image_processor") if whole.is_file() else None
    file, content = (file, read_json(file, _HOLDS)) if content is None else (whole, content)
    processor = _checked(file, ImageProcessor, content)
    if processor.crop_size != size:
        raise BaseLoadError(
            f"{file}: crop_size: found {processor.crop_size}, expected image_size of {folder / 'config.json'}, {size}"
        )
    return processor


def _load_params(folder: pathlib.Path, net: CLIP, processor: ImageProcessor) -> Mapping:
    file = find_weights(folder, TEXT_MODEL)
    if ".bin" in file.suffixes:
        raise BaseLoadError(
            f"{file}: a pickle, which can run any code when it is opened, and there is no safetensors file beside it. "
            f"If you trust it, convert it with transformers: CLIPModel.from_pretrained(folder).save_pretrained(folder)"
        )
    pixels = jax.ShapeDtypeStruct((1, processor.crop_size, processor.crop_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    expected = jax.eval_shape(net.init, jax.random.key(0), pixels, ids)["params"]
    # A temperature, which no cosine sees, and older files' numbers in their order.
    silent = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    tensors = {name: tensor for name, tensor in open_weights(file).items() if name not in silent}
    params = {path: jnp.asarray(value) for path, value in load_params(file, tensors, expected, "float32")}
    return traverse_util.unflatten_dict(params)
