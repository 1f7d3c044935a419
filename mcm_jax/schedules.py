r"""The noise schedule of a base model, read from a diffusers ``scheduler_config.json``.

With ``beta_t`` the variance added at step ``t`` in ``0 .. T-1`` and ``abar_t = prod_{s<=t} (1 - beta_s)``, the forward
process (Ho et al. 2020, eq. 4) is

    x_t = alpha_t x_0 + sigma_t eps,    alpha_t = sqrt(abar_t),    sigma_t = sqrt(1 - abar_t),    eps ~ N(0, I)

so ``alpha_t^2 + sigma_t^2 = 1`` (variance preserving). The betas are one of

    linear              beta_t = linspace(beta_start, beta_end, T)
    scaled_linear       beta_t = linspace(sqrt(beta_start), sqrt(beta_end), T)^2                  (latent diffusion)
    squaredcos_cap_v2   beta_t = min(1 - f(t+1)/f(t), 0.999),  f(t) = cos^2((t/T + 0.008)/1.008 pi/2)  (Nichol 2021)
    trained_betas       a list of T numbers in the file

``rescale_betas_zero_snr`` shifts and scales ``sqrt(abar)`` so that its last value is 0 (Lin et al. 2024, alg. 1).
There ``alpha_{T-1} = 0``, eps says nothing of x_0 and ``x_0 = (x_t - sigma_t eps)/alpha_t`` is 0/0. So that
samplers may work on eps all the same, :attr:`Schedule.abar` and what is made of it have 4.9e-8, or the step's before if
that is less, in place of 0 (ours, as others do). No other value is touched: squaredcos_cap_v2 ends at 2.4e-9, and a
network of v is trained on just that.

A grid of ``N`` sampling steps (same paper, table 2) is

    leading    t_i = i floor(T/N) + steps_offset
    trailing   t_i = round(T - i T/N) - 1
    linspace   t_i = round(i (T-1)/(N-1))
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
_TRACE = 4.8973451890853435e-08  # the abar of a step without signal
_VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")

# What a key means when the file leaves it out: diffusers' own defaults, which differ by class. DDPM has no
# set_alpha_to_one (its last step is always to abar = 1); only DDPM and DDIM clip.
_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "variance_type": "fixed_small",
}
# Samplers of the same diffusion, which Stable Diffusion's folders name too. We take its betas and parameterisation from
# them, not their way to sample.
_OTHER = _COMMON | {"clip_sample": False, "timestep_spacing": "linspace"}
_DEFAULTS = {
    "DDPMScheduler": _COMMON,
    "DDIMScheduler": _COMMON,
    "PNDMScheduler": _COMMON | {"set_alpha_to_one": False, "clip_sample": False},
    "EulerDiscreteScheduler": _OTHER,
    "EulerAncestralDiscreteScheduler": _OTHER,
    "DPMSolverMultistepScheduler": _OTHER,
    "UniPCMultistepScheduler": _OTHER,
    "DEISMultistepScheduler": _OTHER,
    "LMSDiscreteScheduler": _OTHER,
    "HeunDiscreteScheduler": _OTHER | {"beta_start": 0.00085, "beta_end": 0.012},
}
# Options that a class does not have, or that only concern its own way to sample; a file may carry them all the same.
_SAMPLING = {"clip_sample", "set_alpha_to_one", "thresholding", "variance_type"}
_IGNORED = {
    "DDPMScheduler": {"set_alpha_to_one"},
    "DDIMScheduler": set(),
    "PNDMScheduler": {"clip_sample", "rescale_betas_zero_snr", "thresholding"},
    "EulerDiscreteScheduler": _SAMPLING,
    "EulerAncestralDiscreteScheduler": _SAMPLING,
    "DPMSolverMultistepScheduler": _SAMPLING,
    "UniPCMultistepScheduler": _SAMPLING,
    "DEISMultistepScheduler": _SAMPLING | {"rescale_betas_zero_snr"},
    "LMSDiscreteScheduler": _SAMPLING | {"rescale_betas_zero_snr"},
    "HeunDiscreteScheduler": _SAMPLING | {"rescale_betas_zero_snr"},
}

_SOLVERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
    "HeunDiscreteScheduler": "heun",
}
# Options that change how a class samples, with the one value that our sampler of its name has (and diffusers' default).
_AS_OURS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"solver_order": 2, "solver_type": "midpoint", "use_lu_lambdas": False},
    "UniPCMultistepScheduler": {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
}
_LEVELS_AS_OURS = {
    **{"use_beta_sigmas": False, "use_flow_sigmas": False, "final_sigmas_type": "zero", "interpolation_type": "linear"},
    **{"timestep_type": "discrete", "sigma_min": None, "sigma_max": None},
}


def _own_sampler(config: Mapping[str, Any]) -> tuple[str, str]:
    """What a file's class and options are called here, and its spacing of sigmas; of others, what the file says."""
    name = config["_class_name"]
    solver = _SOLVERS.get(name, name)
    ours = _AS_OURS.get(name, {}) | (_LEVELS_AS_OURS if name.startswith(("Euler", "DPM", "UniPC", "Heun")) else {})
    # A file that says nothing of this one has the other value.
    given = {"skip_prk_steps": False} | dict(config) if name == "PNDMScheduler" else config
    if odd := [key for key, value in ours.items() if given.get(key, value) != value]:
        solver = f"{name} with {odd[0]}={given[odd[0]]}"
    if name == "DPMSolverMultistepScheduler" and (kind := config.get("algorithm_type", "dpmsolver++")) != "dpmsolver++":
        solver = "dpm++2m_sde" if kind == "sde-dpmsolver++" else f"{name} with algorithm_type={kind}"
    spacings = [spacing for spacing in ("karras", "exponential") if config.get(f"use_{spacing}_sigmas")]
    return solver, (spacings[0] if spacings else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete variance-preserving noise schedule.

    Attributes:
        alphas_cumprod: float32 ``[T]``, ``abar_t``, falling, in [0, 1].
        prediction_type: what the network of the base predicts: ``epsilon``, ``v_prediction`` or ``sample``.
        timestep_spacing: the base's own way to space sampling steps: ``leading``, ``trailing`` or ``linspace``.
        steps_offset: added to each timestep of a ``leading`` grid.
        set_alpha_to_one: whether the last sampling step goes to ``abar = 1`` rather than to ``abar_0``.
        clip_sample: whether the base's scheduler clips its estimate of x_0.
        clip_sample_range: the bound of that clipping.
        variance_type: the noise that the base's own ancestral sampler adds.
        solver: which of :data:`mcm_jax.samplers.SAMPLERS` the base's file names; of others, what the file says.
        solver_spacing: ``karras`` or ``exponential`` where that sampler's steps are so spaced, else empty.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    solver: str = "ddim"
    solver_spacing: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What decides how samples are drawn, without what a base's fingerprint has: noise levels, prediction type."""
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v for k, v in every.items() if k not in ("alphas_cumprod", "prediction_type")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Builds the schedule that a diffusers ``scheduler_config.json`` describes.

        Args:
            config: the parsed file. Keys it lacks take the defaults of its ``_class_name`` in diffusers; keys that mean
                nothing to a schedule are ignored, as diffusers does.

        Raises:
            ValueError: a class or a value that is not supported; names the key, what was found and what is expected.
        """
        name = config.get("_class_name")
        if name not in _DEFAULTS:
            raise ValueError(f"_class_name: found {name!r}, expected one of {', '.join(_DEFAULTS)}")
        ignored = _IGNORED[name]
        c = _DEFAULTS[name] | {k: v for k, v in config.items() if k in _COMMON and k not in ignored}
        _expect_in(c, "prediction_type", PREDICTION_TYPES)
        _expect_in(c, "timestep_spacing", SPACINGS)
        _expect_in(c, "variance_type", _VARIANCE_TYPES)
        _expect_in(c, "thresholding", (False,))
        solver = dict(zip(("solver", "solver_spacing"), _own_sampler(config), strict=True))
        kept = [field.name for field in dataclasses.fields(cls) if field.name in c]
        return cls(_alphas_cumprod(c), **{key: c[key] for key in kept}, **solver)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def abar(self) -> np.ndarray:
        """`alphas_cumprod` with a last trace of signal where it has none: float32 ``[T]``, falling, above 0.

        Numbers too small for a normal float32 are none, since devices take them for 0.
        """
        given = self.alphas_cumprod
        none = given < np.finfo(np.float32).tiny
        # At most the least that is given, or the schedule would rise at its end.
        return np.where(none, given.min(where=~none, initial=np.float32(_TRACE)), given)

    @property
    def final_alpha_cumprod(self) -> float:
        """``abar`` that the last sampling step goes to (there is no timestep below 0 to read it from)."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def alpha(self, t: jax.Array) -> jax.Array:
        """``sqrt(abar_t)``: int32 ``[B]`` in 0..T-1 to float32 ``[B]``."""
        return jnp.asarray(np.sqrt(self.abar))[t]

    def sigma(self, t: jax.Array) -> jax.Array:
        """``sqrt(1 - abar_t)``: int32 ``[B]`` in 0..T-1 to float32 ``[B]``."""
        return jnp.asarray(np.sqrt(1 - self.abar))[t]

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """``x_t = alpha_t x_0 + sigma_t eps``.

        Args:
            x0: float32 ``[B, ...]``, clean images or latents.
            noise: float32, x0's shape, standard normal.
            t: int32 ``[B]`` in 0..T-1.
        """
        shape = (-1,) + (1,) * (x0.ndim - 1)
        return self.alpha(t).reshape(shape) * x0 + self.sigma(t).reshape(shape) * noise

    def timesteps(self, num_steps: int, spacing: str | None = None) -> np.ndarray:
        """The timesteps of a sampler with `num_steps` steps, equal to diffusers' ``DDIMScheduler.set_timesteps``.

        Args:
            num_steps: 1..T.
            spacing: one of :data:`SPACINGS`; None takes the base's own.

        Returns:
            int32 ``[num_steps]``, falling, in 0..T-1.

        Raises:
            ValueError: `num_steps` or `spacing` out of range, or `steps_offset` leads past T-1.
        """
        total, spacing = self.num_train_timesteps, spacing or self.timestep_spacing
        if not 1 <= num_steps <= total:
            raise ValueError(
                f"num_steps: found {num_steps}, expected 1..{total} (the timesteps the base was trained on)"
            )
        if spacing == "leading":
            grid = np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        elif spacing == "trailing":
            # Cut to length: rounding in arange can append one more element, which would be the timestep -1.
            grid = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        elif spacing == "linspace":
            grid = np.linspace(0, total - 1, num_steps).round()[::-1]
        else:
            raise ValueError(f"spacing: found {spacing!r}, expected one of {', '.join(SPACINGS)}")
        if grid[0] >= total:
            raise ValueError(
                f"num_steps: {num_steps} leading steps with steps_offset {self.steps_offset} start at timestep "
                f"{int(grid[0])}, expected at most {total - 1}: take fewer steps or another spacing"
            )
        return grid.astype(np.int32)


def _expect_in(config: Mapping[str, Any], key: str, supported: tuple) -> None:
    if config[key] not in supported:
        raise ValueError(f"{key}: found {config[key]!r}, expected one of {', '.join(map(str, supported))}")


def _alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """``abar``, float32 ``[T]``, rounded where diffusers rounds: betas in float32, products in float64."""
    total = config["num_train_timesteps"]
    if not (isinstance(total, int) and total >= 1):
        raise ValueError(f"num_train_timesteps: found {total!r}, expected a positive integer")
    start, end = config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
        if betas.ndim != 1 or len(betas) != total:
            raise ValueError(
                f"trained_betas: found shape {list(betas.shape)}, expected [{total}] (num_train_timesteps)"
            )
    else:
        _expect_in(config, "beta_schedule", BETA_SCHEDULES)
        if config["beta_schedule"] == "linear":
            betas = _linspace(start, end, total)
        elif config["beta_schedule"] == "scaled_linear":
            betas = _linspace(start**0.5, end**0.5, total) ** 2
        else:
            bar = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
            betas = np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(total)], np.float32)
    if not np.all((betas >= 0) & (betas <= 1)):
        raise ValueError(f"betas: found values in {betas.min()}..{betas.max()}, expected 0..1")
    if config["rescale_betas_zero_snr"]:
        root = np.sqrt(_cumprod(1 - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        bar = root**2
        # Back to alphas and forward again, as diffusers does: the round trip decides the last bits.
        return _cumprod(1 - (1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])))
    return _cumprod(1 - betas)


def _linspace(start: float, end: float, num: int) -> np.ndarray:
    """``torch.linspace`` to the last bit: a float32 step, counted from the nearer end, and one rounding at the end.

    ``np.linspace`` differs by one ulp, which `rescale_betas_zero_snr` amplifies where the schedule is short.
    """
    start, end = np.float32(start), np.float32(end)
    step = np.float64((end - start) / np.float32(max(num - 1, 1)))
    i = np.arange(num)
    return np.where(i < (num + 1) // 2, start + step * i, end - step * (num - 1 - i)).astype(np.float32)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)
