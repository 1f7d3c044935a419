"""What a call for samples asks for: checked, and one of each thing for each sample."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mcm_jax.base import Base
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality
from mcm_jax.sampling import SamplingSettings, is_text

PER_SAMPLE = (
    *("guidance", "guidance_schedule", "start", "end"),
    *("text_guidance", "text_rescale", "negative_prompt"),
)
"""Fields of :class:`mcm_jax.sampling.SamplingSettings` that each sample of a batch may have its own of."""

OF_TEXT = ("prompt", "negative_prompt", "text_guidance", "text_rescale", "modulate")
"""What means something for a text-conditional base only."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Of N samples.

    Attributes:
      values: by modality, ``[N, H, W]`` or ``[N, H, W, planes]``; null where it is not given.
      strengths: by modality, float64 ``[N]``; 0 where it is not given or not shown.
      windows: by modality, float32 ``[N, 2]``, shares of the steps.
      weights: of each MCM, float64 ``[N]``.
    """

    values: Mapping[str, np.ndarray]
    strengths: Mapping[str, np.ndarray]
    windows: Mapping[str, np.ndarray]
    weights: Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Places:
    """What is given for places of pictures and latents.

    Attributes:
      mask: float32 ``[N, h, w, 1]`` in [0, 1].
      known: bool ``[N, h, w, 1]``: latents all of whose pixels stay.
      image: float32 ``[N, H, W, 3]`` in [-1, 1], or None.
      latents: float32 ``[N, h, w, C]``, or None.
    """

    mask: np.ndarray
    known: np.ndarray
    image: np.ndarray | None
    latents: np.ndarray | None


class Rows:
    """Rows of a few distinct arrays, not copied before they are asked for."""

    def __init__(self, distinct: np.ndarray, which: np.ndarray):
        self._distinct, self._which = distinct, which

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._distinct[self._which[rows]]


def settings_of_each(settings: SamplingSettings, count: int, changes: Mapping[str, Any]) -> list[SamplingSettings]:
    """The settings of each sample; those of :data:`PER_SAMPLE` may come as ``count`` values.

    Raises:
      UserError: an unknown field, another number of values, or one out of range.
    """

    def is_many(key: str, value: Any) -> bool:
        depth = 1 if key == "guidance_schedule" else 0
        return key in PER_SAMPLE and not isinstance(value, str) and _depth(value) > depth

    changes = {k: np.asarray(v).tolist() if isinstance(v, np.ndarray | jax.Array) else v for k, v in changes.items()}
    own = {k: list(v) for k, v in changes.items() if is_many(k, v)}
    if odd := [k for k, v in own.items() if len(v) != count]:
        raise UserError(f"{odd[0]}: expected {count} values, one a sample, or one for all, got {len(own[odd[0]])}")
    settings = settings.but(**{k: v for k, v in changes.items() if k not in own})
    if not own:
        return [settings] * count
    return [settings.but(**dict(zip(own, row, strict=True))) for row in zip(*own.values(), strict=True)]


def _depth(value: Any) -> int:
    """How deep lists are nested; ragged ones, too."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list | tuple) else 0


def _of_each(key: str, value: Any, count: int) -> np.ndarray:
    """One number for all samples, or one of each: ``[count]``. Raises UserError where they are others, or below 0."""
    found = np.asarray(value, np.float64)
    expect(found.shape in ((), (count,)), key, f"one value, or {count}, one a sample", value)
    expect(np.all((found >= 0) & np.isfinite(found)), key, "at least 0", value)
    return np.broadcast_to(found, count)


def check_shown(conditions: Collection[str], **given: Mapping[str, Any] | None) -> None:
    """Raises UserError where something is given of a modality that has no condition: it would do nothing."""
    for key, values in given.items():
        if idle := sorted((values or {}).keys() - set(conditions)):
            raise UserError(f"{key}: given of {', '.join(idle)}, of which there is no condition")


def check_text(base: Base, given: Mapping[str, Any], prefix: str = "") -> None:
    """Raises UserError where settings of text are given (None is not) and the base has none."""
    found = [prefix + k for k in OF_TEXT if given.get(k) is not None]
    if found and not base.is_text_conditional:
        raise UserError(
            f"{', '.join(found)}: the base {base.name!r} is unconditional, it has no text encoder; "
            f"take an MCM of a text-conditional one, e.g. --workdir=scenes-sd-mcm"
        )


def read_conditions(
    count: int,
    grid: tuple[int, int],
    modalities: Sequence[Modality],
    mcms: Sequence[str],
    conditions: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray] | None,
    strength: Mapping[str, np.ndarray | float] | None,
    window: Mapping[str, np.ndarray | Sequence[float]] | None,
    weights: Sequence[np.ndarray | float] | None,
) -> Conditions:
    """Conditions and what goes with them, see :meth:`mcm_jax.pipeline.Pipeline.__call__`.

    Args:
      count: N.
      grid: height and width of conditions.
      modalities: that there are.
      mcms: names of the MCMs.
      conditions: and the others: as they are given.

    Raises:
      UserError: a modality that is none of these, another shape, or a value out of range.
    """
    present, strength, window = present or {}, strength or {}, window or {}
    if unknown := {*conditions, *present, *strength, *window} - {m.name for m in modalities}:
        names = ", ".join(m.name for m in modalities)
        raise UserError(f"this MCM knows the modalities {names}, got {', '.join(sorted(unknown))}")
    check_shown(conditions, present=present, strength=strength, window=window)
    values, strengths, windows = {}, {}, {}
    for modality in modalities:
        name, value = modality.name, conditions.get(modality.name)
        strengths[name] = np.zeros(count)
        if value is not None:
            value, wanted = np.asarray(value), modality.null(count, *grid).shape
            if value.shape not in (wanted, (*wanted, 1)):
                raise UserError(f"{name}: expected shape {list(wanted)}, got {list(value.shape)}")
            value = value.reshape(wanted)
            modality.check(value.reshape(-1, *wanted[2:]), name)  # all of them as one high picture
            shown = _of_each(f"presence of {name}", present.get(name, True), count)
            strengths[name] = _of_each(f"strength of {name}", strength.get(name, 1.0), count) * (shown > 0)
        value = modality.null(count, *grid) if value is None else value
        # Each dtype would compile anew, and maps of uint8 mean value * 255 to what resizes them.
        values[name] = value.astype(np.float32 if modality.continuous else np.int32, copy=False)
        bounds = np.asarray(window.get(name, (0, 1)), np.float32)
        fits = bounds.shape in ((2,), (count, 2)) and np.all((bounds >= 0) & (bounds <= 1))
        rising = fits and np.all(bounds[..., :1] <= bounds[..., 1:])
        expect(rising, f"window of {name}", "two shares of the steps, rising, in [0, 1]", window.get(name))
        windows[name] = np.broadcast_to(bounds, (count, 2))
    weights = [1.0] * len(mcms) if weights is None else list(weights)
    expect(len(weights) == len(mcms), "weights", f"{len(mcms)}, one an MCM ({', '.join(mcms)})", len(weights))
    return Conditions(values, strengths, windows, [_of_each("weights", w, count) for w in weights])


def read_places(base: Base, count: int, **given: np.ndarray | None) -> Places:
    """What is given for places, checked and brought to float32.

    Args:
      base: of the size that is sampled.
      count: N.
      given: ``mask``, ``image``, ``inpaint``, ``latents``, see :meth:`mcm_jax.pipeline.Pipeline.__call__`.

    Raises:
      UserError: another shape, a value out of range, or something to paint without a picture.
    """
    grid, size = (count, *base.latent_shape[:2]), (count, *base.image_shape[:2])
    wanted = {"mask": grid, "image": (*size, 3), "inpaint": size, "latents": (count, *base.latent_shape)}
    for name, value in given.items():
        shape = wanted[name]
        expect(value is None or np.shape(value) == shape, name, f"of shape {list(shape)}", list(np.shape(value)))
    mask, image, inpaint, latents = (given[name] for name in wanted)
    mask = np.ones(grid, np.float32) if mask is None else np.asarray(mask, np.float32)
    expect(np.all((mask >= 0) & (mask <= 1)), "mask", "in [0, 1]", f"{mask.min():g}..{mask.max():g}")
    known = np.zeros(grid, bool)
    if inpaint is not None:
        expect(image is not None, "image", "the picture that is painted anew in part", None)
        anew = np.asarray(inpaint, bool)
        known = ~anew.reshape(count, grid[1], base.factor, grid[2], base.factor).any((2, 4))
    if image is not None:
        image = np.asarray(image, np.float32)
        expect(np.all(np.abs(image) <= 1), "image", "in [-1, 1]", f"{image.min():g}..{image.max():g}")
    latents = None if latents is None else np.asarray(latents, np.float32)
    return Places(mask[..., None], known[..., None], image, latents)


def read_texts(
    base: Base,
    count: int,
    prompts: Sequence[str] | None,
    negatives: Sequence[str] | None,
    context: np.ndarray | None,
    negative_context: np.ndarray | None,
) -> tuple[Rows | np.ndarray | None, Rows | np.ndarray | None]:
    """What a base is told of each sample: something that gives rows of contexts ``[N, L, D]``.

    Args:
      base: which embeds the texts.
      count: N.
      prompts: N texts; None is the empty one for each.
      negatives: N texts; None where there is no text guidance.
      context: in place of prompts.
      negative_context: in place of negatives.

    Returns:
      Of the prompts, None for an unconditional base; of the negative ones, None where there is no text guidance.

    Raises:
      UserError: a text for an unconditional base, no text, or another number or shape.
    """
    lengths = set()
    for name, value, asked in (
        ("context", context, True),
        ("negative_context", negative_context, negatives is not None),
    ):
        if value is not None:
            expect(base.is_text_conditional, name, f"none: the base {base.name!r} is unconditional", "one")
            shape, width = np.shape(value), base.text_encoder.config.hidden_size
            fits = len(shape) == 3 and (shape[0], shape[2]) == (count, width)
            expect(fits, name, f"of shape [{count}, L, {width}]", list(shape))
            if not asked:
                raise UserError(f"{name}: does nothing at text_guidance=1; set another text_guidance, or leave it out")
        if base.is_text_conditional and asked:
            lengths.add(base.tokenizer.length if value is None else np.shape(value)[1])
    if len(lengths) > 1:
        raise UserError(f"context and negative_context must be of one length, got {sorted(lengths)}; give both")
    if context is not None and prompts is not None:
        raise UserError("prompts and context are the same thing twice; give one of them")
    if not base.is_text_conditional:
        if prompts is not None:
            raise UserError(f"prompts: the base {base.name!r} is unconditional, it has no text encoder")
        return None, None
    prompts = [""] * count if prompts is None else list(prompts)
    if len(prompts) != count:
        raise UserError(f"prompts: expected {count}, one a sample, got {len(prompts)}")
    if odd := [p for p in prompts if not is_text(p)]:
        raise UserError(f"prompts: expected texts, got {odd[0]!r} ({type(odd[0]).__name__})")
    cut: dict[str, str] = {}
    embed = functools.cache(lambda text: np.asarray(base.embed_text(base.params, [text], cut)))

    def rows(texts: Sequence[str], given: np.ndarray | None) -> Rows | np.ndarray:
        if given is not None:
            return np.asarray(given, np.float32)
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return Rows(np.concatenate([embed(text) for text in places]), np.array([places[text] for text in texts]))

    positive = rows(prompts, context)
    negative = None if negatives is None else rows(negatives, negative_context)
    cuts = Cuts()
    cuts.add(filter(None, dict.fromkeys([*prompts, *(negatives or ())])), cut)  # nobody wrote the empty prompt
    cuts.warn(stacklevel=4)
    return positive, negative
