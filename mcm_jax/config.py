"""Where a config enters: checked once, turned into plain objects, written into the workdir and compared with it."""

import json
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_collections

from mcm_jax import draws as draws_lib
from mcm_jax import losses, sampling
from mcm_jax.base import Base, BaseCard
from mcm_jax.cache import build
from mcm_jax.data.scenes import CLASSES
from mcm_jax.data.views import check_views
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.mcm import INPUTS, MCM, SHIFT_SPACES, Modulator, Size
from mcm_jax.modalities import Modality

_CHOICES = {
    "base.dtype": ("float32", "bfloat16", "float16"),
    "mcm.dtype": ("float32", "bfloat16", "float16"),
    "mcm.shift_space": SHIFT_SPACES,
    "loss.weighting": losses.WEIGHTINGS,
    "sampling.sampler": sampling.SAMPLERS,
    "sampling.modulate": sampling.MODULATE,
    "data.name": ("scenes", "folder"),
    "cache.mode": ("off", "on", "build"),
    "cache.dtype": build.DTYPES,
}
_AT_LEAST_ONE = (
    "data.size",
    "data.views",
    "draws.count",
    "cache.shard_draws",
    "cache.batch_size",
    "train.steps",
    "train.batch_size",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "sampling.steps",
    "sampling.batch_size",
    "mcm.channels",
    "mcm.blocks",
    "mcm.groups",
    "evaluation.maps",
    "evaluation.diversity_conditions",
)
_AT_LEAST_ZERO = (
    "seed",
    "data.seed",
    "draws.seed",
    "loss.l1",
    "train.warmup_steps",
    "train.weight_decay",
    "train.clip_norm",
    "train.validate_every",
    "mcm.head_dim",
    "sampling.guidance",
    "sampling.text_guidance",
    "evaluation.diversity_seeds",
)
_SEEDS = 2**32  # a JAX key takes 32 bits; more would be cut off silently
_MAPS = {"scenes": {"segmentation": ("labels", len(CLASSES)), "sketch": ("map", 1)}}  # what each data set holds
_ABOVE_ZERO = ("train.learning_rate", "mcm.x0_clip", "data.crop")
_WHOLE = (
    "seed",
    "data.seed",
    "draws.seed",
    "train.warmup_steps",
    "train.validate_every",
    "mcm.head_dim",
    "evaluation.diversity_seeds",
)
# What else an example or a record holds.
_TAKEN = ("image", "latent", "caption", "prompt", "index", "draw", "seen", "t", "eps", "eps_scale", "noise", "x_t")
_LISTS = {"mcm.multipliers": 1, "mcm.attention": 0}  # with the least value of an element
_OTHERS = (
    "base.path",
    "data.path",
    "mcm.inputs",
    "modalities.drop_rate",
    "draws.density",
    "cache.path",
    "sampling.negative_prompt",
)
_FLAGS = ("mcm.residual_scale", "data.flip", "cache.verify", "cache.load_base")
_SHARES = ("train.ema_decay", "modalities.drop_rate", "data.prompt_drop_rate", "data.crop", "sampling.eta")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"train.steps": 100, ...}`` of a (nested) config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where a value is out of its range; types are held by ml_collections."""
    flat = flatten(config)

    def expect(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise UserError(f"config.{key} must be {expected}, got {flat[key]!r}")

    known = (*_CHOICES, *_AT_LEAST_ONE, *_AT_LEAST_ZERO, *_ABOVE_ZERO, *_SHARES, *_FLAGS, *_LISTS, *_OTHERS)
    if missing := [k for k in known if k not in flat]:
        raise UserError(f"the config lacks {', '.join(missing)}; start from configs/default.py, which has every key")
    for key in (*_AT_LEAST_ONE, *_AT_LEAST_ZERO, *_ABOVE_ZERO, *_SHARES):
        number = isinstance(flat[key], int | float) and not isinstance(flat[key], bool) and math.isfinite(flat[key])
        expect(number, key, "a finite number")
    for key in (*_AT_LEAST_ONE, *_WHOLE):
        expect(isinstance(flat[key], int), key, "a whole number")
    for key, least in _LISTS.items():
        whole = isinstance(flat[key], list) and all(isinstance(v, int) and v >= least for v in flat[key])
        expect(whole and len(flat[key]) > 0, key, f"a list of whole numbers, each at least {least}")
    for key in _FLAGS:
        expect(isinstance(flat[key], bool), key, "True or False")
    try:
        draws_lib.check_density(flat["draws.density"], 2**31)  # how many timesteps there are is the base's to say
    except (TypeError, ValueError):
        expect(False, "draws.density", "relative densities, each at least 0 and not all 0, e.g. (1,) or (1, 3)")
    check_views(flat["data.views"], flat["data.flip"], flat["data.crop"])
    expect(flat["data.views"] <= flat["draws.count"], "data.views", "at most draws.count: each draw sees one view")
    expect(isinstance(flat["cache.path"], str), "cache.path", "a folder, '' for the workdir's own")
    expect(isinstance(flat["sampling.negative_prompt"], str), "sampling.negative_prompt", "a text, '' for none")
    expect(isinstance(flat["base.path"], str) and flat["base.path"] != "", "base.path", "a folder or a shipped name")
    for key, choices in _CHOICES.items():
        expect(flat[key] in choices, key, f"one of {', '.join(choices)}")
    for key in _AT_LEAST_ONE:
        expect(flat[key] >= 1, key, "at least 1")
    for key in _AT_LEAST_ZERO:
        expect(flat[key] >= 0, key, "at least 0")
    for key in _ABOVE_ZERO:
        expect(flat[key] > 0, key, "above 0")
    for key in _SHARES:
        expect(0 <= flat[key] <= 1, key, "in [0, 1]")
    expect(flat["modalities.drop_rate"] < 1, "modalities.drop_rate", "below 1: at 1 no condition is ever seen")
    expect(flat["train.ema_decay"] < 1, "train.ema_decay", "below 1: at 1 the average never moves")
    for key in ("seed", "draws.seed"):
        expect(flat[key] < _SEEDS, key, f"at most {_SEEDS - 1}")
    for key, value in flat.items():
        expect(not isinstance(value, float) or math.isfinite(value), key, "finite")
    inputs = flat["mcm.inputs"]
    expect(len(set(inputs)) == len(inputs) > 0 and set(inputs) <= set(INPUTS), "mcm.inputs", f"out of {INPUTS}")
    if not modalities(config):
        raise UserError("config.modalities names no modality; see configs/default.py")
    is_text = isinstance(flat["data.path"], str)
    expect(
        is_text and bool(flat["data.path"]) == (flat["data.name"] == "folder"),
        "data.path",
        "a folder of pairs where data.name is 'folder', and '' where it is not",
    )
    maps = _MAPS.get(flat["data.name"])
    for m in modalities(config):
        found = ("labels" if m.kind == "labels" else "map", m.channels)
        if maps and found != maps.get(m.name):
            held = ", ".join(f"{name} ({kind}, channels={channels})" for name, (kind, channels) in maps.items())
            raise UserError(
                f"config.modalities.{m.name} is kind={m.kind!r}, channels={m.channels}, but the data set "
                f"{flat['data.name']!r} holds {held}"
            )


def modalities(config: ml_collections.ConfigDict) -> tuple[Modality, ...]:
    """The config's modalities, in the order of their names."""
    section = config.modalities
    entries = [(k, v) for k, v in sorted(section.items()) if isinstance(v, dict | ml_collections.ConfigDict)]
    if taken := [name for name, _ in entries if name in _TAKEN]:
        raise UserError(f"config.modalities.{taken[0]}: this name is taken, as are {', '.join(_TAKEN)}; choose another")
    for name, v in entries:
        if set(v) != {"kind", "channels"} or not isinstance(v["channels"], int):
            raise UserError(
                f"config.modalities.{name} must have kind and channels (a whole number), got {dict(v)}; see "
                f"configs/default.py"
            )
    return tuple(Modality(name, v["kind"], v["channels"]) for name, v in entries)


def draws(config: ml_collections.ConfigDict, base: Base | BaseCard) -> draws_lib.Draws:
    """What the config draws of each example, for a base. Raises UserError where the density has too many parts."""
    d, total = config.draws, base.schedule.num_train_timesteps
    prompt_drop_rate = config.data.prompt_drop_rate if base.is_text_conditional else 0.0
    try:
        return draws_lib.Draws(d.seed, d.count, tuple(d.density), total, prompt_drop_rate)
    except ValueError as e:
        raise UserError(f"config.draws.density: {e}") from e


def cache_folder(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> pathlib.Path:
    """Where the config's cache is."""
    return pathlib.Path(config.cache.path).expanduser() if config.cache.path else pathlib.Path(workdir) / "cache"


def modulator(config: ml_collections.ConfigDict, base: Base | BaseCard) -> Modulator:
    """The MCM that the config describes, for a base."""
    m = config.mcm
    size = Size(
        channels=m.channels,
        multipliers=tuple(m.multipliers),
        blocks=m.blocks,
        attention=tuple(bool(a) for a in m.attention),
        head_dim=m.head_dim or None,
        groups=m.groups,
    )
    return Modulator(
        module=MCM(size, tuple(m.inputs), jnp.dtype(m.dtype)),
        modalities=modalities(config),
        schedule=base.schedule,
        shift_space=m.shift_space,
        residual_scale=m.residual_scale,
        x0_clip=m.x0_clip,
    )


def load(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads the config of a workdir.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, so {str(workdir)!r} is no workdir of a training run. "
            f"Make one with train.py --config=... --workdir={workdir}"
        )
    try:
        config = ml_collections.ConfigDict(json.loads(path.read_text()))
        check(config)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{path}: not a config that train.py wrote ({e})") from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return config


# Where and how a cache is kept: the same training, wherever its predictions lie.
_HOUSEKEEPING = ("cache.path", "cache.verify", "cache.batch_size", "cache.shard_draws", "cache.load_base")


def _of_a_run(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values that a run cannot change on its way."""
    flat = flatten(config)
    flat["cache.mode"] = "on" if flat["cache.mode"] == "build" else flat["cache.mode"]
    return {key: value for key, value in flat.items() if key not in _HOUSEKEEPING}


def refuse_another(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Compares the config with the one in a workdir, if there is one.

    Raises:
      UserError: the workdir holds another run; lists each key that differs.
    """
    path = workdir / "config.json"
    if path.exists():
        found, wanted = _of_a_run(load(workdir)), _of_a_run(config)
        lines = [
            f"  {key}: there {found.get(key, 'absent')!r}, now {wanted.get(key, 'absent')!r}"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key, None) != wanted.get(key, None)
        ]
        if lines:
            differs = "\n".join(lines)
            raise UserError(
                f"{path} is another run's config. It differs in\n{differs}\n"
                f"Take another --workdir, or the same values to go on with that run (a run cannot be made longer: the "
                f"learning rate decays over train.steps)"
            )


def save(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the config into a workdir, unless one is there."""
    path = workdir / "config.json"
    if not path.exists():
        write_atomically(path, (json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n").encode())


def check_same_shapes(found: dict[str, Any], expected: dict[str, Any], source: str) -> None:
    """Raises UserError, listing both sides, unless two MCMs have the same params; the values are shapes."""
    lines = [f"  missing there: {k} {tuple(v)}" for k, v in expected.items() if k not in found]
    lines += [f"  only there: {k} {tuple(v)}" for k, v in found.items() if k not in expected]
    lines += [
        f"  {k}: there {tuple(found[k])}, expected {tuple(v)}"
        for k, v in expected.items()
        if k in found and tuple(found[k]) != tuple(v)
    ]
    if lines:
        more = [f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else []
        differs = "\n".join(lines[:12] + more)
        raise UserError(f"{source} holds another MCM than the config describes:\n{differs}")
