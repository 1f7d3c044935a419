"""The U-Net equals diffusers' on random weights, through the true path: ``save_pretrained``, then ``load_base``."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from mcm_jax.base import load_base
from mcm_jax.base.blocks import GroupNorm
from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.base.weights import torch_name, torch_shape

pytestmark = pytest.mark.slow

DOWN, ATTN_DOWN, RES_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTN_UP, RES_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": (DOWN, ATTN_DOWN),
    "up_block_types": (ATTN_UP, UP),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIGS = {
    "attention, several heads": TINY | {"attention_head_dim": 4, "layers_per_block": 2},
    "heads that do not divide the width": TINY | {"attention_head_dim": 5},
    "no attention": TINY | {"down_block_types": (DOWN, DOWN), "up_block_types": (UP, UP), "add_attention": False},
    "no middle, relu": TINY | {"mid_block_type": None, "act_fn": "relu", "norm_eps": 1e-3},
    "uneven widths, 4 channels, gelu": TINY
    | {
        "block_out_channels": (12, 8, 20),
        "down_block_types": (ATTN_DOWN, ATTN_DOWN, DOWN),
        "up_block_types": (UP, ATTN_UP, ATTN_UP),
        "in_channels": 4,
        "out_channels": 4,
        "act_fn": "gelu",
        "attention_head_dim": None,
    },
    "resnet resampling": TINY
    | {
        "block_out_channels": (8, 8, 16),
        "down_block_types": (ATTN_DOWN, RES_DOWN, DOWN),
        "up_block_types": (RES_UP, ATTN_UP, UP),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "scale_shift, attention norm": TINY
    | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2, "mid_block_scale_factor": 1.7},
    "mish, centred, odd time width": TINY
    | {"act_fn": "mish", "center_input_sample": True, "time_embedding_dim": 24, "sample_size": (4, 8)}
    | {"block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 3},
    "fourier": TINY | {"time_embedding_type": "fourier"},
    "as google/ddpm-celebahq-256": {
        "sample_size": 32,
        "block_out_channels": (8, 8, 16, 16, 24, 24),
        "down_block_types": (DOWN,) * 4 + (ATTN_DOWN, DOWN),
        "up_block_types": (UP, ATTN_UP) + (UP,) * 4,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 8,
        "layers_per_block": 1,
    },
}


def random_unet(config):
    """A diffusers network with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("time_proj"):
                parameter += 0.1 * torch.randn_like(parameter)
    return net


def quick(function):
    """``jax.jit`` that compiles tiny nets faster: LLVM's costly passes buy nothing here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("label, batch", [(label, 3) for label in CONFIGS] + [("attention, several heads", 1)])
def test_output_equals_diffusers(label, batch, tmp_path):
    config = CONFIGS[label]
    net = random_unet(config)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    # Timesteps at which a division by t (fourier) does not hide an error.
    t = np.array([2, 1, 3] if label == "fourier" else [999, 0, 431], np.int32)[:batch]
    x = np.random.default_rng(1).normal(size=(batch, *base.latent_shape)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t)).sample.permute(0, 2, 3, 1).numpy()
    found = np.asarray(quick(base.predict)(base.params, x, t))
    assert found.shape == x.shape and found.dtype == np.float32
    for ours, theirs in zip(found, expected, strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0.1
        print(f"{label}: error {np.abs(ours - theirs).max() / scale:.1e} of the output's scale")
        assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, scale)


def shapes(config, size, **kwargs):
    net = UNet2D(UNet2DConfig.from_dict(config), **kwargs)
    x = jax.ShapeDtypeStruct((1, size, size, config.get("in_channels", 3)), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.int32))["params"]


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


PUBLISHED = {  # config, side of the picture, number of parameters
    "google/ddpm-celebahq-256": (
        CONFIGS["as google/ddpm-celebahq-256"]
        | {"block_out_channels": (128, 128, 256, 256, 512, 512), "norm_num_groups": 32, "layers_per_block": 2},
        *(32, 113_673_219),
    ),
    "CompVis/ldm-celebahq-256": (  # the defaults of the class are this network's
        {
            "sample_size": 64,
            "block_out_channels": (224, 448, 672, 896),
            "down_block_types": (DOWN, ATTN_DOWN, ATTN_DOWN, ATTN_DOWN),
            "up_block_types": (ATTN_UP, ATTN_UP, ATTN_UP, UP),
            "layers_per_block": 2,
            "attention_head_dim": 32,
            "norm_num_groups": 32,
        },
        *(64, 274_056_163),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    """The number of parameters, and every tensor's name and shape, without making one."""
    config, side, expected = PUBLISHED[name]
    params = shapes(config, side)
    assert count(params) == expected
    found = {
        torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in traverse_util.flatten_dict(params).items()
    }
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config).state_dict()
    assert found == {tensor: tuple(value.shape) for tensor, value in theirs.items()}


def test_the_papers_mcm_has_3_9_million_parameters():
    mcm = {
        "in_channels": 8,
        "out_channels": 6,
        "block_out_channels": (32, 32, 64, 128),
        "down_block_types": (DOWN, DOWN, ATTN_DOWN, DOWN),
        "up_block_types": (UP, ATTN_UP, UP, UP),
    }
    assert count(shapes(mcm, 64)) == 3_861_510


@pytest.fixture(scope="module")
def tiny():
    """A network of our own with an input: (config, params, x, t)."""
    light = {"down_block_types": (DOWN, DOWN), "up_block_types": (UP, UP)}  # attention in the middle only
    config = UNet2DConfig.from_dict(TINY | light | {"in_channels": 5, "out_channels": 2})
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 5)), jnp.array([3, 700])
    return config, quick(UNet2D(config).init)(jax.random.key(0), x, t), x, t


def test_default_init_has_a_useful_scale(tiny):
    config, params, x, t = tiny
    out = quick(UNet2D(config).apply)(params, x, t)
    assert out.shape == (2, 8, 8, 2) and 0.1 < float(out.std()) < 10


def test_zero_init_output(tiny):
    config, _, x, t = tiny
    net = UNet2D(config, zero_init_output=True)
    out, into = quick(lambda key: [net.init(key, x, t)["params"][name] for name in ("conv_out", "conv_in")])(
        jax.random.key(0)
    )
    assert not jnp.any(out["kernel"]) and not jnp.any(out["bias"])
    assert jnp.any(into["kernel"])


def test_remat_changes_no_value_and_no_gradient(tiny):
    config, _, x, t = tiny
    config = dataclasses.replace(
        config, block_out_channels=(8,), down_block_types=(ATTN_DOWN,), up_block_types=(UP,), mid_block_type=None
    )
    params = quick(UNet2D(config).init)(jax.random.key(0), x, t)
    (plain, plain_grad), (remat, remat_grad) = (
        quick(jax.value_and_grad(lambda p, net=net: jnp.square(net.apply(p, x, t)).mean()))(params)
        for net in (UNet2D(config), UNet2D(config, remat=True))
    )
    np.testing.assert_allclose(plain, remat, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain_grad, remat_grad)


def test_bfloat16_is_near_float32(tiny):
    """With float32 parameters; tests/test_loading.py has 16-bit ones."""
    config, params, x, t = tiny
    full = quick(UNet2D(config).apply)(params, x, t)
    half = quick(UNet2D(config, dtype=jnp.bfloat16).apply)(params, x, t)
    assert half.dtype == jnp.float32
    error = float(jnp.abs(half - full).max() / jnp.abs(full).max())
    assert 0 < error < 0.05


def test_shapes_that_do_not_fit_are_refused(tiny):
    config, params, x, t = tiny
    for wrong in (x[..., :3], x[:, :7], x[0]):
        with pytest.raises(ValueError, match=r"x: found shape .*expected \[B, H, W, 5\], H and W multiples of 2"):
            UNet2D(config).apply(params, wrong, t)
    with pytest.raises(ValueError, match=r"t: found shape \(1,\), expected \(2,\)"):
        UNet2D(config).apply(params, x, t[:1])


@pytest.mark.parametrize("channels, groups, size", [(12, 4, (5, 3)), (8, 8, (4, 4)), (15, 3, (1, 7)), (6, 1, (9,))])
def test_group_norm_and_its_gradient_are_torchs(channels, groups, size):
    """Far from zero and of little variance, too. PyTorch in float64: in float32 it is further off, so far from zero."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal((3, *size, channels), np.float32) for _ in range(2))
    x[1] += 100 + 10 * np.arange(channels)  # channels of a group are unlike
    x[2] *= 1e-3  # a variance of eps's size
    scale, bias = rng.standard_normal((2, channels), np.float32)
    theirs = torch.nn.GroupNorm(groups, channels, 1e-5).double()
    theirs.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(bias)})
    nchw = lambda a: np.moveaxis(a, -1, 1).copy()  # noqa: E731
    seen = torch.tensor(nchw(x), dtype=torch.float64, requires_grad=True)
    expected = theirs(seen)
    (expected * torch.tensor(nchw(weight))).sum().backward()
    norm = GroupNorm(groups, 1e-5)
    ours = lambda x, scale, bias: norm.apply({"params": {"scale": scale, "bias": bias}}, x)  # noqa: E731
    found, pull = jax.vjp(ours, x, scale, bias)
    nhwc = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)  # noqa: E731
    np.testing.assert_allclose(found, nhwc(expected), atol=1e-4)
    gradients = nhwc(seen.grad), theirs.weight.grad.numpy(), theirs.bias.grad.numpy()
    for one, other in zip(pull(jnp.asarray(weight)), gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)
    half = GroupNorm(groups, 1e-5, jnp.bfloat16)
    rounded = half.apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x, jnp.bfloat16))
    again = ours(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), scale, bias)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, again.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"down_block_types": (DOWN, "SkipDownBlock2D")}, ["down_block_types", "SkipDownBlock2D", ATTN_DOWN]),
        ({"up_block_types": ("AttnSkipUpBlock2D", UP)}, ["up_block_types", "AttnSkipUpBlock2D", RES_UP]),
        ({"up_block_types": (UP,)}, ["up_block_types", "2 block types"]),
        (
            {"mid_block_type": "UNetMidBlock2DCrossAttn"},
            ["mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"],
        ),
        ({"time_embedding_type": "learned"}, ["time_embedding_type", "learned", "fourier"]),
        ({"downsample_padding": 2}, ["downsample_padding", "2", "0, 1"]),
        ({"downsample_type": "fir"}, ["downsample_type", "fir", "resnet"]),
        ({"act_fn": "tanh"}, ["act_fn", "tanh", "silu"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift", "spatial", "scale_shift"]),
        ({"num_class_embeds": 10}, ["num_class_embeds", "10", "None"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type", "timestep", "None"]),
        ({"norm_num_groups": 5}, ["norm_num_groups", "5", "(8, 16)"]),
        ({"attn_norm_num_groups": 3}, ["attn_norm_num_groups", "3", "(16,)"]),
        ({"attention_head_dim": 64}, ["attention_head_dim", "64", "1..16"]),
        ({"cross_attention_dim": 768, "_private": 1}, ["unknown keys", "cross_attention_dim", "block_out_channels"]),
    ],
)
def test_unsupported_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        UNet2DConfig.from_dict(TINY | options)
    assert all(word in str(error.value) for word in words), error.value
