"""A small net that judges whether generated scenes show what their captions say.

Trained by ``tools/train_scenes_facts.py`` on other scenes than the base models, and shipped with the package.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import numpy as safetensors

from mcm_jax.data.scenes import TIMES

ASSET = pathlib.Path(__file__).parents[1] / "assets" / "scenes-facts"
"""The shipped net: ``model.safetensors`` (float16), ``config.json`` and ``training_log.jsonl``."""

FACTS = {"time": len(TIMES), "water": 2, "trees": 2, "disc": 2}
"""The facts and how many values each has: an index into ``TIMES``; else 0 no, 1 yes. ``disc`` is sun or moon."""


def facts_of(facts: Sequence[Mapping[str, object]]) -> dict[str, np.ndarray]:
    """The facts of scenes (the key ``facts`` of ``Scenes``) as :data:`FACTS` has them, int32 ``[B]`` each."""
    return {
        "time": np.array([TIMES.index(f["time"]) for f in facts], np.int32),
        "water": np.array([bool(f["water"]) for f in facts], np.int32),
        "trees": np.array([f["trees"] > 0 for f in facts], np.int32),
        "disc": np.array([bool(f["sun"]) for f in facts], np.int32),
    }


class FactsNet(nn.Module):
    """A convolutional net with GroupNorm: images ``[B, H, W, 3]`` in [-1, 1] to logits ``[B, n]`` of each fact.

    H and W must be multiples of ``2 ** (len(widths) - 1)``. A fact may hang on a few pixels (a disc), so the picture
    is summed up by its maxima as well as its means.

    Attributes:
      facts: name and number of values of each fact.
      widths: channels at each resolution, finest first; multiples of ``groups``.
      groups: groups of each GroupNorm.
    """

    facts: tuple[tuple[str, int], ...] = tuple(FACTS.items())
    widths: tuple[int, ...] = (16, 32, 64)
    groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        for level, width in enumerate(self.widths):
            if level:
                b, h, w, c = x.shape
                # A reshape rather than a strided convolution, whose gradient is slow on CPUs.
                x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
            for _ in range(2):
                x = nn.silu(nn.GroupNorm(self.groups)(nn.Conv(width, (3, 3), use_bias=False)(x)))
        x = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
        x = nn.silu(nn.Dense(self.widths[-1])(x))
        return {name: nn.Dense(values, name=name)(x) for name, values in self.facts}


@functools.partial(jax.jit, static_argnums=0)
def _values(net: FactsNet, params: Mapping, images: jax.Array) -> dict[str, jax.Array]:
    return {k: v.argmax(-1).astype(jnp.int32) for k, v in net.apply({"params": params}, images).items()}


@dataclasses.dataclass(frozen=True)
class FactsJudge:
    """A trained net with its weights.

    Attributes:
      net: the Flax module.
      params: its float32 weights.
      config: what ``config.json`` says: sizes, held-out accuracy, recipe.
      batch: pictures a call of the net; every call has this size, so that one compilation serves all.
    """

    net: FactsNet
    params: Mapping
    config: Mapping
    batch: int = 64

    def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Judges pictures.

        Args:
          images: float ``[B, H, W, 3]`` in [-1, 1], H and W as trained (32); B may be 0. Larger samples are averaged
            over areas first: ``x.reshape(B, 32, k, 32, k, 3).mean((2, 4))``.

        Returns:
          int32 ``[B]`` for each name in :data:`FACTS`.

        Raises:
          ValueError: another shape or dtype, values outside [-1, 1] or not finite.
        """
        images = np.asarray(images)
        expected = (self.config["height"], self.config["width"], 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"this net was trained on images [B, {expected[0]}, {expected[1]}, 3], got {list(images.shape)}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [-1, 1], got {images.dtype}")
        images = images.astype(np.float32)
        if not (np.abs(images) <= 1 + 1e-3).all():  # also false for NaN
            raise ValueError(f"images must lie in [-1, 1], got {images.min()} to {images.max()}; clip samples first")
        found = {name: np.empty(len(images), np.int32) for name, _ in self.net.facts}
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            padded = np.zeros((self.batch, *expected), np.float32)
            padded[: len(part)] = part
            for name, values in _values(self.net, self.params, padded).items():
                found[name][start : start + self.batch] = np.asarray(values)[: len(part)]
        return found


def save_facts_net(path: str | os.PathLike, net: FactsNet, params: Mapping, config: Mapping) -> None:
    """Writes ``model.safetensors`` (float16) and ``config.json`` (``config`` and the net's sizes) into ``path``."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    weights = safetensors.save({k: np.asarray(v, np.float16) for k, v in flat.items()})
    (path / "model.safetensors").write_bytes(weights)  # save_file would make a file that only its owner can read
    sizes = {"facts": dict(net.facts), "widths": list(net.widths), "groups": net.groups}
    (path / "config.json").write_text(json.dumps({**config, "net": sizes}, indent=1) + "\n")


def load_facts_net(path: str | os.PathLike | None = None) -> FactsJudge:
    """Loads a net that judges facts.

    Args:
      path: a folder with ``model.safetensors`` and ``config.json``; by default the shipped one (:data:`ASSET`).

    Returns:
      The net, its weights in float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the weights do not fit the net that the config describes.
    """
    path = ASSET if path is None else pathlib.Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"no facts net in {path}: {name} is missing")
    config = json.loads((path / "config.json").read_text())
    sizes = config["net"]
    net = FactsNet(tuple(sizes["facts"].items()), tuple(sizes["widths"]), sizes["groups"])
    flat = safetensors.load_file(path / "model.safetensors")
    image = jax.ShapeDtypeStruct((1, config["height"], config["width"], 3), jnp.float32)
    wanted = traverse_util.flatten_dict(jax.eval_shape(net.init, jax.random.key(0), image)["params"], sep="/")
    have, want = ({(k, tuple(v.shape)) for k, v in d.items()} for d in (flat, wanted))
    if have != want:
        raise ValueError(f"{path}: missing {sorted(want - have)}, unexpected {sorted(have - want)}")
    params = traverse_util.unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}, sep="/")
    return FactsJudge(net, params, config)
