"""The U-Net with a context equals diffusers' on random weights, and has the published networks' parameters."""

import dataclasses
import gc
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from mcm_jax.base import attention
from mcm_jax.base.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mcm_jax.base.weights import params_from_torch, torch_name, torch_shape

pytestmark = pytest.mark.slow

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
# label -> (config, batch, height and width, length of the context)
CONFIGS = {
    "plain, a prompt's length": (TINY, 3, (8, 8), 77),
    "linear projection, heads of each level": (
        TINY
        | {"block_out_channels": (8, 12, 16), "attention_head_dim": (1, 3, 4), "use_linear_projection": True}
        | {"down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN), "up_block_types": (UP, CROSS_UP, CROSS_UP)},
        1,
        (8, 16),
        5,
    ),
    "uneven widths, layers of each level, no middle": (
        TINY
        | {"block_out_channels": (12, 8, 20), "layers_per_block": (1, 2, 1), "mid_block_type": None}
        | {"down_block_types": (DOWN, CROSS_DOWN, DOWN), "up_block_types": (CROSS_UP, UP, CROSS_UP)}
        | {"in_channels": 3, "out_channels": 5, "act_fn": "gelu"},
        1,
        (12, 4),
        1,
    ),
    "scale_shift, two transformer blocks": (
        TINY
        | {"resnet_time_scale_shift": "scale_shift", "transformer_layers_per_block": 2, "mid_block_scale_factor": 1.7}
        | {"upcast_attention": True},
        3,
        (4, 6),
        5,
    ),
    "depth of each level, heads that do not divide the width": (
        TINY | {"transformer_layers_per_block": (2, 1), "attention_head_dim": 3, "act_fn": "mish"},
        1,
        (4, 4),
        2,
    ),
    "as the first of them, linear": (TINY | {"attention_head_dim": 3, "use_linear_projection": True}, 1, (4, 4), 2),
    "only cross-attention at one level, odd time width": (
        TINY
        | {"block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 3, "time_embedding_dim": 10}
        | {"down_block_types": (CROSS_DOWN,) * 2, "up_block_types": (CROSS_UP,) * 2}
        | {"only_cross_attention": (False, True), "center_input_sample": True, "freq_shift": 1}
        | {"flip_sin_to_cos": False, "norm_eps": 1e-3},
        3,
        (4, 4),
        7,
    ),
    "padding 0": (TINY | {"downsample_padding": 0, "act_fn": "relu"}, 3, (8, 6), 5),
    "sizes that cannot be halved": (
        TINY
        | {"block_out_channels": (8, 8, 8), "attention_head_dim": 1}
        | {"down_block_types": (CROSS_DOWN, DOWN, DOWN), "up_block_types": (UP, UP, CROSS_UP)},
        1,
        (7, 10),
        3,
    ),
    "sizes that cannot be halved, padding 0": (
        TINY
        | {"block_out_channels": (8, 8, 8), "attention_head_dim": 1, "downsample_padding": 0}
        | {"down_block_types": (CROSS_DOWN, DOWN, DOWN), "up_block_types": (UP, UP, CROSS_UP)},
        1,
        (11, 6),
        3,
    ),
}
# The parts of published configs that say more than the defaults of that time.
STABLE_DIFFUSION_1_5 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
STABLE_DIFFUSION_2_1 = STABLE_DIFFUSION_1_5 | {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "upcast_attention": True,
    "use_linear_projection": True,
}


def quick(function):
    """``jax.jit`` that compiles tiny nets faster: LLVM's costly passes buy nothing here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def expected_params(config):
    """Pytree of the names, shapes and dtypes of our network's parameters."""
    c = UNet2DConditionConfig.from_dict(config)
    x, t = jax.ShapeDtypeStruct((1, 8, 8, c.in_channels), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    context = jax.ShapeDtypeStruct((1, 2, c.cross_attention_dim), jnp.float32)
    return jax.eval_shape(UNet2DCondition(c).init, jax.random.key(0), x, t, context)["params"]


def inputs(config, batch, size, length):
    """Latents, timesteps, context."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, *size, config.get("in_channels", 4))).astype(np.float32)
    context = rng.normal(size=(batch, length, config["cross_attention_dim"])).astype(np.float32)
    return x, np.array([999, 0, 431], np.int32)[:batch], context


def ours_and_theirs(config, noise, *arrays):
    """The outputs of our network and of diffusers' for the same random weights.

    `noise` is added to every parameter, so that none is left at 0 or 1.
    """
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(**config).eval()
    x, t, context = map(torch.tensor, arrays)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += noise * torch.randn_like(parameter)
        theirs = net(x.permute(0, 3, 1, 2), t, context).sample.permute(0, 2, 3, 1).numpy()
    tensors = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    params = params_from_torch(tensors, expected_params(config), np.float32)
    del net, tensors  # as much as the parameters
    gc.collect()
    ours = UNet2DCondition(UNet2DConditionConfig.from_dict(config))
    return np.asarray(quick(ours.apply)({"params": params}, *arrays)), theirs


def assert_equal(ours, theirs, label):
    """Equal to 1e-5 of the scale, example by example."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = np.abs(b).max()
        assert scale > 0.1
        print(f"{label}, example {i}: error {np.abs(a - b).max() / scale:.1e} of the output's scale")
        assert np.abs(a - b).max() <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("label", CONFIGS)
def test_output_equals_diffusers(label):
    config, *sizes = CONFIGS[label]
    assert_equal(*ours_and_theirs(config, 0.1, *inputs(config, *sizes)), label)


def test_output_of_full_size_equals_diffusers():
    """Stable Diffusion 1.5's own widths and depth, on a quarter of its latents, with random weights; takes 9 GiB."""
    arrays = inputs(STABLE_DIFFUSION_1_5, 1, (32, 32), 77)
    # Noise of a size that leaves the 860M parameters' products at the scale that they have at initialisation.
    assert_equal(*ours_and_theirs(STABLE_DIFFUSION_1_5, 0.003, *arrays), "full size")


@pytest.mark.parametrize(
    "config, count", [(STABLE_DIFFUSION_1_5, 859_520_964), (STABLE_DIFFUSION_2_1, 865_910_724)], ids=["1.5", "2.1"]
)
def test_parameters_of_published_networks(config, count):
    ours = {
        torch_name(path): torch_shape(path[-1], leaf.shape)
        for path, leaf in traverse_util.flatten_dict(expected_params(config)).items()
    }
    with torch.device("meta"):
        theirs = {n: tuple(p.shape) for n, p in diffusers.UNet2DConditionModel(**config).state_dict().items()}
    assert ours == theirs
    assert sum(int(np.prod(shape)) for shape in ours.values()) == count


@pytest.fixture(scope="module")
def tiny():
    """A network of our own with inputs: (network, params, x, t, context)."""
    config = TINY | {"block_out_channels": (8,), "down_block_types": (CROSS_DOWN,), "up_block_types": (UP,)}
    net = UNet2DCondition(UNet2DConditionConfig.from_dict(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), expected_params(config))
    return net, {"params": params}, *inputs(config, 2, (5, 4), 3)


def test_context_reaches_its_own_example_only(tiny):
    net, params, x, t, context = tiny
    apply = quick(net.apply)
    changed = np.abs(apply(params, x, t, context) - apply(params, x, t, context * np.float32([[[1]], [[2]]])))
    assert changed[0].max() == 0 and changed[1].max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_float32(tiny, dtype):
    net, params, *arrays = tiny
    full = quick(net.apply)(params, *arrays)
    half_params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    half = quick(UNet2DCondition(net.config, dtype=dtype).apply)(half_params, *arrays)
    assert half.dtype == jnp.float32
    error = float(jnp.abs(half - full).max() / jnp.abs(full).max())
    assert 0 < error < 0.05


def test_shapes_that_do_not_fit_are_refused(tiny):
    net, params, x, t, context = tiny
    for wrong in (x[..., :3], x[:, :0], x[0]):
        with pytest.raises(ValueError, match=r"x: found shape .*expected \[B, H, W, 4\], H and W at least 1"):
            net.apply(params, wrong, t, context)
    with pytest.raises(ValueError, match=r"t: found shape \(1,\), expected \(2,\)"):
        net.apply(params, x, t[:1], context)
    for wrong in (context[:1], context[:, :0], context[..., :5], context[0]):
        with pytest.raises(ValueError, match=r"context: found shape .*expected \[2, S, 6\], S above 0"):
            net.apply(params, x, t, wrong)
    padding_0 = UNet2DCondition(UNet2DConditionConfig.from_dict(TINY | {"downsample_padding": 0}))
    with pytest.raises(ValueError, match="H and W at least 2"):
        padding_0.apply(params, x[:, :1], t, context)


def test_keys_and_defaults_are_those_of_diffusers():
    theirs = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    theirs = {name: parameter.default for name, parameter in theirs.items() if name != "self"}
    assert {f.name: f.default for f in dataclasses.fields(UNet2DConditionConfig)} == theirs


def test_reads_what_diffusers_writes(tmp_path):
    with torch.device("meta"):
        diffusers.UNet2DConditionModel(**TINY).save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert UNet2DConditionConfig.from_dict(written) == UNet2DConditionConfig.from_dict(TINY)


@pytest.mark.parametrize(
    "options, words",
    [
        # Stable Diffusion XL has several of these; the one that says it all comes first.
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
            ["addition_embed_type", "text_time", "None"],
        ),
        ({"addition_time_embed_dim": 256}, ["addition_time_embed_dim", "256"]),
        ({"class_embed_type": "projection"}, ["class_embed_type", "projection", "None"]),
        ({"num_class_embeds": 1000}, ["num_class_embeds", "1000", "None"]),
        ({"class_embeddings_concat": True}, ["class_embeddings_concat", "True"]),
        ({"projection_class_embeddings_input_dim": 512}, ["projection_class_embeddings_input_dim", "512"]),
        ({"encoder_hid_dim_type": "text_proj"}, ["encoder_hid_dim_type", "text_proj"]),
        ({"encoder_hid_dim": 1024}, ["encoder_hid_dim", "1024"]),
        ({"dual_cross_attention": True}, ["dual_cross_attention", "True", "False"]),
        ({"attention_type": "gated"}, ["attention_type", "gated", "default"]),
        ({"cross_attention_norm": "group_norm"}, ["cross_attention_norm", "group_norm"]),
        ({"num_attention_heads": 8}, ["num_attention_heads", "8", "None"]),
        ({"reverse_transformer_layers_per_block": [[1], [1]]}, ["reverse_transformer_layers_per_block", "None"]),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, ["mid_block_type", "Simple", "UNetMidBlock2DCrossAttn"]),
        ({"time_embedding_type": "fourier"}, ["time_embedding_type", "fourier", "positional"]),
        ({"time_embedding_act_fn": "silu"}, ["time_embedding_act_fn", "silu"]),
        ({"timestep_post_act": "silu"}, ["timestep_post_act", "silu"]),
        ({"time_cond_proj_dim": 256}, ["time_cond_proj_dim", "256"]),
        ({"resnet_time_scale_shift": "ada_group"}, ["resnet_time_scale_shift", "ada_group", "scale_shift"]),
        ({"resnet_skip_time_act": True}, ["resnet_skip_time_act", "True"]),
        ({"resnet_out_scale_factor": 2.0}, ["resnet_out_scale_factor", "2.0"]),
        ({"conv_in_kernel": 1}, ["conv_in_kernel", "1", "3"]),
        ({"conv_out_kernel": 1}, ["conv_out_kernel", "1", "3"]),
        ({"downsample_padding": 2}, ["downsample_padding", "2", "0, 1"]),
        ({"act_fn": "tanh"}, ["act_fn", "tanh", "silu"]),
        ({"down_block_types": (CROSS_DOWN, "AttnDownBlock2D")}, ["down_block_types", "AttnDownBlock2D", CROSS_DOWN]),
        ({"up_block_types": ("SimpleCrossAttnUpBlock2D", UP)}, ["up_block_types", "SimpleCrossAttnUp", CROSS_UP]),
        ({"up_block_types": (UP,)}, ["up_block_types", "2 block types"]),
        ({"block_out_channels": ()}, ["block_out_channels", "at least one level"]),
        ({"layers_per_block": (1, 2, 1)}, ["layers_per_block", "(1, 2, 1)", "2 of them"]),
        ({"transformer_layers_per_block": [[1], [2]]}, ["transformer_layers_per_block", "([1], [2])", "whole number"]),
        ({"attention_head_dim": None}, ["attention_head_dim", "None", "a whole number"]),
        ({"attention_head_dim": 0}, ["attention_head_dim", "0", "a positive number"]),
        ({"attention_head_dim": (2, 17)}, ["attention_head_dim", "(2, 17)", "(8, 16)"]),
        ({"only_cross_attention": (True,)}, ["only_cross_attention", "(True,)", "2 of them"]),
        ({"norm_num_groups": None}, ["norm_num_groups", "None", "a whole number"]),
        ({"norm_num_groups": 3}, ["norm_num_groups", "3", "(8, 16)"]),
        ({"cross_attention_dim": (6, 6)}, ["cross_attention_dim", "(6, 6)", "a whole number"]),
        ({"cross_attention_dim": 0}, ["cross_attention_dim", "0", "one positive number"]),
        ({"add_attention": True, "_private": 1}, ["unknown keys", "add_attention", "cross_attention_dim"]),
    ],
)
def test_unsupported_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        UNet2DConditionConfig.from_dict(TINY | options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("length", "keys", "causal"), [(1, 3, False), (77, 77, True), (300, 5, False), (521, 40, False), (300, 300, True)]
)
def test_attention_of_one_head_at_a_time_is_pytorchs(length, keys, causal):
    """As one processor device takes it; the suite's two take all heads at once. Gradients, too."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 3, 6)).astype(np.float32) for n in (length, keys, keys))
    there = [torch.tensor(x).swapaxes(1, 2).requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*there, is_causal=causal).swapaxes(1, 2)
    (expected**2).sum().backward()
    assert not attention.loops_over_heads()
    for attend in (attention._by_heads, attention.attend):
        found = attend(q, k, v, causal)
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
        slopes = jax.grad(lambda *parts, attend=attend: (attend(*parts, causal) ** 2).sum(), (0, 1, 2))(q, k, v)
        for slope, part in zip(slopes, there, strict=True):
            wanted = part.grad.swapaxes(1, 2).numpy()
            np.testing.assert_allclose(slope, wanted, atol=1e-5 * np.abs(wanted).max())
