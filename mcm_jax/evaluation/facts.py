"""A small net that judges whether generated scenes show what their captions say.

Trained by ``tools/train_scenes_facts.py`` on other scenes than the base models, and shipped with the package.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mcm_jax.data.scenes import TIMES
from mcm_jax.evaluation import nets

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
        return nets.predict(functools.partial(_values, self.net, self.params), images, self.config, self.batch)


def save_facts_net(path: str | os.PathLike, net: FactsNet, params: Mapping, config: Mapping) -> None:
    """Writes ``model.safetensors`` (float16) and ``config.json`` (``config`` and the net's sizes) into ``path``."""
    sizes = {"facts": dict(net.facts), "widths": list(net.widths), "groups": net.groups}
    nets.save(path, params, {**config, "net": sizes})


def load_facts_net(path: str | os.PathLike = ASSET) -> FactsJudge:
    """Loads a net, by default the shipped one, with float32 weights; raises as :func:`.nets.load` does."""
    return FactsJudge(*nets.load(path, lambda n: FactsNet(tuple(n["facts"].items()), tuple(n["widths"]), n["groups"])))
