"""Both autoencoders equal diffusers' on random weights, read from what its ``save_pretrained`` writes."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file

from mcm_jax.base.autoencoders import AutoencoderKL, AutoencoderKLConfig, VQConfig, VQModel
from mcm_jax.base.weights import params_from_torch, torch_name, torch_shape

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

DOWN, ATTN_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, ATTN_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
TINY = {
    "block_out_channels": (8, 12),
    "down_block_types": (DOWN, DOWN),
    "up_block_types": (UP, UP),
    "norm_num_groups": 4,
    "sample_size": 16,
}
ONE = {"block_out_channels": (6,), "down_block_types": (DOWN,), "up_block_types": (UP,), "norm_num_groups": 3}
THREE = {"block_out_channels": (8, 4, 12), "down_block_types": (DOWN,) * 3, "up_block_types": (UP,) * 3}
LEAST = ONE | {"mid_block_add_attention": False}
# label -> (config, batch, height, width)
KL_CONFIGS = {
    "middle attention, both convolutions": (TINY, 3, 8, 12),
    "no middle attention, grey images": (TINY | {"mid_block_add_attention": False, "in_channels": 1}, 1, 10, 6),
    "no quant_conv, 16 channels": (
        TINY | {"use_quant_conv": False, "latent_channels": 16, "layers_per_block": 2},
        3,
        4,
        8,
    ),
    "no post_quant_conv, 3 channels": (TINY | {"use_post_quant_conv": False, "latent_channels": 3}, 1, 6, 4),
    "no such convolutions, one level, three layers": (
        ONE | {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 3, "out_channels": 1},
        3,
        5,
        7,
    ),
    "uneven widths, gelu": (TINY | THREE | {"act_fn": "gelu", "latent_channels": 16}, 1, 8, 12),
    "mish, attention everywhere": (
        TINY | {"down_block_types": (ATTN_DOWN, DOWN), "up_block_types": (UP, ATTN_UP), "act_fn": "mish"},
        3,
        4,
        6,
    ),
}
CODES = TINY | {"num_vq_embeddings": 30}
VQ_CONFIGS = {
    "middle attention": (CODES, 3, 8, 12),
    "no middle attention, grey images": (CODES | {"mid_block_add_attention": False, "in_channels": 1}, 1, 10, 6),
    "attention everywhere, two layers": (
        CODES
        | {"down_block_types": (ATTN_DOWN,) * 2, "up_block_types": (ATTN_UP,) * 2, "layers_per_block": 2}
        | {"latent_channels": 4},
        1,
        4,
        8,
    ),
    "entries narrower than latents": (CODES | {"latent_channels": 16, "vq_embed_dim": 5}, 3, 4, 6),
    "entries wider than latents, one level": (CODES | ONE | {"vq_embed_dim": 7, "layers_per_block": 3}, 3, 5, 7),
    "uneven widths, relu": (CODES | THREE | {"act_fn": "relu", "out_channels": 1}, 1, 8, 12),
}
SD = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [DOWN] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": [UP] * 4,
}
LDM = {
    "_class_name": "VQModel",
    "_diffusers_version": "0.1.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": [DOWN] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": [UP] * 3,
}


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def pair(kind, config, folder):
    """A random network of diffusers (no parameter left at 0 or 1), and ours with its parameters."""
    torch.manual_seed(0)
    net = getattr(diffusers, kind)(**config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        if kind == "VQModel":  # as far apart as latents are: no pair of entries at nearly the same distance
            net.quantize.embedding.weight.normal_()
    net.save_pretrained(folder)
    parsed = json.loads((folder / "config.json").read_text())
    model = ours(parsed)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return net, model, {"params": params_from_torch(tensors, expected(model), np.float32)}


def ours(config, **kwargs):
    if config["_class_name"] == "VQModel":
        return VQModel(VQConfig.from_dict(config), **kwargs)
    return AutoencoderKL(AutoencoderKLConfig.from_dict(config), **kwargs)


def expected(model):
    c = model.config
    x = jax.ShapeDtypeStruct((1, c.factor, c.factor, c.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def apply(model, params, x, latent):
    """What the image is encoded to, and what the latent is decoded to."""
    both = lambda p, x, z: (model.apply(p, x, method="encode"), model.apply(p, z, method="decode"))  # noqa: E731
    return jax.jit(both)(params, x, latent)


def to_torch(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def to_numpy(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def close(label, found, reference):
    scale = np.abs(reference).max()
    error = np.abs(np.asarray(found) - reference).max() / scale
    print(f"{label}: error {error:.1e} of the output's scale")
    assert found.shape == reference.shape and found.dtype == np.float32
    assert scale > 0.1
    assert error <= 1e-5


def inputs(model, batch, height, width):
    """An image, and latents of the size that it is encoded to."""
    c, rng = model.config, np.random.default_rng(1)
    latent = (batch, height // c.factor, width // c.factor, c.depth)
    return [rng.normal(size=s).astype(np.float32) for s in ((batch, height, width, c.in_channels), latent)]


@pytest.mark.parametrize("label", KL_CONFIGS)
def test_kl_equals_diffusers(label, tmp_path):
    config, *size = KL_CONFIGS[label]
    net, model, params = pair("AutoencoderKL", config, tmp_path)
    x, z = inputs(model, *size)
    with torch.no_grad():
        gaussian, image = net.encode(to_torch(x)).latent_dist, net.decode(to_torch(z)).sample
    (mean, logvar), decoded = apply(model, params, x, z)
    assert mean.shape == z.shape
    close(f"{label}, mean", mean, to_numpy(gaussian.mean))
    close(f"{label}, logvar", logvar, to_numpy(gaussian.logvar))
    close(f"{label}, decoded", decoded, to_numpy(image))


@pytest.mark.parametrize("label", VQ_CONFIGS)
def test_vq_equals_diffusers(label, tmp_path):
    config, *size = VQ_CONFIGS[label]
    net, model, params = pair("VQModel", config, tmp_path)
    x, h = inputs(model, *size)
    with torch.no_grad():
        latents, image = net.encode(to_torch(x)).latents, net.decode(to_torch(h)).sample
    encoded, decoded = apply(model, params, x, h)
    close(f"{label}, encoded", encoded, to_numpy(latents))
    close(f"{label}, decoded", decoded, to_numpy(image))


def test_decoding_without_the_codebook(tmp_path):
    net, model, params = pair("VQModel", LEAST | {"num_vq_embeddings": 30}, tmp_path)
    _, h = inputs(model, 2, 3, 4)
    with torch.no_grad():
        image = to_numpy(net.decode(to_torch(h), force_not_quantize=True).sample)
        assert np.abs(image - to_numpy(net.decode(to_torch(h)).sample)).max() > 0.1
    found = jax.jit(lambda h: model.apply(params, h, quantize=False, method="decode"))(h)
    close("not quantised", found, image)


def test_log_variance_is_clipped(tmp_path):
    net, model, params = pair("AutoencoderKL", LEAST, tmp_path)
    x, _ = inputs(model, 2, 4, 4)
    with torch.no_grad():
        net.quant_conv.bias[4:6] = 50
        net.quant_conv.bias[6:8] = -50
        reference = to_numpy(net.encode(to_torch(x)).latent_dist.logvar)
    params["params"]["quant_conv"]["bias"] = net.quant_conv.bias.detach().numpy()
    _, logvar = jax.jit(lambda p, x: model.apply(p, x, method="encode"))(params, x)
    assert reference.max() == 20 and reference.min() == -30
    np.testing.assert_array_equal(logvar, reference)


def test_codebook_picks_the_entries_that_pytorch_picks():
    """Of a codebook as large as published ones. PyTorch's own distances are off by a rounding error of the latents."""
    entries, depth = 8192, 3
    rng = np.random.default_rng(0)
    codebook, h = (rng.normal(size=s).astype(np.float32) for s in ((entries, depth), (1, 32, 32, depth)))
    model = VQModel(VQConfig(**LEAST | {"num_vq_embeddings": entries}))
    params = {"params": {"quantize": {"embedding": {"embedding": codebook}}}}
    quantize = lambda module, h: module.quantize(h)  # noqa: E731
    found = jax.jit(lambda p, h: model.apply(p, h, method=quantize))(params, h).reshape(-1, depth)
    flat = h.reshape(-1, depth)
    chosen = torch.argmin(torch.cdist(torch.tensor(flat), torch.tensor(codebook)), dim=1).numpy()
    other = np.abs(found - codebook[chosen]).max(axis=1) > 1e-6
    print(f"codebook: {other.sum()} of {len(other)} entries differ")
    assert other.mean() < 0.005
    # Where it differs, ours is at least as near.
    exact = flat.astype(np.float64)
    theirs, mine = (np.square(exact - entry).sum(axis=1) for entry in (codebook[chosen], np.asarray(found)))
    assert (mine <= theirs + 1e-6).all() and (theirs <= mine + 1e-5).all()


def test_gradient_passes_the_codebook_straight_through(tmp_path):
    net, model, params = pair("VQModel", LEAST | {"num_vq_embeddings": 30}, tmp_path)
    _, h = inputs(model, 1, 3, 4)
    latent = to_torch(h).requires_grad_()
    net.decode(latent).sample.square().sum().backward()
    grad = jax.jit(jax.grad(lambda h: jnp.square(model.apply(params, h, method="decode")).sum()))(h)
    close("gradient", grad, to_numpy(latent.grad))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_whole_network_equals_diffusers(kind, tmp_path):
    net, model, params = pair(kind, LEAST, tmp_path)
    x, _ = inputs(model, 1, 4, 6)
    with torch.no_grad():
        reference = to_numpy(net(to_torch(x)).sample)
    close(kind, jax.jit(model.apply)(params, x), reference)


@pytest.mark.parametrize("config, size", [(SD, 83_653_863), (LDM, 55_322_782)])
def test_tensors_of_published_networks(config, size):
    """CompVis/stable-diffusion-v1-4 (and all others of versions 1 and 2), CompVis/ldm-celebahq-256."""
    leaves = traverse_util.flatten_dict(expected(ours(config)))
    with torch.device("meta"):
        net = getattr(diffusers, config["_class_name"])(**public(config))
    found = {torch_name(path): torch_shape(path[-1], leaf.shape) for path, leaf in leaves.items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert sum(leaf.size for leaf in leaves.values()) == size


def test_shape_and_scale_of_latents():
    kl, vq = AutoencoderKLConfig.from_dict(SD | {"shift_factor": 0.1}), VQConfig.from_dict(LDM | {"vq_embed_dim": 5})
    assert (kl.factor, kl.depth, kl.scaling_factor, kl.shift_factor) == (8, 4, 0.18215, 0.1)
    assert (vq.factor, vq.depth, vq.scaling_factor, vq.shift_factor) == (4, 5, 0.18215, None)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_every_key_and_default_of_diffusers_is_known(kind):
    written = dict(getattr(diffusers, kind)(norm_num_groups=32).config)
    config = ours(written | {"_class_name": kind}).config
    assert {key: getattr(config, key) for key in public(written)} == public(written)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_bfloat16_is_near_float32(kind, tmp_path):
    """With parameters in bfloat16 too; outputs have the input's dtype."""
    _, model, params = pair(kind, ONE, tmp_path)
    x, z = inputs(model, 1, 4, 4)
    full = apply(model, params, x, z)
    half = model.clone(dtype=jnp.bfloat16)
    found = apply(half, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x, z)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(full), strict=True):
        assert ours.dtype == jnp.float32
        # A rounded codebook: the worst case is an entry that another one beats by rounding, so the mean.
        assert 0 < jnp.abs(ours - theirs).mean() < 0.05 * jnp.abs(theirs).mean()
    x = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    assert jax.eval_shape(half.apply, params, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind, config", [("AutoencoderKL", TINY), ("VQModel", CODES)])
def test_shapes_that_do_not_fit_are_refused(kind, config):
    model = ours(config | {"_class_name": kind})
    for shape in ((1, 4, 4, 2), (1, 5, 4, 3), (1, 4, 5, 3), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"x: found shape .*expected \[B, H, W, 3\], H and W multiples of 2"):
            model.apply({"params": {}}, jnp.zeros(shape), method="encode")
    for shape in ((1, 4, 4, 5), (4, 4, 3)):
        with pytest.raises(ValueError, match=r"latent: found shape .*expected \[B, h, w, \d\]"):
            model.apply({"params": {}}, jnp.zeros(shape), method="decode")


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("both", {"down_block_types": [DOWN, "DownBlock2D"]}, ["down_block_types", "'DownBlock2D'", DOWN, ATTN_DOWN]),
        ("both", {"up_block_types": ["UpBlock2D", UP]}, ["up_block_types", "'UpBlock2D'", UP, ATTN_UP]),
        ("both", {"up_block_types": [UP]}, ["up_block_types", "2 block types"]),
        ("both", {"block_out_channels": []}, ["block_out_channels", "()", "one for each level"]),
        ("both", {"block_out_channels": 64}, ["block_out_channels", "64", "whole numbers"]),
        ("both", {"norm_num_groups": 5}, ["norm_num_groups", "5", "(8, 12)"]),
        ("both", {"act_fn": "tanh"}, ["act_fn", "tanh", "silu"]),
        ("both", {"layers_per_block": 0}, ["layers_per_block", "0", "above 0"]),
        ("both", {"latent_channels": 4.5}, ["latent_channels", "4.5", "whole number"]),
        ("both", {"in_channels": "3"}, ["in_channels", "'3'", "whole number"]),
        ("both", {"mid_block_add_attention": "no"}, ["mid_block_add_attention", "'no'", "true or false"]),
        ("both", {"scaling_factor": 0}, ["scaling_factor", "0", "other than 0"]),
        ("both", {"scaling_factor": None}, ["scaling_factor", "None", "a number"]),
        ("both", {"encoder_hid_dim": 3, "_private": 1}, ["unknown keys: found encoder_hid_dim;", "block_out_channels"]),
        ("AutoencoderKL", {"shift_factor": "0.1"}, ["shift_factor", "'0.1'", "null"]),
        ("AutoencoderKL", {"latents_mean": [0.1] * 4}, ["latents_mean", "0.1", "null"]),
        ("AutoencoderKL", {"latents_std": [0.1] * 4}, ["latents_std", "0.1", "null"]),
        ("AutoencoderKL", {"use_quant_conv": 1}, ["use_quant_conv", "1", "true or false"]),
        ("AutoencoderKL", {"norm_type": "group"}, ["unknown keys", "norm_type"]),
        ("VQModel", {"norm_type": "spatial"}, ["norm_type", "spatial", "group"]),
        ("VQModel", {"lookup_from_codebook": True}, ["lookup_from_codebook", "True", "false"]),
        ("VQModel", {"num_vq_embeddings": 0}, ["num_vq_embeddings", "0", "above 0"]),
        ("VQModel", {"vq_embed_dim": -1}, ["vq_embed_dim", "-1", "null"]),
        ("VQModel", {"shift_factor": 0.1}, ["unknown keys", "shift_factor"]),
    ],
)
def test_unsupported_options_are_named(kind, options, words):
    classes = {"AutoencoderKL": [AutoencoderKLConfig], "VQModel": [VQConfig]}
    for config_class in classes.get(kind, [AutoencoderKLConfig, VQConfig]):
        with pytest.raises(ValueError) as error:
            config_class.from_dict(TINY | options)
        assert all(word in str(error.value) for word in words), error.value
