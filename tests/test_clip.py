"""The text encoder and both towers equal transformers' on random weights, read from what ``save_pretrained`` writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from mcm_jax.base.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig, normalise_names
from mcm_jax.base.weights import params_from_torch, torch_name, torch_shape
from mcm_jax.evaluation.clip import load_clip

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

TINY = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 48,
    "eos_token_id": 49,
}
# label -> (config, batch, length)
CONFIGS = {
    "full length": (TINY, 3, 9),
    "one layer, one head, one prompt": (TINY | {"num_hidden_layers": 1, "num_attention_heads": 1}, 1, 5),
    "gelu, as many heads as channels": (TINY | {"hidden_act": "gelu", "num_attention_heads": 12}, 3, 4),
    "gelu_new, three layers": (TINY | {"hidden_act": "gelu_new", "num_hidden_layers": 3, "hidden_size": 15}, 1, 8),
    "narrow inside, great epsilon": (TINY | {"intermediate_size": 7, "layer_norm_eps": 1e-2, "hidden_size": 6}, 2, 9),
    "one token": (TINY | {"max_position_embeddings": 4, "hidden_act": "gelu"}, 3, 1),
    "long, wide": (TINY | {"max_position_embeddings": 80, "hidden_size": 48, "num_attention_heads": 4}, 1, 77),
}
# The config.json of text_encoder/ in runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1.
SD1 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD2 = SD1 | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}


def random_encoder(config):
    """A text encoder of transformers with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    net = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return net


def load(folder):
    """Ours, with the parameters in a folder."""
    model = CLIPText(CLIPTextConfig.from_dict(json.loads((folder / "config.json").read_text())))
    tensors = normalise_names(load_file(folder / "model.safetensors"))
    return model, {"params": params_from_torch(tensors, expected(model), np.float32)}


def expected(model):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]


def tokens(batch, length, vocabulary=TINY["vocab_size"]):
    return np.random.default_rng(1).integers(0, vocabulary, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("label", CONFIGS)
def test_output_equals_transformers(label, tmp_path):
    config, batch, length = CONFIGS[label]
    net = random_encoder(config)
    net.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    ids = tokens(batch, length)
    with torch.no_grad():
        reference = net(torch.tensor(ids)).last_hidden_state.numpy()
    found = np.asarray(jax.jit(model.apply)(params, ids))
    scale = np.abs(reference).max()
    error = np.abs(found - reference).max() / scale
    print(f"{label}: error {error:.1e} of the output's scale")
    assert found.shape == (batch, length, config["hidden_size"]) and found.dtype == np.float32
    assert scale > 0.1
    assert error <= 1e-5


def test_tokens_see_only_those_before(tmp_path):
    random_encoder(TINY).save_pretrained(tmp_path)
    model, params = load(tmp_path)
    ids = tokens(3, 9)
    other = ids.copy()
    other[:, 5] += 1
    run = jax.jit(model.apply)
    change = np.abs(np.asarray(run(params, ids)) - np.asarray(run(params, other))).max(axis=-1)
    assert (change[:, :5] < 1e-6).all() and (change[:, 5:] > 1e-3).all()


def test_files_with_and_without_prefix(tmp_path):
    """transformers 5 writes a model made in memory without ``text_model.``, and one that it loaded as it found it."""
    random_encoder(TINY).save_pretrained(tmp_path / "flat")
    _, params = load(tmp_path / "flat")
    flat = load_file(tmp_path / "flat" / "model.safetensors")
    assert "encoder.layers.0.self_attn.q_proj.weight" in flat
    hub = {f"text_model.{name}": tensor for name, tensor in flat.items()}
    assert normalise_names(flat).keys() == hub.keys()
    buffer = {"text_model.embeddings.position_ids": np.arange(9)[None]}
    assert normalise_names(hub | buffer).keys() == hub.keys()
    assert normalise_names({"text_projection.weight": 1}) == {"text_projection.weight": 1}

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text((tmp_path / "flat" / "config.json").read_text())
    save_file(hub | buffer, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    transformers.CLIPTextModel.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == hub.keys()
    for folder in ("hub", "again"):
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / folder)[1], params)
    with pytest.raises(ValueError, match=r"tensors: found text_model\.\S+ twice"):
        normalise_names(flat | hub)


@pytest.mark.parametrize("config, size", [(SD1, 123_060_480), (SD2, 340_387_840)])
def test_tensors_of_published_encoders(config, size):
    """Stable Diffusion 1 (CLIP ViT-L/14) and 2 (OpenCLIP ViT-H/14 without its last layer)."""
    leaves = traverse_util.flatten_dict(expected(CLIPText(CLIPTextConfig.from_dict(config))))
    with torch.device("meta"):
        net = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    found = {torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in leaves.items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in normalise_names(net.state_dict()).items()}
    assert sum(leaf.size for leaf in leaves.values()) == size


def test_every_key_of_transformers_is_known():
    """With the defaults, and those that it could write."""
    theirs = transformers.CLIPTextConfig()
    config = CLIPTextConfig.from_dict(theirs.to_dict())
    assert config == CLIPTextConfig()
    assert all(getattr(theirs, key) == value for key, value in vars(config).items())


def test_bfloat16_is_near_float32(tmp_path):
    """With parameters in bfloat16 too."""
    random_encoder(TINY).save_pretrained(tmp_path)
    model, params = load(tmp_path)
    ids = tokens(3, 9)
    full = jax.jit(model.apply)(params, ids)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), ids)
    assert half.dtype == jnp.bfloat16
    assert 0 < jnp.abs(half.astype(jnp.float32) - full).mean() < 0.05 * jnp.abs(full).mean()


@pytest.mark.parametrize(
    "ids", [np.zeros((2, 10), np.int32), np.zeros((2, 0), np.int32), np.zeros(3, np.int32), np.zeros((2, 3))]
)
def test_ids_that_do_not_fit_are_refused(ids):
    with pytest.raises(ValueError, match=r"ids: found .*expected integers \[B, L\], L in 1..9"):
        CLIPText(CLIPTextConfig.from_dict(TINY)).apply({"params": {}}, ids)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model_type": "clip"}, ["model_type", "'clip'", "clip_text_model"]),
        ({"architectures": ["CLIPTextModelWithProjection"]}, ["architectures", "WithProjection", "['CLIPTextModel']"]),
        ({"pruned_heads": {"0": [1]}}, ["pruned_heads", "{'0': [1]}"]),
        ({"use_attention_mask": True}, ["use_attention_mask", "True", "False"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "quick_gelu, gelu, gelu_new"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5", "hidden_size 12"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0", "above 0"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5", "whole number"]),
        ({"vocab_size": None}, ["vocab_size", "None", "whole number"]),
        ({"max_position_embeddings": -77}, ["max_position_embeddings", "-77", "above 0"]),
        ({"layer_norm_eps": None}, ["layer_norm_eps", "None", "a number"]),
        ({"layer_norm_eps": 1}, ["layer_norm_eps", "1", "between 0 and 1"]),
        ({"quantization_config": {}, "_private": 1}, ["unknown keys: found quantization_config;", "hidden_act"]),
        ({"text_config": {}}, ["unknown keys", "text_config"]),
    ],
)
def test_unsupported_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        CLIPTextConfig.from_dict(TINY | options)
    assert all(word in str(error.value) for word in words), error.value


# label -> (text, vision, rest) of a CLIP; pictures of 13x13 in patches of 4x4 leave a row and a column unseen
CLIPS = {
    "patches that do not divide": ({}, {"num_attention_heads": 5}, {}),
    "gelu, one layer, wide projection, the end by its number": (
        {"hidden_act": "gelu", "num_hidden_layers": 1, "eos_token_id": 2},
        {"hidden_act": "gelu", "num_hidden_layers": 1, "image_size": 12, "patch_size": 3, "layer_norm_eps": 1e-2},
        {"projection_dim": 31},
    ),
    "one patch, as many heads as channels": (
        {"num_attention_heads": 1, "intermediate_size": 7},
        {"num_attention_heads": 15, "image_size": 9, "patch_size": 9, "num_hidden_layers": 3},
        {"projection_dim": 1},
    ),
}


@pytest.mark.parametrize("label", CLIPS)
def test_features_equal_transformers(label, tmp_path):
    text, vision, rest = CLIPS[label]
    net = tiny.save_clip(tmp_path, text, vision, **rest)
    clip = load_clip(tmp_path)
    size = clip.net.config.vision_config.image_size
    pixels = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    ids = clip.tokenizer(["a lake", "sunset with two trees and moon", ""])
    with torch.no_grad():
        images = net.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output.numpy()
        texts = net.get_text_features(torch.tensor(ids)).pooler_output.numpy()
    for found, reference in zip(
        jax.jit(clip.net.apply)({"params": clip.params}, pixels, ids), (images, texts), strict=True
    ):
        scale = np.abs(reference).max()
        error = np.abs(np.asarray(found) - reference).max() / scale
        print(f"{label}: error {error:.1e} of the output's scale")
        assert found.shape == (3, net.config.projection_dim) and found.dtype == jnp.float32
        assert scale > 0.1 and np.abs(reference - reference[:1]).max() > 0.1  # each has its own
        assert error <= 1e-5


def test_tensors_of_a_published_clip():
    """OpenAI's CLIP ViT-L/14, by its sizes in the config.json on the Hub."""
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    wider = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = transformers.CLIPConfig(text_config=wide, vision_config=wider | {"patch_size": 14}, projection_dim=768)
    model = CLIP(CLIPConfig.from_dict(config.to_dict()))
    shapes = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    leaves = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *shapes)["params"])
    with torch.device("meta"):
        net = transformers.CLIPModel(config)
    found = {torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in leaves.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if name != "logit_scale"}
    assert found == wanted
    assert sum(leaf.size for leaf in leaves.values()) == 427_616_512


def test_every_key_of_a_whole_clip_is_known():
    theirs = transformers.CLIPConfig()
    config = CLIPConfig.from_dict(theirs.to_dict())
    assert config == CLIPConfig()
    for name in ("text_config", "vision_config"):
        assert all(getattr(getattr(theirs, name), k) == v for k, v in vars(getattr(config, name)).items())
    # As in files of older versions: what the longer name says counts alone, filled up by defaults.
    old = {"model_type": "clip", "text_config": {"hidden_size": 24}, "text_config_dict": {"eos_token_id": 2}}
    old |= {"vision_config": {"hidden_size": 24}, "vision_config_dict": None, "_commit_hash": "a"}
    assert CLIPConfig.from_dict(old) == CLIPConfig(vision_config=CLIPVisionConfig(hidden_size=24), eos_token_id=2)
    theirs = transformers.CLIPConfig(**{key: value for key, value in old.items() if not key.startswith("_")})
    assert CLIPConfig.from_dict(theirs.to_dict()) == CLIPConfig.from_dict(old)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model_type": "siglip"}, ["model_type: found 'siglip', supported: clip"]),
        ({"model_type": None}, ["model_type: found None, supported: clip"]),
        ({"projection_dim": 0}, ["projection_dim: found 0", "above 0"]),
        ({"text_config": {"hidden_act": "relu"}}, ["text_config: hidden_act: found 'relu'"]),
        ({"text_config": {"eos_token_id": [2, 3]}}, ["eos_token_id: found", "whole number"]),
        ({"text_config": 3}, ["text_config: "]),
        ({"vision_config": {"num_channels": 1}}, ["vision_config: num_channels: found 1, supported: 3"]),
        ({"vision_config": {"patch_size": 225}}, ["vision_config: patch_size: found 225", "at most image_size 224"]),
        ({"vision_config": {"image_size": [224, 224]}}, ["vision_config: image_size", "whole number"]),
        ({"quantization_config": {}}, ["unknown keys: found quantization_config;"]),
    ],
)
def test_unsupported_options_of_a_whole_clip_are_named(options, words):
    with pytest.raises(ValueError) as error:
        CLIPConfig.from_dict({"model_type": "clip"} | options)
    assert all(word in str(error.value) for word in words), error.value
