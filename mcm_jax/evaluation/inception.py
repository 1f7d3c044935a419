"""The net whose features make FID the number that others publish: Inception-v3 as TensorFlow had it on 2015-12-05.

Written from the behaviour of pytorch-fid 0.3 (``fid_inception_v3``), whose ported weights are
``pt_inception-2015-12-05-6726825d.pth`` of its releases. It differs from torchvision's Inception-v3: average pools
leave the padding out, and the last block has a maximum in place of an average. The file is a pickle, which is never
opened here; these lines convert it::

    import torch
    from safetensors.torch import save_file
    save_file(torch.load("pt_inception-2015-12-05-6726825d.pth", weights_only=True), "inception.safetensors")
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mcm_jax.base.weights import BaseLoadError, open_weights, some
from mcm_jax.errors import UserError
from mcm_jax.evaluation import nets
from mcm_jax.pictures import to_uint8

FEATURES = 2048
"""How many features a picture has."""

_SIZE, _EPS, _BATCH = 299, 1e-3, 16
_CLASSES = {"fc.weight": (1008, FEATURES), "fc.bias": (1008,)}  # in the file, and of no use here
_CONVERT = (
    "convert pytorch-fid's pt_inception-2015-12-05-6726825d.pth as docs/evaluation.md says (three lines of PyTorch)"
)


class _Conv(nn.Module):
    """A convolution, the batch norm as at inference, and ReLU. Parameters have PyTorch's names and layouts (OIHW)."""

    width: int
    kernel: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones

        def each(name: str, init: Callable) -> jax.Array:
            return self.param(name, init, (self.width,)).reshape(1, 1, 1, -1)

        kernel = self.param("conv.weight", nn.initializers.he_normal(1, 0), (self.width, x.shape[-1], *self.kernel))
        weight, bias = each("bn.weight", ones), each("bn.bias", zeros)
        mean, variance = each("bn.running_mean", zeros), each("bn.running_var", ones)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,  # a distance is a small difference of large sums
        )
        return nn.relu((x - mean) * (weight / jnp.sqrt(variance + _EPS)) + bias)


class InceptionV3(nn.Module):
    """Pictures ``[N, H, W, 3]`` in [-1, 1], of any size, to features ``[N, 2048]``, none of them negative."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """The features; parameters flattened with ``.`` have the names of pytorch-fid's state dict."""

        def conv(name: str, x: jax.Array, width: int, h: int = 1, w: int = 1, stride: int = 1, padding: str = "SAME"):
            return _Conv(width, (h, w), stride, padding, name=name)(x)

        x = conv("Conv2d_1a_3x3", resize(images), 32, 3, 3, 2, "VALID")
        x = conv("Conv2d_2a_3x3", x, 32, 3, 3, padding="VALID")
        x = _halved(conv("Conv2d_2b_3x3", x, 64, 3, 3))
        x = conv("Conv2d_3b_1x1", x, 80)
        x = _halved(conv("Conv2d_4a_3x3", x, 192, 3, 3, padding="VALID"))
        for name, width in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _block_a(_within(conv, name), x, width)
        x = _block_b(_within(conv, "6a"), x)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _block_c(_within(conv, name), x, width)
        x = _block_d(_within(conv, "7a"), x)
        for name, pool in (("7b", _average), ("7c", _maximum)):
            x = _block_e(_within(conv, name), x, pool)
        return x.mean((1, 2))


def resize(images: jax.Array) -> jax.Array:
    """``[N, H, W, C]`` to ``[N, 299, 299, C]`` as pytorch-fid does it: bilinear, between pixels' centres, no antialias.

    clean-fid's is bicubic with antialias by PIL, which published numbers of pytorch-fid do not have; its numbers are
    others. The two agree on the net, and enlarge alike but for the kernel; pictures above 299 pixels alias here.
    """
    n, _, _, c = images.shape
    return jax.image.resize(images, (n, _SIZE, _SIZE, c), "bilinear", antialias=False)


def _within(conv: Callable, name: str) -> Callable:
    return lambda branch, *args, **kwargs: conv(f"Mixed_{name}.branch{branch}", *args, **kwargs)


def _average(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halved(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _block_a(conv: Callable, x: jax.Array, pooled: int) -> jax.Array:
    five = conv("5x5_2", conv("5x5_1", x, 48), 64, 5, 5)
    three = conv("3x3dbl_2", conv("3x3dbl_1", x, 64), 96, 3, 3)
    three = conv("3x3dbl_3", three, 96, 3, 3)
    return jnp.concatenate([conv("1x1", x, 64), five, three, conv("_pool", _average(x), pooled)], -1)


def _block_b(conv: Callable, x: jax.Array) -> jax.Array:
    three = conv("3x3dbl_2", conv("3x3dbl_1", x, 64), 96, 3, 3)
    three = conv("3x3dbl_3", three, 96, 3, 3, 2, "VALID")
    return jnp.concatenate([conv("3x3", x, 384, 3, 3, 2, "VALID"), three, _halved(x)], -1)


def _block_c(conv: Callable, x: jax.Array, width: int) -> jax.Array:
    seven = conv("7x7_2", conv("7x7_1", x, width), width, 1, 7)
    seven = conv("7x7_3", seven, 192, 7, 1)
    double = conv("7x7dbl_2", conv("7x7dbl_1", x, width), width, 7, 1)
    double = conv("7x7dbl_4", conv("7x7dbl_3", double, width, 1, 7), width, 7, 1)
    double = conv("7x7dbl_5", double, 192, 1, 7)
    return jnp.concatenate([conv("1x1", x, 192), seven, double, conv("_pool", _average(x), 192)], -1)


def _block_d(conv: Callable, x: jax.Array) -> jax.Array:
    three = conv("3x3_2", conv("3x3_1", x, 192), 320, 3, 3, 2, "VALID")
    seven = conv("7x7x3_2", conv("7x7x3_1", x, 192), 192, 1, 7)
    seven = conv("7x7x3_4", conv("7x7x3_3", seven, 192, 7, 1), 192, 3, 3, 2, "VALID")
    return jnp.concatenate([three, seven, _halved(x)], -1)


def _block_e(conv: Callable, x: jax.Array, pool: Callable) -> jax.Array:
    three = conv("3x3_1", x, 384)
    double = conv("3x3dbl_2", conv("3x3dbl_1", x, 448), 384, 3, 3)
    out = [conv("1x1", x, 320)]
    for name, y in (("3x3_2", three), ("3x3dbl_3", double)):
        out += [conv(f"{name}a", y, 384, 1, 3), conv(f"{name}b", y, 384, 3, 1)]
    return jnp.concatenate([*out, conv("_pool", pool(x), 192)], -1)


def load_inception(file: str | os.PathLike) -> Any:
    """Parameters of :class:`InceptionV3`, float32, from a safetensors file with the names of pytorch-fid's state dict.

    Raises:
      UserError: no such file, no safetensors, or other tensors than the net has: lists them.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; {_CONVERT}")
    if file.suffix != ".safetensors":
        raise UserError(f"{file}: expected a file .safetensors, since nothing is unpickled; {_CONVERT}")
    try:
        stored = {name: t for name, t in open_weights(file).items() if not name.endswith(".num_batches_tracked")}
    except BaseLoadError as e:
        raise UserError(f"{e}; {_CONVERT}") from e
    image = jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    flat = traverse_util.flatten_dict(params)
    expected = {".".join(path): leaf.shape for path, leaf in flat.items()} | _CLASSES
    problems = {
        "missing tensors": sorted(expected.keys() - stored.keys()),
        "unexpected tensors": sorted(stored.keys() - expected.keys()),
        "wrong shapes": [
            f"{name} (found {list(stored[name].shape)}, expected {list(shape)})"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
        "other types than floats": [f"{name} ({t.dtype})" for name, t in stored.items() if "float" not in t.dtype],
    }
    if found := "; ".join(f"{what}: {some(names, 5)}" for what, names in problems.items() if names):
        raise UserError(f"{file}: not the weights of FID's Inception-v3. {found}; {_CONVERT}")
    arrays = {path: stored[".".join(path)].read().astype(np.float32) for path in flat}
    if odd := [".".join(path) for path, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(f"{file}: NaN or infinity in {some(odd, 5)}; {_CONVERT}")
    return traverse_util.unflatten_dict(arrays)


@jax.jit
def _features(params: Any, images: jax.Array) -> jax.Array:
    return InceptionV3().apply({"params": params}, images)


def inception_features(file: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """The function that gives Inception's features of pictures.

    Args:
      file: see :func:`load_inception`; raises as it does.

    Returns:
      Takes float ``[N, H, W, 3]`` in [-1, 1] and rounds it to 8 bits, since pytorch-fid reads files of pictures; gives
      float32 ``[N, 2048]``.
    """
    params = load_inception(file)

    def features(images: np.ndarray) -> np.ndarray:
        rounded = to_uint8(images).astype(np.float32) / 127.5 - 1
        return nets.in_batches(functools.partial(_features, params), rounded, min(_BATCH, max(len(rounded), 1)))

    return features
