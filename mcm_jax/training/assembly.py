"""A training run put together: settings and workdir in; base or card, feed, modulator, optimizer and actions out."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np

from mcm_jax import config as config_lib
from mcm_jax import sharding
from mcm_jax.base import Base, BaseCard
from mcm_jax.data.inputs import prepare
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import check_writable
from mcm_jax.mcm import Modulator, parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.training import feed as feeds
from mcm_jax.training import state as states
from mcm_jax.training import step
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.actions import Checkpoint, Report, ValidationPictures
from mcm_jax.training.caching import build_cache, known_card, open_cache
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.feed import Feed
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Action, train
from mcm_jax.training.settings import RunSettings

_VALIDATION_IMAGES = 8
_OFTEN = 25  # times that training may see one draw before control suffers: docs/cache.md, "How many draws"


def train_and_evaluate(config: Any, workdir: str | os.PathLike) -> states.TrainState:
    """Trains an MCM; goes on where the workdir's newest checkpoint ends.

    Args:
      config: as configs/default.py has it.
      workdir: gets ``config.json``, ``checkpoints/``, ``mcm.safetensors`` (what samples), ``metrics.jsonl``,
        ``tensorboard/`` and ``validation/``. One that holds another run's config is refused.

    Returns:
      The final state.

    Raises:
      UserError: bad input, see its message; nothing of the workdir is changed.
      Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    settings, workdir = config_lib.read(RunSettings, config), pathlib.Path(workdir)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(settings.train.batch_size, mesh)
    workdirs.refuse_another(settings, workdir)
    finished = max(workdirs.saved_steps(workdir), default=0) >= settings.train.steps
    parts = assemble(settings, workdir, mesh, finished)
    with workdirs.disk_errors(workdir):
        if not (workdir / config_lib.FILE).exists():
            config_lib.save(settings, workdir)
        return _run(settings, workdir, parts, mesh)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
      card: what is known of the base.
      modulator: the MCM for it.
      feed: of records; None for a finished run.
      pipeline: for pictures; None where there shall be none, or the base is not there.
      examples: held-out ones for pictures, stacked, 8 bits a value.
    """

    card: BaseCard
    modulator: Modulator
    feed: Feed | None = None
    pipeline: Pipeline | None = None
    examples: dict[str, np.ndarray] | None = None


def assemble(settings: RunSettings, workdir: pathlib.Path, mesh: jax.sharding.Mesh, finished: bool = False) -> Parts:
    """Finds, loads and checks all that a run needs. Of the workdir, only a cache in it is written.

    Raises:
      UserError: bad input, or parts that do not fit each other.
    """
    cache, base = settings.cache, None
    fit = functools.partial(fitting_modulator, settings)
    opened = None
    if cache.mode == "off":
        base = settings.base.load()
        card = base.card
    elif finished:
        card = known_card(settings, workdir)
    else:
        open_it = functools.partial(build_cache, verify=cache.verify) if cache.mode == "build" else open_cache
        opened = open_it(settings, workdir, fit)
        card = opened.card
    modulator = fit(card)
    check_writable(workdir, "--workdir")
    if finished:
        return Parts(card, modulator)
    # What is wrong with the data leaves no workdir.
    if opened and settings.train.validate_every:
        if cache.load_base:
            base = _base_for_pictures(settings, modulator)
        else:
            print("validation pictures are left to sample.py: config.cache.load_base would load the base for them")
    if base:
        base = dataclasses.replace(base, params=sharding.replicate(base.params, mesh))
    pipeline, examples = None, None
    if base and settings.train.validate_every:
        pipeline = Pipeline(base, modulator, None, settings.sampling)
        examples = _validation_examples(settings, card, modulator)
    if opened:
        print(f"training from the cache {opened.folder}")
        return Parts(card, modulator, feeds.cached(opened), pipeline, examples)
    source = settings.data.open("train", modulator.modalities, card)
    inputs = prepare(base, source, modulator.modalities, mesh)
    data = settings.data.find("train", modulator.modalities, card).fingerprints()
    draws = settings.draws_for(card)
    feed = feeds.online(base, inputs, draws, settings.data.views, data, mesh)
    return Parts(card, modulator, feed, pipeline, examples)


def fitting_modulator(settings: RunSettings, card: BaseCard) -> Modulator:
    """The MCM for a base; raises UserError where the base, the MCM or the sampling's settings do not fit."""
    height, width, channels = card.image_shape
    if channels != 3 or min(height, width) < 8:
        raise UserError(
            f"base {card.name!r} makes images of {height}x{width}x{channels}; training has RGB images of at least 8x8"
        )
    settings.sampling.check_for(card.schedule)
    modulator = settings.mcm.modulator(settings.modalities.shown, card.schedule)
    jax.eval_shape(lambda: modulator.init(jax.random.key(0), card.latent_shape))  # refuses what does not fit the base
    return modulator


def _validation_examples(settings: RunSettings, card: BaseCard, modulator: Modulator) -> dict[str, np.ndarray]:
    """Some held-out examples, stacked; of a folder without a test split, training examples."""
    split = "test" if settings.data.has_test_split() else "train"
    source = settings.data.open(split, modulator.modalities, card, size=_VALIDATION_IMAGES)
    examples = [source[i % len(source)] for i in range(_VALIDATION_IMAGES)]
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _base_for_pictures(settings: RunSettings, modulator: Modulator) -> Base | None:
    """The base, beside a training that does without it; None, and a word on why, where it does not fit."""
    shapes = Pipeline(settings.base.outline(), modulator, None, settings.sampling)
    needed, free = shapes.sampling_bytes(_VALIDATION_IMAGES), sharding.free_memory()
    if free is not None and needed > free:
        print(
            f"validation pictures are left to sample.py: the base and its sampling need {needed / 2**30:.1f} GiB of "
            f"memory, {free / 2**30:.1f} GiB are free (config.cache.load_base)"
        )
        return None
    return settings.base.load()


def _run(settings: RunSettings, workdir: pathlib.Path, parts: Parts, mesh: jax.sharding.Mesh) -> states.TrainState:
    """The run itself, in a workdir that is its own."""
    train_, card, modulator, feed = settings.train, parts.card, parts.modulator, parts.feed
    meta = {"base": card.name, "fingerprint": card.fingerprint, "config": config_lib.to_dict(settings)}
    meta["examples"] = feed and feed.data
    optimizer, learning_rate = states.make_optimizer(
        train_.steps, train_.learning_rate, train_.warmup_steps, train_.weight_decay, train_.clip_norm
    )
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    # One program: made by many small ones, the state takes seconds to begin with.
    begin = jax.jit(lambda key: states.init_state(modulator.init(key, card.latent_shape), optimizer))
    now = sharding.replicate(begin(key), mesh)
    checkpoints = Checkpoints(workdir, train_.keep)
    pending = {}
    if checkpoints.latest_step() is not None:
        now, found = checkpoints.restore(now, meta)
        pending = {key: found[key] for key in ("reported", "sums")}
    first, size = int(now.step), parameter_count(now.params)
    share = size / card.unet_parameters
    print(f"MCM of {size:,} parameters ({share:.1%} of the U-Net of {card.name!r}), on {mesh.size} device(s)")
    if feed is None or first >= train_.steps:
        print(f"{workdir} is finished: {first} of {train_.steps} steps are done")
        checkpoints.close()
        return now
    if first:
        print(f"going on from step {first}")
    if feed.repeat and (times := train_.steps * train_.batch_size / (feed.examples * feed.repeat)) >= _OFTEN:
        print(
            f"training will see each cached draw {times:.0f} times and overfit to it: more draws an example "
            f"(config.draws.count, now {feed.repeat}) give better control (docs/cache.md)"
        )

    draws = settings.draws_for(card)
    noise_step = step.make_noise_step(modulator, draws, seed=settings.seed, drop_rate=settings.modalities.drop_rate)
    steps = range(first, train_.steps)
    records = feed.records(noise_step, batch_size=train_.batch_size, seed=settings.seed, steps=steps, mesh=mesh)
    train_step = step.make_train_step(
        modulator, optimizer, weighting=settings.loss.weighting, l1=settings.loss.l1, ema_decay=train_.ema_decay
    )
    log = Log(workdir, first)
    report = Report(log, every=train_.log_every, batch_size=train_.batch_size, learning_rate=learning_rate, **pending)
    actions: list[Action] = [
        report,
        Checkpoint(workdir, checkpoints, every=train_.checkpoint_every, report=report, card=card, meta=meta),
    ]
    if parts.pipeline:
        folder = workdir / "validation"
        actions.append(
            ValidationPictures(folder, every=train_.validate_every, pipeline=parts.pipeline, examples=parts.examples)
        )
    try:
        return train(now, train_step, records, steps, actions)
    except Interrupted as e:
        raise Interrupted(f"{e}; the state is saved in {workdir}. Go on with the same command") from None
    finally:
        log.close()
        checkpoints.close()
