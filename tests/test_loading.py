"""Loading a base: what is read, and every way in which a folder can be wrong."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mcm_jax.base import BaseCard, BaseLoadError, find_folder, load_base, outline
from mcm_jax.base.weights import torch_name, torch_shape

UNET = {
    "sample_size": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny base (eps, DDPM, one attention in the middle), written by diffusers; never changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    net = diffusers.UNet2DModel(**UNET)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(saved):
    return load_base(saved)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved base, to be damaged."""
    return shutil.copytree(saved, tmp_path / "tiny")


def predict(base, x, t):
    """Under ``jit``, without LLVM's costly passes: they buy nothing for one call of a tiny net."""
    return jax.jit(base.predict, compiler_options={"xla_backend_optimization_level": 0})(base.params, x, t)


def edit(file, **changes):
    """Changes keys of a JSON file; the value None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder, change, name=WEIGHTS):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, folder / name)


def expect_error(folder, *words, **kwargs):
    with pytest.raises(BaseLoadError) as error:
        load_base(folder, **kwargs)
    message = str(error.value)
    assert all(word in message for word in words), message
    return message


def test_what_a_base_is(base, saved):
    assert base.name == "tiny"
    assert base.latent_shape == base.image_shape == (4, 4, 3)
    assert base.schedule.num_train_timesteps == 20
    assert set(base.params) == {"unet"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(base.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(base.params)) == sum(
        t.numel() for t in load_file(saved / WEIGHTS).values()
    )
    image = np.ones((2, 4, 4, 3), np.float32)
    assert base.encode(base.params, image) is image and base.decode(base.params, image) is image


def test_an_unconditional_base_refuses_text(base):
    x, t = jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="context: base 'tiny' is unconditional"):
        base.predict(base.params, x, t, context=jnp.zeros((1, 77, 8)))
    with pytest.raises(ValueError, match="'tiny' is unconditional, it has no text encoder"):
        base.embed_text(base.params, ["a hill"])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_become_eps(prediction_type, folder, base):
    """The same network read as v or x_0: eps follows from the definitions."""
    edit(folder / "scheduler/scheduler_config.json", prediction_type=prediction_type)
    other = load_base(folder)
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), jnp.array([3, 15])
    raw, found = predict(base, x, t), predict(other, x, t)
    alpha, sigma = (f(t)[:, None, None, None] for f in (base.schedule.alpha, base.schedule.sigma))
    expected = alpha * raw + sigma * x if prediction_type == "v_prediction" else (x - alpha * raw) / sigma
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert other.fingerprint != base.fingerprint


def test_fingerprint(base, folder, saved):
    assert load_base(folder).fingerprint == base.fingerprint  # another place, the same model
    assert len(base.fingerprint) == 64 and int(base.fingerprint, 16)
    assert load_base(folder, "bfloat16").fingerprint != base.fingerprint
    edit(folder / "scheduler/scheduler_config.json", timestep_spacing="trailing")  # matters to samplers only
    assert load_base(folder).fingerprint == base.fingerprint
    edit(folder / "unet/config.json", norm_eps=1e-3)
    assert load_base(folder).fingerprint != base.fingerprint
    shutil.copy(saved / "unet/config.json", folder / "unet/config.json")
    edit_weights(folder, lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1})
    assert load_base(folder).fingerprint != base.fingerprint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_and_params(dtype, base, folder):
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    edit_weights(folder, lambda tensors: {name: tensor.to(half) for name, tensor in tensors.items()})
    as_float32, as_half = load_base(folder), load_base(folder, dtype)

    def check(full, read, kept):
        assert read.dtype == jnp.float32 and kept.dtype == dtype
        np.testing.assert_array_equal(read, full.astype(dtype).astype(jnp.float32))
        np.testing.assert_array_equal(read, kept.astype(jnp.float32))

    jax.tree.map(check, base.params, as_float32.params, as_half.params)
    x, t = jax.random.normal(jax.random.key(0), (1, 4, 4, 3)), jnp.array([10])
    full, half = predict(base, x, t), predict(as_half, x, t)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(full - half).max()) < 0.05 * float(jnp.abs(full).max())


def test_a_lone_variant_is_read(folder, base):
    edit_weights(folder, dict, "unet/diffusion_pytorch_model.fp16.safetensors")
    assert load_base(folder).fingerprint == base.fingerprint
    shutil.copy(
        folder / "unet/diffusion_pytorch_model.fp16.safetensors",
        folder / "unet/diffusion_pytorch_model.ema.safetensors",
    )
    expect_error(folder, "more than one variant", "fp16", "ema")


def test_legacy_attention_names(folder, base):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, old in names.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            renamed[name] = tensor
        assert renamed.keys() != tensors.keys()
        return renamed

    edit_weights(folder, rename)
    assert load_base(folder).fingerprint == base.fingerprint


def test_a_scale_that_diffusers_wrote_by_itself_is_doubted(ldm_path, tmp_path):
    """A VQModel that is saved anew says 0.18215, though its config had no such key."""
    folder = shutil.copytree(ldm_path, tmp_path / "ldm")
    file = folder / "vqvae/config.json"
    config = json.loads(file.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        file.write_text(json.dumps({k: v for k, v in config.items() if k != "scaling_factor"}))
        assert load_base(folder).autoencoder.config.scaling_factor == 1
    file.write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    with pytest.warns(UserWarning, match=r"vqvae/config.json: scaling_factor is 0.18215.* set it to 1.0"):
        assert load_base(folder).autoencoder.config.scaling_factor == 0.18215


def test_names_and_shapes():
    assert torch_name(("down_blocks_0", "resnets_11", "conv1", "kernel")) == "down_blocks.0.resnets.11.conv1.weight"
    assert torch_name(("time_embedding", "linear_1", "bias")) == "time_embedding.linear_1.bias"
    assert torch_name(("mid_block", "attentions_0", "to_out_0", "kernel")) == "mid_block.attentions.0.to_out.0.weight"
    assert torch_name(("conv_norm_out", "scale")) == "conv_norm_out.weight"
    assert torch_shape("kernel", (3, 5, 16, 32)) == (32, 16, 3, 5)
    assert torch_shape("kernel", (16, 32)) == (32, 16)
    assert torch_shape("bias", (7,)) == (7,)


def test_not_a_directory(tmp_path):
    expect_error(tmp_path / "google" / "ddpm", "not a directory", "snapshot_download")
    (tmp_path / "file").touch()
    expect_error(tmp_path / "file", "not a directory")


def test_unknown_dtype(saved):
    with pytest.raises(ValueError, match="dtype: found 'int8', expected one of float32, bfloat16, float16"):
        load_base(saved, "int8")


@pytest.mark.parametrize("file", FILES)
def test_fuzz_deleted_and_truncated(file, folder):
    """Each file absent, empty, cut at several places, or replaced by noise: always our error, naming the file."""
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    expect_error(folder, str(folder / file), "no such file")
    cuts = [0, 1, 7, 8, 9, len(content) // 2, len(content) - 2]
    noise = np.random.default_rng(0).bytes(200)
    for damaged in [content[:cut] for cut in cuts] + [noise]:
        (folder / file).write_bytes(damaged)
        expect_error(folder, str(folder / file), "damaged or truncated" if file == WEIGHTS else "not valid JSON")


def test_missing_file_says_what_the_folder_must_hold(folder):
    (folder / "unet/config.json").unlink()
    expect_error(folder, *FILES)


def test_json_that_is_no_object(folder):
    (folder / "unet/config.json").write_text("[1]")
    expect_error(folder, "unet/config.json", "JSON list", "expected an object")


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, ["FluxPipeline", "DDPMPipeline, DDIMPipeline"]),
        ("model_index.json", {"unet": None}, ["found no unet", "expected unet, scheduler"]),
        ("unet/config.json", {"_class_name": "UNet1DModel"}, ["UNet1DModel", "UNet2DModel"]),
        ("unet/config.json", {"time_embedding_type": "learned"}, ["time_embedding_type", "'learned'", "positional"]),
        ("unet/config.json", {"cross_attention_dim": 8}, ["unknown keys", "cross_attention_dim"]),
        ("unet/config.json", {"block_out_channels": 8}, []),
        ("unet/config.json", {"sample_size": None}, ["sample_size: found None", "a multiple of 2"]),
        ("unet/config.json", {"sample_size": 5}, ["sample_size: found 5", "a multiple of 2"]),
        ("unet/config.json", {"out_channels": 6}, ["out_channels: found 6", "in_channels, 3"]),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, ["'LCMScheduler'", "PNDMScheduler"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, ["beta_schedule", "'sigmoid'", "linear"]),
        ("scheduler/scheduler_config.json", {"beta_end": "x"}, []),
    ],
)
def test_unsupported_values_are_refused_before_weights_are_read(file, changes, words, folder):
    edit(folder / file, **changes)
    (folder / WEIGHTS).write_bytes(b"")
    expect_error(folder, str(folder / file), *words)


def test_tensors_that_do_not_fit_are_all_listed(folder):
    def change(tensors):
        tensors["conv_out.wait"] = tensors.pop("conv_out.weight")
        return tensors | {"conv_in.weight": torch.zeros(8, 4, 3, 3)}

    edit_weights(folder, change)
    expect_error(
        folder,
        WEIGHTS,
        "missing tensors: conv_out.weight",
        "unexpected tensors: conv_out.wait",
        "conv_in.weight (found [8, 4, 3, 3], expected [8, 3, 3, 3])",
    )


def test_a_config_of_another_size_does_not_flood_the_screen(folder):
    edit(folder / "unet/config.json", block_out_channels=[16, 16])
    assert len(expect_error(folder, "wrong shapes", "more")) < 4000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, folder):
    edit_weights(folder, lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + value})
    expect_error(folder, WEIGHTS, "NaN or infinity", "conv_in.bias")


def test_values_too_large_for_the_dtype(folder):
    edit_weights(folder, lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1e6})
    load_base(folder)
    expect_error(folder, "infinity (as float16) in conv_in.bias", dtype="float16")


def test_tensors_that_are_not_floating(folder):
    edit_weights(folder, lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"].to(torch.int8)})
    expect_error(folder, WEIGHTS, "conv_in.bias (int8)")


def test_loading_imports_no_torch(saved):
    code = (
        "import sys; from mcm_jax.base import load_base; load_base(sys.argv[1]); "
        "sys.exit(' '.join({'torch', 'diffusers', 'tensorflow'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_outline_is_the_base_without_its_numbers(base_path):
    real, found = load_base(base_path), outline(base_path)
    assert found.fingerprint == real.fingerprint
    assert jax.tree.structure(found.params) == jax.tree.structure(real.params)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(real.params), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)
    half = outline(base_path, "bfloat16")
    assert half.fingerprint == load_base(base_path, "bfloat16").fingerprint != real.fingerprint
    assert half.card.parameter_bytes == real.card.parameter_bytes // 2


def test_a_card_comes_back_from_json(base_path):
    card = load_base(base_path).card
    back = BaseCard.from_json(json.loads(json.dumps(card.to_json())))
    for field in dataclasses.fields(BaseCard):
        if field.name != "schedule":
            assert getattr(back, field.name) == getattr(card, field.name), field.name
    for field in dataclasses.fields(card.schedule):
        np.testing.assert_array_equal(getattr(back.schedule, field.name), getattr(card.schedule, field.name))
    assert back.schedule.alphas_cumprod.dtype == np.float32


def test_a_folder_of_a_base_is_found_without_the_network(base_path, tmp_path):
    assert find_folder(base_path) == base_path
    assert find_folder(tmp_path / "nowhere") is None and find_folder("nobody/never-downloaded") is None
