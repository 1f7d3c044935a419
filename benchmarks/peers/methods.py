"""The methods: what each trains, and the noise that it predicts under control."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from benchmarks.peers import nets, unet
from benchmarks.peers.judge import JudgeGuidance
from benchmarks.peers.method import Given, Method
from configs import default
from mcm_jax import assets
from mcm_jax.base import Base
from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import load_segmenter
from mcm_jax.mcm import MCMSettings, Modulator, estimate_x0
from mcm_jax.modalities import Modality, stack, total_channels
from mcm_jax.predictions import to_eps

_PLAIN = dict(blocks=1, head_dim=0, groups=8)
SIZES = default.SIZES | {
    "slim": dict(channels=8, multipliers=(1, 2, 3), attention=(0, 0, 0)) | _PLAIN,  # about 3% of the shipped bases
    "wide": dict(channels=40, multipliers=(1, 1), attention=(0, 0)) | _PLAIN,  # as many parameters as medium
}
# What an MCM may be otherwise: the paper's inputs, shift and loss; called again on its own corrected prediction;
# trained to be followed by a judge, too; a trained one that learns what it says with guidance.
FORMS = ("", "-paper", "-twice", "-judged", "-distilled")
INSIDE = ("full", "controlnet", "adapter", "lora")
METHODS = (
    *(f"mcm-{size}{form}" for form in FORMS for size in SIZES),
    *(f"{name}{weighting}" for weighting in ("", "-eps") for name in INSIDE),
    "judge",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Modulation:
    """MCM: ``mcm_jax``'s own, of any size and form."""

    base: Base
    modulator: Modulator
    needs_eps = True
    guides_text = False

    @property
    def grid(self) -> tuple[int, int]:
        return self.modulator.grid(self.base)

    def init(self, key: jax.Array, base_params: Any) -> Any:
        return self.modulator.init(key, self.base.latent_shape, self.grid)

    def prepare(self, params: Any, base_params: Any, given: Given) -> None:
        return None

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: None) -> jax.Array:
        eps = given.eps
        if eps is None:
            eps = self.base.predict(base_params, given.x_t, given.t, given.context, given.level)
        return self.modulator(params, given.x_t, eps, given.t, given.conditions, given.present, given.level)[0]


class Twice(Modulation):
    """An MCM that sees its own corrected prediction, and the x0 of it, and corrects it once more; one set of params."""

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: None) -> jax.Array:
        once = super().__call__(params, base_params, given, prepared)
        return super().__call__(params, base_params, given._replace(eps=once), prepared)


@dataclasses.dataclass(frozen=True, eq=False)
class Judged(Modulation):
    """An MCM that is trained, besides, for what a judge sees in its x0: ``+ strength alpha^2 CE(labels of x0_hat')``.

    The gradient goes through the judge and the autoencoder's decoder, not through the base's U-Net.

    Attributes:
      judge: finds the labels.
      strength: of the further loss.
    """

    judge: JudgeGuidance
    strength: float = 0.03

    def penalty(self, base_params: Any, given: Given, eps: jax.Array) -> jax.Array:
        """Of each example ``[B]``; 0 where it is shown no labels."""
        schedule, judge = self.base.schedule, self.judge
        alpha, sigma = schedule.alpha(given.t), schedule.sigma(given.t)
        x0 = estimate_x0(given.x_t, eps, alpha, sigma, self.modulator.x0_clip)
        factor = given.conditions[judge.labels].shape[1] // judge.grid[0]
        labels = given.conditions[judge.labels][:, factor // 2 :: factor, factor // 2 :: factor]
        likelihood = judge.log_likelihood(self.base.decode(base_params, x0), labels) / math.prod(judge.grid)
        return -self.strength * jnp.square(alpha) * jnp.where(judge.shown(given), likelihood, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Distilled(Modulation):
    """A trained MCM that goes on to learn what it says itself with modality guidance: ``eps + s (eps'_teacher - eps)``.

    Attributes:
      teacher: its params, with which it begins.
      guidance: s.
    """

    teacher: Any
    guidance: float = 1.5

    def init(self, key: jax.Array, base_params: Any) -> Any:
        return jax.tree.map(jnp.asarray, self.teacher)

    def target(self, given: Given) -> jax.Array:
        """What is learnt in the place of the noise."""
        return given.eps + self.guidance * (self(self.teacher, {}, given, None) - given.eps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Inside:
    """What the methods that reach into the base share: conditions at the pictures' resolution, a call of the net."""

    base: Base
    modalities: tuple[Modality, ...]
    name = ""
    needs_eps = False
    guides_text = False

    def __post_init__(self):
        unet.check_supported(self.base, self.name)

    @property
    def grid(self) -> tuple[int, int]:
        return self.base.image_shape[:2]

    @property
    def _halvings(self) -> int:
        return int(math.log2(self.base.factor))

    def _example(self) -> jax.Array:
        return jnp.zeros((1, *self.grid, total_channels(self.modalities)))

    def _channels(self, given: Given) -> jax.Array:
        return stack(self.modalities, given.conditions, given.present)

    def _arguments(self, given: Given) -> tuple[jax.Array, ...]:
        return (given.x_t, given.t) if given.context is None else (given.x_t, given.t, given.context)

    def _eps(self, given: Given, params: Any, **additions: Any) -> jax.Array:
        schedule = self.base.schedule
        prediction = unet.forward(self.base.unet, params, *self._arguments(given), **additions).astype(jnp.float32)
        alpha, sigma = given.level or (schedule.alpha(given.t), schedule.sigma(given.t))
        return to_eps(prediction, given.x_t, alpha, sigma, schedule.prediction_type)


def _trainable(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)


class FullFineTuning(_Inside):
    """Every parameter of the base's U-Net is trained; conditions are concatenated to its input."""

    name = "full"

    @property
    def _seen(self) -> nets.Seen:
        return nets.Seen(unet.widths_of(self.base)[0], self._halvings, self.base.unet.dtype)

    def init(self, key: jax.Array, base_params: Any) -> Any:
        return {"unet": _trainable(base_params["unet"]), "seen": self._seen.init(key, self._example())["params"]}

    def prepare(self, params: Any, base_params: Any, given: Given) -> Any:
        return params["unet"], self._seen.apply({"params": params["seen"]}, self._channels(given))

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: Any) -> jax.Array:
        net, hint = prepared
        return self._eps(given, net, hint=hint)


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(FullFineTuning):
    """A product of two narrow matrices is added to each kernel of the base; conditions as in full fine-tuning.

    Attributes:
      rank: of the product; less where a kernel has a side that is smaller.
    """

    rank: int = 8
    name = "lora"

    def init(self, key: jax.Array, base_params: Any) -> Any:
        low, seen_key = {}, jax.random.fold_in(key, 0)
        for i, (path, kernel) in enumerate(traverse_util.flatten_dict(base_params["unet"], sep="/").items()):
            if path.endswith("/kernel"):
                inputs, outputs = math.prod(kernel.shape[:-1]), kernel.shape[-1]
                rank = min(self.rank, inputs, outputs)
                down = jax.random.normal(jax.random.fold_in(key, i + 1), (inputs, rank)) / math.sqrt(inputs)
                low[path] = {"down": down, "up": jnp.zeros((rank, outputs))}
        return {"low": low, "seen": self._seen.init(seen_key, self._example())["params"]}

    def prepare(self, params: Any, base_params: Any, given: Given) -> Any:
        flat = dict(traverse_util.flatten_dict(base_params["unet"], sep="/"))
        for path, low in params["low"].items():
            flat[path] = flat[path] + (low["down"] @ low["up"]).reshape(flat[path].shape).astype(flat[path].dtype)
        changed = {"unet": traverse_util.unflatten_dict(flat, sep="/"), "seen": params["seen"]}
        return super().prepare(changed, base_params, given)


class ControlNet(_Inside):
    """A copy of the base's encoder that sees the conditions; what it gives is added to the skips by zero convolutions.

    Zhang et al. 2023, sec. 3; its forward pass is diffusers' ``ControlNetModel``'s (tests/test_peers.py).
    """

    name = "controlnet"

    def __post_init__(self):
        super().__post_init__()
        if self._halvings > nets.MOST_HALVINGS:
            most = 2**nets.MOST_HALVINGS
            raise UserError(
                f"the peer 'controlnet' takes latents of at most 1/{most} of the pictures; those of the base "
                f"{self.base.name!r} are of 1/{self.base.factor}"
            )

    @property
    def _hint(self) -> nets.Hint:
        return nets.Hint(unet.widths_of(self.base)[0], self._halvings, self.base.unet.dtype)

    def init(self, key: jax.Array, base_params: Any) -> Any:
        kept = ("conv_in", "time_", "down_blocks_", "mid_block")
        copy = _trainable({name: p for name, p in base_params["unet"].items() if name.startswith(kept)})
        x, more = jnp.zeros((1, *self.base.latent_shape)), ()
        if self.base.is_text_conditional:
            more = (jnp.zeros((1, 1, self.base.unet.config.cross_attention_dim)),)
        encode = functools.partial(unet.encode, self.base.unet)
        skips, middle = jax.eval_shape(encode, copy, x, jnp.zeros(1, jnp.int32), *more)
        zeros = lambda c: {"kernel": jnp.zeros((1, 1, c, c)), "bias": jnp.zeros(c)}  # noqa: E731
        return {
            "copy": copy,
            "controlnet_cond_embedding": self._hint.init(key, self._example())["params"],
            "controlnet_down_blocks": [zeros(s.shape[-1]) for s in skips],
            "controlnet_mid_block": zeros(middle.shape[-1]),
        }

    def prepare(self, params: Any, base_params: Any, given: Given) -> jax.Array:
        return self._hint.apply({"params": params["controlnet_cond_embedding"]}, self._channels(given))

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: jax.Array) -> jax.Array:
        skips, middle = unet.encode(self.base.unet, params["copy"], *self._arguments(given), hint=prepared)
        residuals = list(map(nets.zero_convolution, params["controlnet_down_blocks"], skips))
        middle = nets.zero_convolution(params["controlnet_mid_block"], middle)
        return self._eps(given, base_params["unet"], residuals=residuals, middle=middle)


class Adapter(_Inside):
    """Features of the conditions alone, added to the base's encoder at each level (T2I-Adapter, Mou et al. 2023)."""

    name = "adapter"

    @property
    def _net(self) -> nets.Adapter:
        return nets.Adapter(unet.widths_of(self.base), self.base.factor, self.base.unet.dtype)

    def init(self, key: jax.Array, base_params: Any) -> Any:
        return self._net.init(key, self._example())["params"]

    def prepare(self, params: Any, base_params: Any, given: Given) -> list[jax.Array]:
        return self._net.apply({"params": params}, self._channels(given))

    def __call__(self, params: Any, base_params: Any, given: Given, prepared: list[jax.Array]) -> jax.Array:
        return self._eps(given, base_params["unet"], features=prepared)


def make_method(
    name: str,
    base: Base,
    modalities: tuple[Modality, ...],
    mcm: MCMSettings,
    *,
    guide: str = "scenes-segmenter",
    text_guidance: float = 1.0,
    teacher: Any = None,
) -> Method:
    """A method by its name.

    Args:
      name: one of :data:`METHODS`.
      base: the frozen model.
      modalities: conditions.
      mcm: what an MCM is but for its size.
      guide: the net of ``judge`` and ``-judged``, an asset's name or a folder.
      text_guidance: of ``judge``.
      teacher: params of ``-distilled``: of the MCM without.

    Raises:
      UserError: the base, the pictures' size or the labels are such that the method does not take.
    """
    judge = functools.partial(JudgeGuidance, base, modalities, labels="segmentation", text_guidance=text_guidance)
    if name == "judge":
        return judge(judge=load_segmenter(assets.resolve(guide)))
    if not name.startswith("mcm-"):
        kinds = {kind.name: kind for kind in (FullFineTuning, ControlNet, Adapter, LoRA)}
        return kinds[name.removesuffix("-eps")](base, modalities)
    size, _, form = name.removeprefix("mcm-").partition("-")
    mcm = dataclasses.replace(mcm, **SIZES[size])
    if form == "paper":
        mcm = dataclasses.replace(mcm, inputs=("x_t", "eps"), shift_space="eps", conditions="grid")
    modulator = mcm.modulator(modalities, base)
    if form == "judged":
        return Judged(base, modulator, judge(judge=load_segmenter(assets.resolve(guide))))
    if form == "distilled":
        return Distilled(base, modulator, teacher)
    return (Twice if form == "twice" else Modulation)(base, modulator)
