"""Weights files: every layout that a component's folder may have, and what can be wrong with them."""

import builtins
import json
import pathlib
import weakref

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mcm_jax.base import weights
from mcm_jax.base.unet2d import UNet2D, UNet2DConfig
from mcm_jax.base.weights import BaseLoadError, StoredTensor, find_weights, load_params, open_weights

UNET = {
    "sample_size": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PLAIN = "diffusion_pytorch_model.safetensors"
INDEX = f"{PLAIN}.index.json"
BIN = "diffusion_pytorch_model.bin"


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET)


@pytest.fixture(scope="module")
def like():
    x, t = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32), jax.ShapeDtypeStruct((1,), np.int32)
    return jax.eval_shape(UNet2D(UNet2DConfig(**UNET)).init, jax.random.key(0), x, t)["params"]


@pytest.fixture(scope="module")
def expected(net, like):
    return {name: a.copy() for name, a in flat(weights.params_from_torch(numpy_state(net), like, np.float32))}


def numpy_state(net):
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def flat(tree):
    return [(tuple(k.key for k in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def load(folder, like, dtype="float32"):
    file = find_weights(folder, weights.NETWORK)
    return dict(load_params(file, open_weights(file), like, dtype))


def expect_error(folder, like, *words, dtype="float32"):
    with pytest.raises(BaseLoadError) as error:
        load(folder, like, dtype)
    assert all(word in str(error.value) for word in words), error.value
    return str(error.value)


def names(folder):
    return {file.name for file in folder.iterdir()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, expected[path], err_msg=str(path))


@pytest.mark.parametrize("bits", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", ["one", "several"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_layout_that_diffusers_writes(bits, shards, variant, net, like, expected, tmp_path):
    kwargs = {"max_shard_size": "4KB"} if shards == "several" else {}
    net.save_pretrained(tmp_path, safe_serialization=bits == "safetensors", variant=variant, **kwargs)
    if shards == "several":
        assert sum("-of-" in name for name in names(tmp_path)) > 1
    assert_equal(load(tmp_path, like), expected)


def test_what_is_read_where_there_are_several(net, like, expected, tmp_path):
    """Plain safetensors before anything else; a pickle beside them is not opened."""
    net.save_pretrained(tmp_path)
    (tmp_path / BIN).write_bytes(b"junk")
    for name in ("fp16", "non_ema"):
        (tmp_path / f"diffusion_pytorch_model.{name}.safetensors").write_bytes(b"junk")
    assert find_weights(tmp_path, weights.NETWORK) == tmp_path / PLAIN
    assert_equal(load(tmp_path, like), expected)


@pytest.mark.parametrize("dtype", weights.DTYPES)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_values_are_cast_as_pytorch_does(suffix, dtype, net, like, tmp_path):
    """Each stored tensor may have a type of its own."""
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    tensors = {name: tensor.to(types[i % 4]) for i, (name, tensor) in enumerate(net.state_dict().items())}
    torch.save(tensors, tmp_path / BIN) if suffix == "bin" else save_file(tensors, tmp_path / PLAIN)
    for path, found in load(tmp_path, like, dtype).items():
        cast = tensors[weights.torch_name(path)].to(getattr(torch, dtype)).float().numpy()
        cast = cast.transpose(*range(2, cast.ndim), 1, 0) if path[-1] == "kernel" else cast
        assert found.dtype == weights.DTYPES[dtype]
        np.testing.assert_array_equal(found.astype(np.float32), cast, err_msg=str(path))


def test_one_tensor_is_read_at_a_time(net, like, expected):
    """No second copy of the model: what was read is dropped before the next one is."""
    alive, most = [], []

    def read(array):
        most.append(sum(ref() is not None for ref in alive))
        array = array.astype(np.float64)
        alive.append(weakref.ref(array))
        return array

    tensors = {n: StoredTensor(a.shape, "float64", lambda a=a: read(a)) for n, a in numpy_state(net).items()}
    assert_equal(dict(weights._convert(tensors, like, np.float32)), expected)
    assert len(most) == len(expected) and max(most) == 0


def test_nothing_is_read_where_names_do_not_fit(net, like):
    def read():
        raise AssertionError("was read")

    tensors = {n: StoredTensor(a.shape, "float32", read) for n, a in numpy_state(net).items()}
    for wrong in ({"conv_in.weight": StoredTensor((8, 4, 3, 3), "float32", read)}, {"extra": tensors["conv_in.bias"]}):
        with pytest.raises(ValueError, match="do not fit"):
            dict(weights._convert(tensors | wrong, like, np.float32))
    with pytest.raises(ValueError, match=r"conv_in.bias \(F8_E4M3\)"):
        odd = {"conv_in.bias": StoredTensor((8,), "F8_E4M3", read)}
        dict(weights._convert(tensors | odd, like, np.float32))


@pytest.fixture
def sharded(net, tmp_path):
    net.save_pretrained(tmp_path, max_shard_size="4KB")
    return tmp_path


def edit_map(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_shard_is_missing_or_damaged(sharded, like):
    shard = sorted(sharded.glob("*-of-*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    expect_error(sharded, like, str(shard), "damaged or truncated")
    shard.unlink()
    expect_error(sharded, like, str(shard), "no such file", INDEX)


def test_an_index_that_does_not_fit(sharded, like):
    kept = (sharded / INDEX).read_text()
    edit_map(sharded, lambda m: m.update(ghost=next(iter(m.values()))))
    expect_error(sharded, like, str(sharded / INDEX), "ghost (diffusion_pytorch_model-")
    (sharded / INDEX).write_text(kept)
    edit_map(sharded, lambda m: m.pop("conv_in.bias"))
    expect_error(sharded, like, str(sharded / INDEX), "does not name", "conv_in.bias")
    for name in ("../model.safetensors", "/etc/passwd", "x.json", "config.json"):
        (sharded / INDEX).write_text(kept)
        edit_map(sharded, lambda m, name=name: m.update({"conv_in.bias": name}))
        expect_error(sharded, like, str(sharded / INDEX), name)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (sharded / INDEX).write_text(content)
        expect_error(sharded, like, str(sharded / INDEX), "weight_map")
    (sharded / INDEX).write_text('{"weight_map": {}}')
    expect_error(sharded, like, str(sharded / INDEX), "missing tensors")
    (sharded / INDEX).write_text("{")
    expect_error(sharded, like, str(sharded / INDEX), "not valid JSON")
    (sharded / INDEX).unlink()
    expect_error(sharded, like, str(sharded / INDEX), "no such file", "-00001-of-")


def test_a_header_full_of_lies(net, like, tmp_path):
    """safetensors' own checks hold before a byte is read by ours."""
    file = tmp_path / PLAIN
    save_file(net.state_dict(), file)
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    first = next(name for name in header if name != "__metadata__")
    lies = [
        {"shape": [10**9, 10**9]},
        {"shape": [-1]},
        {"dtype": "F99"},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-8, 0]},
        {"dtype": None},
    ]
    for lie in lies:
        text = json.dumps(header | {first: header[first] | lie}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
        expect_error(tmp_path, like, str(file), "damaged or truncated")


def test_pickles_that_are_not_tensors_alone(net, like, tmp_path):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "ran",)

    for content in ({"conv_in.bias": Evil()}, {"state_dict": dict(net.state_dict())}, [1], {"a": 1}):
        torch.save(content, tmp_path / BIN)
        message = expect_error(tmp_path, like, str(tmp_path / BIN), str(tmp_path / PLAIN), "safe_serialization=True")
        assert "weights_only" not in message  # PyTorch's own advice
    assert not (tmp_path / "ran").exists()
    (tmp_path / BIN).write_bytes(b"junk")
    expect_error(tmp_path, like, str(tmp_path / BIN))


def test_a_pickle_without_pytorch(net, like, tmp_path, monkeypatch):
    torch.save(net.state_dict(), tmp_path / BIN)
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name.split(".")[0] == "torch":
            raise ImportError("blocked")
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without_torch)
        expect_error(tmp_path, like, str(tmp_path / BIN), "mcm-jax[torch]", "safe_serialization=True")
    # Up to there, code can get past weights_only=True (CVE-2025-32434, CVE-2026-24747).
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    expect_error(tmp_path, like, str(tmp_path / BIN), "mcm-jax[torch]", "2.9.1+cpu is too old")


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_values_that_are_not_finite(layout, net, like, tmp_path):
    tensors = net.state_dict() | {"conv_in.bias": net.state_dict()["conv_in.bias"] * float("nan")}
    torch.save(tensors, tmp_path / BIN) if layout == "bin" else save_file(tensors, tmp_path / PLAIN)
    expect_error(tmp_path, like, str(tmp_path), "NaN or infinity", "conv_in.bias")


def test_an_empty_folder_and_files_of_others(like, tmp_path):
    expect_error(tmp_path, like, str(tmp_path / PLAIN), "no such file")
    (tmp_path / "model.safetensors").touch()
    expect_error(tmp_path, like, str(tmp_path / PLAIN), "no such file")
    (tmp_path / "optimizer.bin").touch()
    expect_error(tmp_path, like, str(tmp_path / PLAIN), "no such file")


def test_open_weights_gives_names_shapes_and_types(net, tmp_path):
    net.save_pretrained(tmp_path / "one")
    net.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    one, many = open_weights(tmp_path / "one" / PLAIN), open_weights(tmp_path / "many" / INDEX)
    assert one.keys() == many.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert one[name].shape == many[name].shape == tuple(tensor.shape) and one[name].dtype == "float32"
        np.testing.assert_array_equal(many[name].read(), tensor.numpy())


@pytest.mark.parametrize("prefix", ["mid_block.", "encoder.mid_block.", "decoder.mid_block.", "down_blocks.1."])
def test_legacy_attention_names(prefix):
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for before, now in old.items():
        for leaf in ("weight", "bias"):
            found = weights._modern_name(f"{prefix}attentions.0.{before}.{leaf}")
            assert found == f"{prefix}attentions.0.{now}.{leaf}"
    assert weights._modern_name("text_model.key.weight") == "text_model.key.weight"
