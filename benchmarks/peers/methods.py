"""The methods: what each trains, and the noise that it predicts under control."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from benchmarks.peers import nets, unet
from configs import default
from mcm_jax import assets
from mcm_jax.base import Base
from mcm_jax.base.blocks import conv3x3
from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import Segmenter, load_segmenter
from mcm_jax.mcm import ConditionEncoder, MCMSettings, Modulator, estimate_x0
from mcm_jax.modalities import Modality, stack, total_channels
from mcm_jax.predictions import to_eps

_PLAIN = dict(blocks=1, head_dim=0, groups=8)
SIZES = default.SIZES | {
    "slim": dict(channels=8, multipliers=(1, 2, 3), attention=(0, 0, 0)) | _PLAIN,  # below 3% of the shipped bases
    "wide": dict(channels=40, multipliers=(1, 1), attention=(0, 0)) | _PLAIN,  # as many parameters as medium
}
# What an MCM may be otherwise: the paper's inputs, shift and loss; called again on its own corrected prediction;
# trained to be followed by a judge, too.
FORMS = ("", "-paper", "-twice", "-judged")
METHODS = (
    *(f"mcm-{size}{form}" for form in FORMS for size in SIZES),
    "full",
    "controlnet",
    "adapter",
    "lora",
    "judge",
)


class Given(NamedTuple):
    """What a method is asked about; ``[B, ...]`` each.

    Attributes:
      x_t: noisy latents ``[B, H, W, C]``.
      t: timesteps ``[B]``.
      conditions: a batch for each modality, on the method's grid.
      present: bool ``[B, M]``.
      context: of the prompts ``[B, L, D]``; None for an unconditional base.
      level: alpha and sigma ``[B]``; None are the schedule's at t.
      eps: the base's own prediction, where it is at hand.
    """

    x_t: jax.Array
    t: jax.Array
    conditions: Mapping[str, jax.Array]
    present: jax.Array
    context: jax.Array | None = None
    level: tuple[jax.Array, jax.Array] | None = None
    eps: jax.Array | None = None


class Method(Protocol):
    """A way of control.

    Attributes:
      needs_eps: whether it works on the base's prediction and needs no gradient through the base.
      grid: height and width at which it takes the conditions.
    """

    needs_eps: bool
    grid: tuple[int, int]

    def init(self, key: jax.Array) -> Any:
        """What is trained, as it is at first: a pytree."""
        ...

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        """The noise under control, ``[B, H, W, C]``."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Modulation:
    """MCM: ``mcm_jax``'s own, of any size and form."""

    base: Base
    modulator: Modulator
    needs_eps = True

    @property
    def grid(self) -> tuple[int, int]:
        return self.modulator.grid(self.base)

    def init(self, key: jax.Array) -> Any:
        return self.modulator.init(key, self.base.latent_shape, self.grid)

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        eps = given.eps
        if eps is None:
            eps = self.base.predict(base_params, given.x_t, given.t, given.context, given.level)
        return self.modulator(params, given.x_t, eps, given.t, given.conditions, given.present, given.level)[0]


class Twice(Modulation):
    """An MCM that sees its own corrected prediction, and the x0 of it, and corrects it once more; one set of params."""

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        once = super().__call__(params, base_params, given)
        return super().__call__(params, base_params, given._replace(eps=once))


@dataclasses.dataclass(frozen=True, eq=False)
class Judged(Modulation):
    """An MCM that is trained, besides, for what a judge sees in its x0: ``+ strength alpha^2 CE(labels of x0_hat')``.

    The gradient goes through the judge and the autoencoder's decoder, not through the base's U-Net.

    Attributes:
      judge: finds the labels.
      strength: of the further loss.
    """

    judge: "JudgeGuidance"
    strength: float = 0.03

    def penalty(self, base_params: Any, given: Given, eps: jax.Array) -> jax.Array:
        """Of each example ``[B]``; 0 where it is shown no labels."""
        schedule, labels = self.base.schedule, given.conditions[self.judge.labels]
        alpha, sigma = schedule.alpha(given.t), schedule.sigma(given.t)
        x0 = estimate_x0(given.x_t, eps, alpha, sigma, self.modulator.x0_clip)
        factor = max(labels.shape[1] // self.judge.grid[0], 1)
        likelihood = self.judge.log_likelihood(self.base.decode(base_params, x0), labels[:, ::factor, ::factor])
        shown = given.present[:, [m.name for m in self.judge.modalities].index(self.judge.labels)]
        return -self.strength * jnp.square(alpha) * jnp.where(shown, likelihood, 0.0) / math.prod(self.judge.grid)


@dataclasses.dataclass(frozen=True, eq=False)
class _Inside:
    """What the methods that reach into the base share: conditions at the pictures' resolution, a call of the net."""

    base: Base
    modalities: tuple[Modality, ...]
    needs_eps = False

    def __post_init__(self):
        unet.check_supported(self.base, type(self).__name__)

    @property
    def grid(self) -> tuple[int, int]:
        return self.base.image_shape[:2]

    @property
    def _halvings(self) -> int:
        return int(math.log2(self.base.factor))

    def _example(self) -> jax.Array:
        return jnp.zeros((1, *self.grid, total_channels(self.modalities)))

    def _arguments(self, given: Given) -> tuple[jax.Array, ...]:
        return (given.x_t, given.t) if given.context is None else (given.x_t, given.t, given.context)

    def _eps(self, given: Given, params: Any, **additions: Any) -> jax.Array:
        schedule = self.base.schedule
        prediction = unet.forward(self.base.unet, params, *self._arguments(given), **additions).astype(jnp.float32)
        alpha, sigma = given.level or (schedule.alpha(given.t), schedule.sigma(given.t))
        return to_eps(prediction, given.x_t, alpha, sigma, schedule.prediction_type)


class _Seen(nn.Module):
    """Conditions as further channels of the base's first convolution, which ignores them at first.

    The strided convolutions before it, for a latent base, are those of the MCM (:class:`ConditionEncoder`).
    """

    width: int
    halvings: int
    encoder_width: int = 16

    @nn.compact
    def __call__(self, conditions: jax.Array) -> jax.Array:
        h = ConditionEncoder(self.encoder_width, self.halvings, name="encoder")(conditions)
        return conv3x3(self.width, jnp.float32, "conv_in", kernel_init=nn.initializers.zeros, use_bias=False)(h)


class FullFineTuning(_Inside):
    """Every parameter of the base's U-Net is trained; conditions are concatenated to its input."""

    @property
    def _seen(self) -> _Seen:
        return _Seen(unet.widths_of(self.base)[0], self._halvings)

    def init(self, key: jax.Array) -> Any:
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), self.base.params["unet"])
        return {"unet": copy, "seen": self._seen.init(key, self._example())["params"]}

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        channels = stack(self.modalities, given.conditions, given.present)
        return self._eps(given, params["unet"], hint=self._seen.apply({"params": params["seen"]}, channels))


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(FullFineTuning):
    """A product of two narrow matrices is added to each kernel of the base; conditions as in full fine-tuning.

    Attributes:
      rank: of the product; less where a kernel has a side that is smaller.
    """

    rank: int = 8

    def init(self, key: jax.Array) -> Any:
        low = {}
        keys = iter(jax.random.split(key, 1_000))
        for path, kernel in traverse_util.flatten_dict(self.base.params["unet"], sep="/").items():
            if path.endswith("/kernel"):
                inputs, outputs = math.prod(kernel.shape[:-1]), kernel.shape[-1]
                rank = min(self.rank, inputs, outputs)
                down = jax.random.normal(next(keys), (inputs, rank)) / math.sqrt(inputs)
                low[path] = {"down": down, "up": jnp.zeros((rank, outputs))}
        return {"low": low, "seen": self._seen.init(next(keys), self._example())["params"]}

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        flat = dict(traverse_util.flatten_dict(base_params["unet"], sep="/"))
        for path, low in params["low"].items():
            flat[path] = flat[path] + (low["down"] @ low["up"]).reshape(flat[path].shape)
        changed = traverse_util.unflatten_dict(flat, sep="/")
        return super().__call__({"unet": changed, "seen": params["seen"]}, base_params, given)


class ControlNet(_Inside):
    """A copy of the base's encoder that sees the conditions; what it gives is added to the skips by zero convolutions.

    Zhang et al. 2023, sec. 3; its forward pass is diffusers' ``ControlNetModel``'s (tests/test_peers.py).
    """

    @property
    def _hint(self) -> nets.Hint:
        if self._halvings > 3:
            raise UserError(f"controlnet: the base {self.base.name!r} has latents of 1/{self.base.factor}, at most 1/8")
        return nets.Hint(unet.widths_of(self.base)[0], self._halvings)

    def init(self, key: jax.Array) -> Any:
        original = self.base.params["unet"]
        kept = [name for name in original if name.startswith(("conv_in", "time_", "down_blocks_", "mid_block"))]
        copy = {name: jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), original[name]) for name in kept}
        hint = self._hint
        x = jnp.zeros((1, *self.base.latent_shape))
        more = ()
        if self.base.is_text_conditional:
            more = (jnp.zeros((1, 1, self.base.unet.config.cross_attention_dim)),)
        skips, middle = jax.eval_shape(
            lambda p: unet.encode(self.base.unet, p, x, jnp.zeros(1, jnp.int32), *more), copy
        )
        zeros = lambda c: {"kernel": jnp.zeros((1, 1, c, c)), "bias": jnp.zeros(c)}  # noqa: E731
        return {
            "copy": copy,
            "controlnet_cond_embedding": hint.init(key, self._example())["params"],
            "controlnet_down_blocks": [zeros(s.shape[-1]) for s in skips],
            "controlnet_mid_block": zeros(middle.shape[-1]),
        }

    def residuals(self, params: Any, given: Given) -> tuple[list[jax.Array], jax.Array]:
        """What is added to the base's skips, the finest first, and to its middle block's result."""
        channels = stack(self.modalities, given.conditions, given.present)
        hint = self._hint.apply({"params": params["controlnet_cond_embedding"]}, channels)
        skips, middle = unet.encode(self.base.unet, params["copy"], *self._arguments(given), hint=hint)
        down = map(nets.zero_convolution, params["controlnet_down_blocks"], skips)
        return list(down), nets.zero_convolution(params["controlnet_mid_block"], middle)

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        residuals, middle = self.residuals(params, given)
        return self._eps(given, base_params["unet"], residuals=residuals, middle=middle)


class Adapter(_Inside):
    """Features of the conditions alone, added to the base's encoder at each level (T2I-Adapter, Mou et al. 2023)."""

    @property
    def _net(self) -> nets.Adapter:
        return nets.Adapter(unet.widths_of(self.base), self.base.factor)

    def init(self, key: jax.Array) -> Any:
        return self._net.init(key, self._example())["params"]

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        channels = stack(self.modalities, given.conditions, given.present)
        features = self._net.apply({"params": params}, channels)
        return self._eps(given, base_params["unet"], features=features)


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeGuidance:
    """No training: ``eps' = eps + scale sigma grad CE(labels of x0_hat, labels)`` by x_t (Bansal et al. 2023, eq. 6).

    The judge is a segmentation net, so labels are followed and nothing else: a sketch has no judge with a gradient.
    Where the same net judges the samples, this is the best that guiding by a judge can be.

    Attributes:
      judge: the net, with its weights.
      labels: the modality that it finds.
    """

    base: Base
    modalities: tuple[Modality, ...]
    judge: Segmenter
    labels: str
    needs_eps = False

    def __post_init__(self):
        unet.check_supported(self.base, "judge")
        known = {m.name: m for m in self.modalities}
        if self.labels not in known or known[self.labels].channels != len(self.judge.classes):
            raise UserError(
                f"the peer 'judge' follows {self.labels!r} by a net of {len(self.judge.classes)} classes; the data has "
                f"{', '.join(f'{m.name} ({m.channels})' for m in self.modalities)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        return self.judge.config["height"], self.judge.config["width"]

    def init(self, key: jax.Array) -> Any:
        """The scale of the gradient, which is swept in place of a learning rate, and not trained."""
        return {"scale": jnp.ones(())}

    def log_likelihood(self, pictures: jax.Array, labels: jax.Array) -> jax.Array:
        """Of labels ``[B, h, w]`` in pictures ``[B, H, W, 3]``, H a multiple of h: sums over the labels, ``[B]``."""
        batch, (height, width) = len(pictures), self.grid
        parts = pictures.reshape(batch, height, pictures.shape[1] // height, width, pictures.shape[2] // width, 3)
        logits = self.judge.net.apply({"params": self.judge.params}, jnp.clip(parts.mean((2, 4)), -1, 1))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None].astype(jnp.int32), axis=-1)
        return picked[..., 0].sum((1, 2))

    def __call__(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        schedule = self.base.schedule
        alpha, sigma = given.level or (schedule.alpha(given.t), schedule.sigma(given.t))
        shown = given.present[:, [m.name for m in self.modalities].index(self.labels)]

        def likelihood(x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            eps = self.base.predict(base_params, x_t, given.t, given.context, given.level)
            x0 = estimate_x0(x_t, eps, alpha, sigma, jnp.inf)
            found = self.log_likelihood(self.base.decode(base_params, x0), given.conditions[self.labels])
            return found.sum(), eps

        gradient, eps = jax.grad(likelihood, has_aux=True)(given.x_t)
        step = params["scale"] * sigma[:, None, None, None] * gradient
        return eps - jnp.where(shown[:, None, None, None], step, 0.0)


def make_method(
    name: str,
    base: Base,
    modalities: tuple[Modality, ...],
    mcm: MCMSettings,
    *,
    guide: str = "scenes-segmenter",
) -> Method:
    """A method by its name.

    Args:
      name: one of :data:`METHODS`.
      base: the frozen model.
      modalities: conditions.
      mcm: what an MCM is but for its size.
      guide: the net of ``judge`` and ``-judged``, an asset's name or a folder.
    """
    judge = functools.partial(JudgeGuidance, base, modalities, labels="segmentation")
    if name.startswith("mcm-"):
        size, _, form = name.removeprefix("mcm-").partition("-")
        mcm = dataclasses.replace(mcm, **SIZES[size])
        if form == "paper":
            mcm = dataclasses.replace(mcm, inputs=("x_t", "eps"), shift_space="eps", conditions="grid")
        modulator = mcm.modulator(modalities, base.schedule)
        if form == "judged":
            return Judged(base, modulator, judge(judge=load_segmenter(assets.resolve(guide))))
        return (Twice if form == "twice" else Modulation)(base, modulator)
    if name == "judge":
        return judge(judge=load_segmenter(assets.resolve(guide)))
    return {"full": FullFineTuning, "controlnet": ControlNet, "adapter": Adapter, "lora": LoRA}[name](base, modalities)
