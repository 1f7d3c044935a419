"""What the nets that judge samples have in common: which pictures they take, and the folder that one ships in.

The folder has ``model.safetensors`` (float16) and ``config.json``, which holds the net's sizes under ``net``.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError
from safetensors import numpy as safetensors


def predict(call: Callable[[np.ndarray], Any], images: np.ndarray, config: Mapping, batch: int) -> Any:
    """Judges pictures, a batch of one size at a time, so that one compilation serves all.

    Args:
      call: the net, ``[batch, H, W, 3]`` to a pytree of arrays ``[batch, ...]``.
      images: float ``[B, H, W, 3]`` in [-1, 1], H and W as trained; B may be 0.
      config: of the net: ``height``, ``width``.
      batch: pictures a call.

    Returns:
      The pytree, as numpy arrays ``[B, ...]``.

    Raises:
      ValueError: another shape or dtype, values outside [-1, 1] or not finite.
    """
    images = np.asarray(images)
    expected = (config["height"], config["width"], 3)
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(
            f"this net was trained on images [B, {expected[0]}, {expected[1]}, 3], got {list(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
    images = images.astype(np.float32)
    if not (np.abs(images) <= 1 + 1e-3).all():  # also false for NaN
        raise ValueError(f"images must lie in [-1, 1], got {images.min()} to {images.max()}; clip samples first")
    return in_batches(call, images, batch)


def in_batches(call: Callable[[np.ndarray], Any], rows: np.ndarray, batch: int) -> Any:
    """Calls a net on ``batch`` rows at a time, the last ones filled up with zeros, so that one compilation serves all.

    Args:
      call: the net, ``[batch, ...]`` to a pytree of arrays ``[batch, ...]``.
      rows: ``[N, ...]``; N may be 0.
      batch: rows a call.

    Returns:
      The pytree, as numpy arrays ``[N, ...]``.
    """
    parts = []
    for start in range(0, max(len(rows), 1), batch):
        part = rows[start : start + batch]
        padded = np.zeros((batch, *rows.shape[1:]), rows.dtype)
        padded[: len(part)] = part
        parts.append(call(padded))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(rows)], *parts)


def save(path: str | os.PathLike, params: Mapping, config: Mapping) -> None:
    """Writes a net's folder; ``config`` has its sizes under ``net``."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    weights = safetensors.save({k: np.asarray(v, np.float16) for k, v in flat.items()})
    (path / "model.safetensors").write_bytes(weights)  # save_file would make a file that only its owner can read
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def load(path: str | os.PathLike, make: Callable[[Mapping], nn.Module]) -> tuple[nn.Module, Mapping, Mapping]:
    """Reads a net's folder.

    Args:
      path: the folder.
      make: the net of the sizes in the config.

    Returns:
      The net, its weights in float32, and its config.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: one is damaged, or the weights do not fit the net that the config describes.
    """
    path = pathlib.Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no net in {path}: {name} is missing")
    try:
        config = json.loads((path / "config.json").read_text())
        net = make(config["net"])
        image = jax.ShapeDtypeStruct((1, config["height"], config["width"], 3), jnp.float32)
        wanted = traverse_util.flatten_dict(jax.eval_shape(net.init, jax.random.key(0), image)["params"], sep="/")
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise ValueError(f"{path / 'config.json'} describes no net ({type(e).__name__}: {e})") from e
    try:
        flat = safetensors.load_file(path / "model.safetensors")
    except SafetensorError as e:
        raise ValueError(f"{path / 'model.safetensors'} is damaged ({e})") from e
    have, want = ({(k, tuple(v.shape)) for k, v in d.items()} for d in (flat, wanted))
    if have != want:
        raise ValueError(f"{path}: missing {sorted(want - have)}, unexpected {sorted(have - want)}")
    return net, traverse_util.unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep="/"), config
