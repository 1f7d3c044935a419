"""Control without training: by the gradient of a judge."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.method import Given
from mcm_jax import sampling
from mcm_jax.base import Base
from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import Segmenter
from mcm_jax.mcm import estimate_x0
from mcm_jax.modalities import Modality


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeGuidance:
    """No training: ``eps' = eps + scale sigma grad CE(labels of x0_hat, labels)`` by x_t (Bansal et al. 2023, eq. 6).

    Of the text-guided eps. The judge is a segmentation net, so labels are followed and nothing else: a sketch has no
    judge with a gradient. Their recurrence and backward guidance are left out. Where the same net judges the samples,
    this is the best that guiding by a judge can be.

    Attributes:
      judge: the net, with its weights.
      labels: the modality that it finds.
      text_guidance: of the base's prediction, where there is a negative context.
    """

    base: Base
    modalities: tuple[Modality, ...]
    judge: Segmenter
    labels: str
    text_guidance: float = 1.0
    needs_eps = False
    guides_text = True

    def __post_init__(self):
        known = {m.name: m for m in self.modalities}
        if self.labels not in known or known[self.labels].channels != len(self.judge.classes):
            raise UserError(
                f"the peer 'judge' follows {self.labels!r} by a net of {len(self.judge.classes)} classes; the data has "
                f"{', '.join(f'{m.name} ({m.channels})' for m in self.modalities)}; name another net with --guide"
            )
        if any(size % own for size, own in zip(self.base.image_shape, self.grid, strict=False)):
            height, width = self.grid
            raise UserError(
                f"the peer 'judge' reads pictures of {height}x{width}, or of whole multiples; the base "
                f"{self.base.name!r} makes {self.base.image_shape[0]}x{self.base.image_shape[1]}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        return self.judge.config["height"], self.judge.config["width"]

    def init(self, key: jax.Array, base_params: Any) -> Any:
        """The scale of the gradient, which is swept in place of a learning rate, and not trained."""
        return {"scale": jnp.ones(())}

    def prepare(self, params: Any, base_params: Any, given: Given) -> None:
        return None

    def shown(self, given: Given) -> jax.Array:
        """Which examples are shown their labels, bool ``[B]``."""
        return given.present[:, [m.name for m in self.modalities].index(self.labels)]

    def log_likelihood(self, pictures: jax.Array, labels: jax.Array) -> jax.Array:
        """Of labels ``[B, h, w]`` in pictures ``[B, H, W, 3]``, H a multiple of h: sums over the labels, ``[B]``."""
        batch, (height, width) = len(pictures), self.grid
        parts = pictures.reshape(batch, height, pictures.shape[1] // height, width, pictures.shape[2] // width, 3)
        seen = parts.mean((2, 4))
        seen = seen + jax.lax.stop_gradient(jnp.clip(seen, -1, 1) - seen)  # cut off, but not its gradient
        logits = self.judge.net.apply({"params": self.judge.params}, seen)
        known = (labels >= 0) & (labels < logits.shape[-1])  # others are unknown
        which = jnp.where(known, labels, 0).astype(jnp.int32)[..., None]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), which, axis=-1)[..., 0]
        return jnp.where(known, picked, 0.0).sum((1, 2))

    def _predict(self, base_params: Any, given: Given, x_t: jax.Array) -> jax.Array:
        if given.negative is None:
            return self.base.predict(base_params, x_t, given.t, given.context, given.level)
        x, t, level = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x_t, given.t, given.level))
        eps = self.base.predict(base_params, x, t, jnp.concatenate([given.negative, given.context]), level)
        return sampling.guide(*jnp.split(eps, 2), self.text_guidance)

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: None) -> jax.Array:
        schedule = self.base.schedule
        alpha, sigma = given.level or (schedule.alpha(given.t), schedule.sigma(given.t))

        def likelihood(x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            eps = self._predict(base_params, given, x_t)
            x0 = estimate_x0(x_t, eps, alpha, sigma, jnp.inf)
            found = self.log_likelihood(self.base.decode(base_params, x0), given.conditions[self.labels])
            return found.sum(), eps

        gradient, eps = jax.grad(likelihood, has_aux=True)(given.x_t)
        step = params["scale"] * sigma[:, None, None, None] * gradient
        return eps - jnp.where(self.shown(given)[:, None, None, None], step, 0.0)
