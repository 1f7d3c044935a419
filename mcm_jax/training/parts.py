"""The parts of a training run, out of settings and workdir: base or card, data, feeds, modulator, what is sampled."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mcm_jax import distributed, sharding
from mcm_jax.base import Base, BaseCard
from mcm_jax.cache import Cache, store
from mcm_jax.data import DataSettings
from mcm_jax.data.inputs import Inputs, Streamed, prepare, prepared_bytes
from mcm_jax.data.pipeline import InMemory
from mcm_jax.errors import UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, judges_of
from mcm_jax.files import check_writable
from mcm_jax.mcm import Modulator
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import Trained, start_from
from mcm_jax.training import feed as feeds
from mcm_jax.training.actions import HeldOutLoss
from mcm_jax.training.caching import build_cache, held_out_folder, known_card, open_cache, open_held_out
from mcm_jax.training.feed import Feed
from mcm_jax.training.settings import RunSettings

_VALIDATION_IMAGES = 8
_IN_MEMORY = 2**32  # bytes of prepared examples, beyond which they are streamed


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
      card: what is known of the base.
      modulator: the MCM for it.
      feed: of records; None for a finished run.
      held_out: of held-out examples; None where they are not evaluated.
      pipeline: base and MCM, for what is sampled while training; None where nothing is, or the base is not there.
      examples: held-out ones for pictures, stacked, 8 bits a value.
      control: held-out examples, and what judges samples for them; None where control is not measured.
    """

    card: BaseCard
    modulator: Modulator
    feed: Feed | None = None
    held_out: Feed | None = None
    pipeline: Pipeline | None = None
    examples: dict[str, np.ndarray] | None = None
    control: tuple[HeldOut, list[Judge]] | None = None


def assemble(
    settings: RunSettings,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    finished: bool = False,
    begun: bool = False,
) -> Parts:
    """Finds, loads and checks all that a run needs. Of the workdir, only a cache in it is written.

    Args:
      settings: of the run.
      workdir: of the run.
      mesh: of its devices.
      finished: whether all its steps are done, so that it needs neither data nor base.
      begun: whether some are: ``train.init_from`` is not looked at.

    Raises:
      UserError: bad input, or parts that do not fit each other; what can be known beforehand, before a cache is built.
    """
    cache, base, opened = settings.cache, None, None
    control: list[Any] = []  # found once

    def fit(card: BaseCard) -> Modulator:
        modulator = fitting_modulator(settings, card)
        if finished:
            return modulator
        if settings.train.init_from and not begun:
            start_from(settings.train.init_from, settings.mcm, modulator, card)
        if settings.train.evaluate_every and not control and (cache.mode == "off" or cache.load_base):
            control.append(_control(settings, card, modulator))
        if settings.train.best:
            kept = cache.mode != "off" and (held_out_folder(settings, workdir) / store.MANIFEST).is_file()
            check_best(settings, kept or settings.data.has_test_split(), *control)
        return modulator

    if cache.mode == "off":
        base = settings.base.load(mesh)
        card = base.card
    elif finished:
        card = known_card(settings, workdir)
    else:
        open_it = functools.partial(build_cache, verify=cache.verify) if cache.mode == "build" else open_cache
        opened = open_it(settings, workdir, fit)
        card = opened.card
    modulator = fit(card)
    if distributed.is_first():
        check_writable(workdir, "--workdir")
    if finished:
        return Parts(card, modulator)
    # What is wrong with the data leaves no workdir.
    shown, sampling = control[0] if control else None, settings.sampling.but(height=0, width=0)
    if opened and _samples(settings):
        if cache.load_base and (shown or settings.train.validate_every):
            count = len(shown[0]) if shown else 0
            base, sampling = _base_for_pictures(settings, modulator, mesh, sampling, count)
        elif not cache.load_base:
            print(
                "validation pictures and control are left to sample.py and evaluate.py: config.cache.load_base would "
                "load the base for them"
            )
    more: dict[str, Any] = {}
    if base and _samples(settings):
        more["pipeline"] = Pipeline(base, Trained(modulator), sampling, mesh)
        more["examples"] = _validation_examples(settings, card, modulator) if settings.train.validate_every else None
        more["control"] = shown
    if opened:
        print(f"training from the cache {opened.folder}")
        feed = dataclasses.replace(feeds.cached(opened), names=_names(settings, card))
        return Parts(card, modulator, feed, _held_out_cache(settings, workdir), **more)
    feed = _online(settings, base, modulator, "train", mesh)
    held_out = None
    if settings.train.evaluate_every:
        if settings.data.has_test_split():
            held_out = _online(settings.held_out(), base, modulator, "test", mesh)
        else:
            print(f"the held-out loss is left out: {settings.data.path} has no test split")
    return Parts(card, modulator, feed, held_out, **more)


def check_best(settings: RunSettings, has_held_out: bool, control: tuple[HeldOut, list[Judge]] | None = None) -> None:
    """Raises UserError where what shall be best is not measured."""
    known = list(HeldOutLoss.names) if has_held_out else []
    known += [name for judge in (control or (None, []))[1] for name in judge.watched]
    if settings.train.best and settings.train.best not in known:
        raise UserError(
            f"config.train.best={settings.train.best!r}: not measured while training; known here are "
            f"{', '.join(known) or 'none'} (held_out_loss and held_out_mse need a test split, whose predictions "
            f"precompute.py makes for a cache; the others judges and the base: config.cache.load_base)"
        )


def _samples(settings: RunSettings) -> bool:
    """Whether anything is sampled while training."""
    return bool(settings.train.validate_every or settings.train.evaluate_every)


def _online(settings: RunSettings, base: Base, modulator: Modulator, split: str, mesh: jax.sharding.Mesh) -> Feed:
    """Predictions by the base."""
    size = settings.data.size if split == "test" else None
    found = settings.data.find(split, modulator.modalities, base.card, size=size)
    data = settings.data.fingerprints(found)
    # Before they compute together: another number of examples would be another number of steps to wait for.
    distributed.agree({"the base": base.card.fingerprint, **{f"the data's {k}": v for k, v in data.items()}})
    source = settings.data.open(split, modulator.modalities, base.card, size=size)
    inputs = _inputs(settings.data, base, source, modulator, mesh)
    return feeds.online(
        base,
        inputs,
        settings.draws_for(base.card),
        settings.data.views,
        data,
        mesh,
        accumulate=settings.train.accumulate,
        names=getattr(found, "names", ()),
        skipped=getattr(source, "skipped", ()),
    )


def _inputs(
    data: DataSettings, base: Base, source: Sequence[dict], modulator: Modulator, mesh: jax.sharding.Mesh
) -> Inputs | Streamed:
    """The examples, prepared or streamed: all processes decide alike, by settings and sizes."""
    grid = modulator.grid(base)
    if data.stream == "auto" and not isinstance(source, InMemory):
        size = prepared_bytes(base, source, modulator.modalities, grid, data.views)
        if size > _IN_MEMORY and base.is_text_conditional and jax.process_count() > 1:
            print(
                f"{len(source):,} examples with their prompts may take {size / 2**30:.1f} GiB of memory in each "
                f"process, and several processes do not read prompts for each batch; a cache needs neither "
                f"(config.cache.mode)"
            )
        elif size > _IN_MEMORY:
            print(
                f"{len(source):,} examples would take {size / 2**30:.1f} GiB of memory, so they are read for each "
                f"batch (config.data.stream)" + "; a cache encodes them but once (config.cache.mode)" * base.is_latent
            )
            return Streamed(base, source, modulator.modalities, mesh, grid)
    return (Streamed if data.stream == "on" else prepare)(base, source, modulator.modalities, mesh, grid)


def _names(settings: RunSettings, card: BaseCard) -> Sequence[str]:
    """Of the training examples, where they are files that are at hand: a cache, checked against them, has none."""
    if not settings.data.is_at_hand("train"):
        return ()
    return getattr(settings.data.find("train", settings.modalities.shown, card), "names", ())


def _held_out_cache(settings: RunSettings, workdir: pathlib.Path) -> Feed | None:
    opened: Cache | None = open_held_out(settings, workdir) if settings.train.evaluate_every else None
    return feeds.cached(opened) if opened else None


def fitting_modulator(settings: RunSettings, card: BaseCard) -> Modulator:
    """The MCM for a base; raises UserError where the base, the MCM or the sampling's settings do not fit."""
    height, width, channels = card.image_shape
    if channels != 3 or min(height, width) < 8:
        raise UserError(
            f"base {card.name!r} makes images of {height}x{width}x{channels}; training has RGB images of at least 8x8"
        )
    settings.sampling.check_for(card.schedule)
    modulator = settings.mcm.modulator(settings.modalities.shown, card)
    shape, grid = card.latent_shape, modulator.grid(card)
    jax.eval_shape(lambda: modulator.init(jax.random.key(0), shape, grid))  # refuses what does not fit the base
    return modulator


def _validation_examples(settings: RunSettings, card: BaseCard, modulator: Modulator) -> dict[str, np.ndarray]:
    """Some held-out examples, stacked; of a folder without a test split, training examples."""
    has_test = settings.data.has_test_split()
    # Of a training split all, of which a share may be unreadable, and each as it is.
    data, size = (settings.data, _VALIDATION_IMAGES) if has_test else (settings.data.without_views(), None)
    source = data.open("test" if has_test else "train", modulator.modalities, card, size=size)
    examples = [source[i % len(source)] for i in range(_VALIDATION_IMAGES)]
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _control(settings: RunSettings, card: BaseCard, modulator: Modulator) -> tuple[HeldOut, list[Judge]] | None:
    """What samples are judged by while training; None, and a word on why, where nothing can by itself.

    A judge that the config names and that cannot be had is a mistake, and ends the run before it begins.
    """
    held_out = None
    try:
        held_out = HeldOut(settings.data, card, modulator.modalities, settings.train.held_out)
        return held_out, judges_of(held_out, settings.evaluation.judges)
    except UserError as e:
        if held_out is not None and any(settings.evaluation.judges.values()):
            raise
        print(f"control is not measured while training: {e}")
        return None


def _base_for_pictures(
    settings: RunSettings, modulator: Modulator, mesh: jax.sharding.Mesh, sampling: SamplingSettings, judged: int
) -> tuple[Base | None, SamplingSettings]:
    """The base, beside a training that does without it, and what samples: as many at a time as the devices hold.

    All processes of a cluster have it or none, None with a word on why: they sample together. `judged` are the examples
    that control is measured on.
    """
    print("compiling the sampler of what is drawn while training, to know its memory: it may take a minute", flush=True)
    shapes = Pipeline(settings.base.outline(), Trained(modulator), sampling, mesh)
    few = min(_VALIDATION_IMAGES, sampling.batch_size)
    many = min(max(judged, _VALIDATION_IMAGES * bool(settings.train.validate_every)), sampling.batch_size)
    for count in dict.fromkeys((many, min(few, many))):
        needed, free = shapes.sampling_bytes(count), sharding.free_memory()
        known = [bytes_ for bytes_ in distributed.everyones(free).values() if bytes_ is not None]
        if not known or needed <= min(known):
            return settings.base.load(mesh), sampling.but(batch_size=count)
    print(
        f"validation pictures and control are left to sample.py and evaluate.py: the base and its sampling, {count} at "
        f"a time, need {needed / 2**30:.1f} GiB of memory on each device, {min(known) / 2**30:.1f} GiB are free "
        f"(config.cache.load_base, config.sampling.batch_size)"
    )
    return None, sampling
