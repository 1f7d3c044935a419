"""CLIP in Flax Linen: transformers' ``CLIPTextModel``, Stable Diffusion's text encoder, and the whole ``CLIPModel``.

Parameters have the names of the files on the Hub (``text_model.encoder.layers.0.self_attn.q_proj.weight`` is
``text_model/encoder/layers_0/self_attn/q_proj/kernel``); :func:`normalise_names` brings other files to these. Written
from the behaviour of transformers 5.23 (`models/clip/modeling_clip.py`); in float32 the output agrees with PyTorch's to
1e-5 of its scale (``tests/test_clip.py``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcm_jax.base import attention, blocks

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": blocks.ACTIVATIONS["gelu"],
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}
# `eos_token_id` of the files of transformers before 4.31, which is no token's number:
# https://github.com/huggingface/transformers/pull/24773
END_BEFORE_4_31 = 2
# Keys of a transformers config that change nothing in the hidden states at inference: they concern training, the pooled
# output, text generation, what a call returns, or the file itself. Those of older versions are among them.
_WITHOUT_EFFECT = """
add_cross_attention attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor initializer_range
is_decoder is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
projection_dim remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
# Keys that would change the hidden states, or what a pipeline makes of them, and the values with which they do not.
_SUPPORTED: dict[str, tuple] = {
    "pruned_heads": ({}, None),
    "use_attention_mask": (False, None),  # diffusers would hide the padding from the encoder
}


def _that_matter(config: Mapping[str, Any], supported: Mapping[str, tuple]) -> dict[str, Any]:
    """The keys that matter; a value of the others that is not supported raises ValueError."""
    supported = _SUPPORTED | supported
    for key, values in supported.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{key}: found {config[key]!r}, supported: {' or '.join(map(str, values))}")
    left_out = (*supported, *_WITHOUT_EFFECT.split())
    return {key: value for key, value in config.items() if key not in left_out}


class _TowerConfig(blocks.Config):
    """What the configs of both towers have in common; `_supported` has the class that each is the config of."""

    _supported: ClassVar[Mapping[str, tuple]]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed ``config.json``, as transformers 4 and 5 write it.

        Private keys (``_...``) and those without effect on the hidden states are left out (of `eos_token_id` and
        `projection_dim`, only the pooled output would depend); any other unknown key is refused.

        Raises:
            ValueError: an unknown key, or a value that is not supported; names the key, what was found and what is
                supported.
        """
        return super().from_dict(_that_matter(config, cls._supported))

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            self._expect(field.type is not int or getattr(self, field.name) > 0, field.name, "a whole number above 0")
        divides = self.hidden_size % self.num_attention_heads == 0
        self._expect(divides, "num_attention_heads", f"a divisor of hidden_size {self.hidden_size}")
        self._expect(self.hidden_act in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        self._expect(0 < self.layer_norm_eps < 1, "layer_norm_eps", "a number between 0 and 1")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(_TowerConfig):
    """The keys of a transformers ``CLIPTextConfig`` that matter to the hidden states, with its defaults.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    # One with a projection is used otherwise by the pipelines.
    _supported = {"model_type": ("clip_text_model",), "architectures": (["CLIPTextModel"], None)}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(_TowerConfig):
    """The keys of a transformers ``CLIPVisionConfig`` that matter to the hidden states, with its defaults.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    _supported = {"model_type": ("clip_vision_model",), "architectures": (["CLIPVisionModel"], None)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(self.num_channels == 3, "num_channels", "3, RGB images")
        self._expect(self.patch_size <= self.image_size, "patch_size", f"at most image_size {self.image_size}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig(blocks.Config):
    """The keys of a transformers ``CLIPConfig`` that matter to the features of pictures and texts, with its defaults.

    Attributes:
        text_config: of the text tower.
        vision_config: of the image tower.
        projection_dim: width of the features that both have in common.
        eos_token_id: of the text tower's file: the token whose hidden state stands for the text. Where it is
            :data:`END_BEFORE_4_31`, it is the one of the highest number.

    Raises:
        ValueError: a value that is not supported; names the key, what was found and what is supported.
    """

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed ``config.json`` of a ``CLIPModel``, as transformers 4 and 5 write it.

        Raises:
            ValueError: an unknown key, or a value that is not supported; names the key, what was found and what is
                supported.
        """
        supported = {"model_type": ("clip",), "architectures": (["CLIPModel"], None)}
        found = _that_matter({"model_type": None, **config}, supported)
        found.pop("logit_scale_init_value", None)  # a temperature, which no cosine sees
        if "projection_dim" in config:
            found["projection_dim"] = config["projection_dim"]
        for key, kind in (("text_config", CLIPTextConfig), ("vision_config", CLIPVisionConfig)):
            # Some older files have the longer name too; where it says something, transformers goes by it alone.
            short, long = found.pop(key, None), found.pop(f"{key}_dict", None)
            tower = (short if long is None else long) or {}
            try:
                found[key] = kind.from_dict(tower)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{key}: {error}") from error
            if kind is CLIPTextConfig and "eos_token_id" in tower:
                found["eos_token_id"] = tower["eos_token_id"]
        return super().from_dict(found)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect(self.projection_dim > 0, "projection_dim", "a whole number above 0")


def normalise_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Gives tensors of a text encoder's file the names that the Hub's files have, ``text_model....``.

    transformers before 5 wrote these; 5 writes them too for a model that it loaded from such a file, but leaves out
    ``text_model.`` for one that was made in memory. Older files also hold the buffer ``...position_ids``, numbers in
    their order, which is dropped.

    Args:
        tensors: anything by name.

    Returns:
        The same by the Hub's name; a name that is not a text encoder's is kept.

    Raises:
        ValueError: two names for one tensor.
    """
    named: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            continue
        flat = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        hub_name = f"text_model.{name}" if flat else name
        if hub_name in named:
            raise ValueError(f"tensors: found {hub_name} twice, once without text_model., expected one of them")
        named[hub_name] = tensor
    return named


class _TextEmbeddings(nn.Module):
    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        c = self.config
        token = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, name="token_embedding")
        position = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype, name="position_embedding")
        return token(ids) + position(jnp.arange(ids.shape[1]))[None]


class _SelfAttention(nn.Module):
    config: _TowerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:2], heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = attention.attend(q, k, v, causal=self.causal).reshape(x.shape)
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(h)


class _MLP(nn.Module):
    config: _TowerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = nn.Dense(c.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(c.hidden_size, dtype=self.dtype, name="fc2")(ACTIVATIONS[c.hidden_act](h))


class _Layer(nn.Module):
    config: _TowerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, self.dtype
        x = x + _SelfAttention(c, dtype, self.causal, name="self_attn")(
            blocks.LayerNorm(c.layer_norm_eps, dtype, name="layer_norm1")(x)
        )
        return x + _MLP(c, dtype, name="mlp")(blocks.LayerNorm(c.layer_norm_eps, dtype, name="layer_norm2")(x))


class _Encoder(nn.Module):
    config: _TowerConfig
    dtype: Any
    causal: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, self.dtype, self.causal, name=f"layers_{i}")(x)
        return x


class _TextModel(nn.Module):
    config: CLIPTextConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        h = _TextEmbeddings(self.config, self.dtype, name="embeddings")(ids)
        h = _Encoder(self.config, self.dtype, causal=True, name="encoder")(h)
        return blocks.LayerNorm(self.config.layer_norm_eps, self.dtype, name="final_layer_norm")(h)


class _VisionEmbeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c, patch = self.config, (self.config.patch_size,) * 2
        convolve = nn.Conv(
            c.hidden_size, patch, patch, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
        )
        patches = convolve(pixels)  # pixels beyond the last whole patch are never seen
        patches = patches.reshape(len(pixels), -1, c.hidden_size)
        first = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,)).astype(self.dtype)
        first = jnp.broadcast_to(first[None, None], (len(pixels), 1, c.hidden_size))
        count = 1 + (c.image_size // c.patch_size) ** 2
        position = nn.Embed(count, c.hidden_size, dtype=self.dtype, name="position_embedding")
        return jnp.concatenate([first, patches], axis=1) + position(jnp.arange(count))[None]


class _VisionModel(nn.Module):
    config: CLIPVisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """``[B, S, S, 3]`` to the class token's hidden state, ``[B, hidden_size]``."""
        eps = self.config.layer_norm_eps
        h = _VisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels)
        h = blocks.LayerNorm(eps, self.dtype, name="pre_layrnorm")(h)  # so spelled by transformers
        h = _Encoder(self.config, self.dtype, causal=False, name="encoder")(h)
        return blocks.LayerNorm(eps, self.dtype, name="post_layernorm")(h[:, 0])


class CLIP(nn.Module):
    """transformers' ``CLIPModel``: pictures and texts to features whose cosine says how well they belong together.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms and softmax are float32 in any case.
    """

    config: CLIPConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.text_model = _TextModel(c.text_config, dtype)
        self.vision_model = _VisionModel(c.vision_config, dtype)
        self.text_projection = nn.Dense(c.projection_dim, use_bias=False, dtype=dtype)
        self.visual_projection = nn.Dense(c.projection_dim, use_bias=False, dtype=dtype)

    def __call__(self, pixels: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """:meth:`embed_images` and :meth:`embed_texts`."""
        return self.embed_images(pixels), self.embed_texts(ids)

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """Features of pictures, not of length 1 (``image_embeds`` before the norm).

        Args:
            pixels: float ``[B, image_size, image_size, 3]``, less mean and over deviation as the model's
                ``CLIPImageProcessor`` makes them.

        Returns:
            ``[B, projection_dim]`` of `dtype`.

        Raises:
            ValueError: another shape.
        """
        size = self.config.vision_config.image_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels: found {list(pixels.shape)}, expected [B, {size}, {size}, 3]")
        return self.visual_projection(self.vision_model(pixels))

    def embed_texts(self, ids: jax.Array) -> jax.Array:
        """Features of texts, not of length 1 (``text_embeds`` before the norm), from each one's first end token.

        Args:
            ids: int32 ``[B, L]``, tokens, each row with an end; L is at most `max_position_embeddings`.

        Returns:
            ``[B, projection_dim]`` of `dtype`.

        Raises:
            ValueError: a shape or dtype that does not fit.
        """
        _check_ids(ids, self.config.text_config)
        end = self.config.eos_token_id
        ends = ids.argmax(axis=1) if end == END_BEFORE_4_31 else (ids == end).argmax(axis=1)
        return self.text_projection(self.text_model(ids)[jnp.arange(len(ids)), ends])


def _check_ids(ids: jax.Array, config: CLIPTextConfig) -> None:
    limit = config.max_position_embeddings
    if ids.ndim != 2 or not 0 < ids.shape[1] <= limit or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: found {ids.dtype} of shape {ids.shape}, expected integers [B, L], L in 1..{limit}")


class CLIPText(nn.Module):
    """The transformer over tokens whose hidden states are a text-to-image U-Net's context.

    Stable Diffusion 1 takes the last hidden states of CLIP ViT-L/14's 12 layers. Stable Diffusion 2 takes the last but
    one of OpenCLIP ViT-H/14's 24, and its files hold an encoder already cut to 23 layers: so for both it is this
    module's output, the last layer's hidden states after the final norm.

    Attributes:
        config: the architecture.
        dtype: what the network computes in; norms and softmax are float32 in any case.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Encodes tokens; each position sees those before it and itself, padding or not.

        Args:
            ids: int32 ``[B, L]``, tokens in 0..vocab_size-1 (a greater one gives NaN); L is at most
                `max_position_embeddings`.

        Returns:
            ``[B, L, hidden_size]`` of `dtype`: the hidden states of the last layer, after the final norm.

        Raises:
            ValueError: a shape or dtype that does not fit.
        """
        _check_ids(ids, self.config)
        return _TextModel(self.config, self.dtype, name="text_model")(ids)
