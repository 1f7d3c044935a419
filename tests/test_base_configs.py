"""A value of the wrong type in a config.json of a base, whatever the key, is refused by name."""

import dataclasses
import json
import math
import shutil
import types

import pytest

from mcm_jax.base import BaseLoadError, load_base
from mcm_jax.base.autoencoders import AutoencoderKLConfig, VQConfig
from mcm_jax.base.clip import CLIPTextConfig
from mcm_jax.base.unet2d import UNet2DConfig
from mcm_jax.base.unet2d_condition import UNet2DConditionConfig

CLASSES = [UNet2DConfig, UNet2DConditionConfig, AutoencoderKLConfig, VQConfig, CLIPTextConfig]
FIELDS = [(c, f) for c in CLASSES for f in dataclasses.fields(c)]
# All that JSON can hold, as a type that is right for few fields at most: label -> (value, annotations that allow it)
VALUES = {
    "text": ("x", ()),
    "number in a text": ("8", ()),
    "object": ({"a": 8}, ()),
    "list of texts": (["x", "x"], ()),
    "list of several types": ([8, "8"], ()),
    "list in a list": ([[8, 8]], ()),
    "list of fractions": ([8.5, 8.5], ()),
    "fraction": (1.5, ("float",)),
    "true": (True, ("bool",)),
    "null": (None, ("None",)),
    "infinity": (math.inf, ()),
    "not a number": (math.nan, ()),
}


def allowed_types(field):
    """Names of the types that a field may have, without lists."""
    kinds = field.type.__args__ if isinstance(field.type, types.UnionType) else (field.type,)
    return {"None" if kind in (None, types.NoneType) else kind.__name__ for kind in kinds}


@pytest.mark.parametrize("config, field", FIELDS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", x)))
def test_a_wrong_type_is_named(config, field):
    config.from_dict({})  # the defaults by themselves are fine
    for label, (value, allowed) in VALUES.items():
        if allowed_types(field) & set(allowed):
            continue
        with pytest.raises(ValueError) as error:
            config.from_dict({field.name: value})
        said = str(error.value)
        assert said.startswith(f"{field.name}: found ") and ", supported: " in said, (label, said)


def test_every_kind_of_value_is_right_somewhere():
    """So that the law above is not held by refusing everything."""
    UNet2DConfig(freq_shift=1, norm_eps=0.5, add_attention=False, attention_head_dim=None, sample_size=(8, 16))
    UNet2DConditionConfig.from_dict({"attention_head_dim": [5, 10, 20, 20], "only_cross_attention": [True] * 4})
    # As diffusers' converter of checkpoints wrote it for many models on the Hub.
    UNet2DConditionConfig.from_dict({"upcast_attention": None, "mid_block_only_cross_attention": None})
    AutoencoderKLConfig(scaling_factor=1, shift_factor=0.5, sample_size=None)


@pytest.mark.parametrize(
    "base, file, key, value, expected",
    [
        ("ldm_path", "unet/config.json", "time_embedding_dim", "64", "a whole number or null"),
        ("ldm_path", "unet/config.json", "block_out_channels", 20, "a list of whole numbers"),
        ("ldm_path", "vqvae/config.json", "vq_embed_dim", [3], "a whole number or null"),
        ("sd_path", "unet/config.json", "time_embedding_dim", 64.0, "a whole number or null"),
        ("sd_path", "unet/config.json", "norm_eps", None, "a number"),
        ("sd_path", "vae/config.json", "sample_size", [8, 8, 8], "a whole number or a list of 2 whole numbers or null"),
        ("sd_path", "text_encoder/config.json", "hidden_size", True, "a whole number"),
    ],
)
def test_the_message_names_the_file(base, file, key, value, expected, request, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(request.getfixturevalue(base), folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(BaseLoadError) as error:
        load_base(folder)
    found = tuple(value) if isinstance(value, list) else value
    assert str(error.value) == f"{folder / file}: {key}: found {found!r}, supported: {expected}"
