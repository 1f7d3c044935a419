"""The training run: config and workdir in, checkpoints, metrics and pictures out."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from mcm_jax import assets, pictures, sampling, sharding
from mcm_jax import base as base_lib
from mcm_jax import config as config_lib
from mcm_jax.base import Base, BaseCard, load_base
from mcm_jax.data import open_source
from mcm_jax.data.inputs import prepare
from mcm_jax.data.pipeline import to_float
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.mcm import Modulator, parameter_count
from mcm_jax.pipeline import Pipeline, save_mcm
from mcm_jax.training import feed as feeds
from mcm_jax.training import state, step
from mcm_jax.training.caching import known_card, open_cache, precompute, source_of
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.feed import Feed
from mcm_jax.training.optimizer import make_optimizer, make_schedule

_VALIDATION_IMAGES = 8
_OFTEN = 25  # times that training may see one draw before control suffers: docs/cache.md, "How many draws"


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs, so that a step is never torn; a second SIGINT interrupts."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's
        previous = {}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log:
    """One JSON line and one TensorBoard event a report. Lines after the resumed step are dropped: they come again."""

    def __init__(self, workdir: pathlib.Path, resumed_step: int):
        # Slow to import. SummaryWriter would write in a thread of its own, which dies on a full disk: the run hangs.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= resumed_step]
            write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        events = workdir / "tensorboard" / "events"
        events.parent.mkdir(exist_ok=True)
        self._events = EventsWriter(str(events), filename_suffix=f".{resumed_step}")
        if resumed_step:  # TensorBoard hides what older files have from this step on
            again = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=resumed_step + 1, session_log=again))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for key, value in metrics.items():
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar(key, value)))
        self._events.flush()

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when it was written to
            self._events.close()


def _diverged(loss: float, step: int) -> UserError:
    return UserError(
        f"the loss is {loss} at step {step}; lower train.learning_rate or set train.clip_norm, and train in another "
        f"workdir"
    )


def _open(data: ml_collections.ConfigDict, split: str, base: Base, modulator: Modulator, **size: int) -> Sequence[dict]:
    captions = base.is_text_conditional
    return open_source(data, split, modulator.modalities, *base.image_shape[:2], captions=captions, **size)


def _validation_examples(data: ml_collections.ConfigDict, base: Base, modulator: Modulator) -> dict[str, np.ndarray]:
    """Some held-out examples, stacked; of a folder without a test split, training examples."""
    held_out = data.name != "folder" or (pathlib.Path(data.path) / "test").is_dir()
    source = _open(data, "test" if held_out else "train", base, modulator, size=_VALIDATION_IMAGES)
    examples = [source[i % len(source)] for i in range(_VALIDATION_IMAGES)]
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _validation_pictures(pipeline: Pipeline, modulator: Modulator, examples: dict[str, np.ndarray]) -> np.ndarray:
    height, width, _ = pipeline.base.latent_shape
    conditions = {m.name: m.resize_all(examples[m.name], height, width) for m in modulator.modalities}
    prompts = list(map(str, examples["caption"])) if pipeline.base.is_text_conditional else None
    keys = sampling.sample_keys(0, _VALIDATION_IMAGES)
    rows = [pictures.show(m, examples[m.name]) for m in modulator.modalities]
    alone = pipeline(conditions, keys, prompts=prompts, guidance=0.0, batch_size=_VALIDATION_IMAGES)
    controlled = pipeline(conditions, keys, prompts=prompts, batch_size=_VALIDATION_IMAGES)
    return pictures.grid([*rows, pictures.to_uint8(alone), pictures.to_uint8(controlled)])


def _is_disk_error(e: BaseException | None) -> bool:
    """Whether an exception is, or was caused by, a failed write (Orbax and TensorStore wrap them)."""
    while e is not None:
        if isinstance(e, OSError) or any(code in str(e) for code in ("Errno", "errno", "os_error_code")):
            return True
        e = e.__cause__ or e.__context__
    return False


def _saved_steps(workdir: pathlib.Path) -> list[int]:
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


@contextmanager
def _disk_errors(workdir: pathlib.Path) -> Iterator[None]:
    """Turns a failed write into one message that says what is safe; any other exception is a bug and passes."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as e:
        if not _is_disk_error(e) or isinstance(e, BrokenPipeError):
            raise
        steps = _saved_steps(workdir)
        safe = f"The last complete one is of step {max(steps)}" if steps else "There is no complete checkpoint yet"
        raise UserError(
            f"workdir {workdir}: a checkpoint or report could not be written ({e}). {safe}. Free space there and run "
            f"the same command again"
        ) from e


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> state.TrainState:
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
    config_lib.check(config)
    workdir = pathlib.Path(workdir)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, mesh)
    config_lib.refuse_another(config, workdir)
    base, cache, feed, validation = None, None, None, {}
    finished = max(_saved_steps(workdir), default=0) >= config.train.steps
    if config.cache.mode == "off":
        base = load_base(assets.resolve_base(config.base.path), config.base.dtype)
        card = base.card
    elif finished:
        card = known_card(config, workdir)
    else:
        check = functools.partial(_modulator, config)
        if config.cache.mode == "build":
            cache = precompute(config, workdir, check, verify=config.cache.verify)
        else:
            cache = open_cache(config, workdir, check)
        card = cache.card
    modulator = _modulator(config, card)
    check_writable(workdir, "--workdir")
    if not finished:  # what is wrong with the data leaves no workdir
        if cache and config.train.validate_every:
            if config.cache.load_base:
                base = _base_for_pictures(config, modulator)
            else:
                print("validation pictures are left to sample.py: config.cache.load_base would load the base for them")
        if base:
            base = dataclasses.replace(base, params=sharding.replicate(base.params, mesh))
        if base and config.train.validate_every:
            validation = _validation_examples(config.data, base, modulator)
        if cache:
            print(f"training from the cache {cache.folder}")
            feed = feeds.cached(cache)
        else:
            source = _open(config.data, "train", base, modulator)
            inputs = prepare(base, source, modulator.modalities, mesh)
            data = source_of(config, card).fingerprints()
            feed = feeds.online(base, inputs, config_lib.draws(config, card), config.data.views, data, mesh)
    with _disk_errors(workdir):
        config_lib.save(config, workdir)
        return _train(config, workdir, base, card, modulator, mesh, feed, validation)


def _modulator(config: ml_collections.ConfigDict, card: BaseCard) -> Modulator:
    """The MCM for a base; raises UserError where the base, the MCM or the sampling's settings do not fit."""
    height, width, channels = card.image_shape
    if channels != 3 or min(height, width) < 8:
        raise UserError(
            f"base {card.name!r} makes images of {height}x{width}x{channels}; training has RGB images of at least 8x8"
        )
    settings = config.sampling
    sampling.check_settings(
        card.schedule,
        guidance=settings.guidance,
        text_guidance=settings.text_guidance,
        steps=settings.steps,
        eta=settings.eta,
    )
    modulator = config_lib.modulator(config, card)
    jax.eval_shape(lambda: modulator.init(jax.random.key(0), card.latent_shape))  # refuses what does not fit the base
    return modulator


def _base_for_pictures(config: ml_collections.ConfigDict, modulator: Modulator) -> Base | None:
    """The base, beside a training that does without it; None, and a word on why, where it does not fit."""
    path = assets.resolve_base(config.base.path)
    outline = base_lib.outline(path, config.base.dtype)
    needed = Pipeline(outline, modulator, None, config).sampling_bytes(_VALIDATION_IMAGES)
    free = sharding.free_memory()
    if free is not None and needed > free:
        print(
            f"validation pictures are left to sample.py: the base and its sampling need {needed / 2**30:.1f} GiB of "
            f"memory, {free / 2**30:.1f} GiB are free (config.cache.load_base)"
        )
        return None
    return load_base(path, config.base.dtype)


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    base: Base | None,
    card: BaseCard,
    modulator: Modulator,
    mesh: jax.sharding.Mesh,
    feed: Feed | None,
    validation: dict[str, np.ndarray],
) -> state.TrainState:
    """The run itself, in a workdir that is its own. A finished one needs no feed; pictures need the base."""
    train = config.train
    meta = {"base": card.name, "fingerprint": card.fingerprint, "config": json.loads(config.to_json())}
    meta["examples"] = feed and feed.data
    schedule = make_schedule(
        "cosine",
        steps=train.steps,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=0,
    )
    optimizer = make_optimizer("adamw", schedule, weight_decay=train.weight_decay, clip_norm=train.clip_norm)
    learning_rate = jax.jit(schedule)  # for the reports; the optimizer has it within the step's own program
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    # One program: made by many small ones, the state takes seconds to begin with.
    begin = jax.jit(lambda key: state.init_state(modulator.init(key, card.latent_shape), optimizer))
    now = sharding.replicate(begin(key), mesh)
    checkpoints = Checkpoints(workdir, train.keep)
    reported, sums = 0, None  # the last reported step, and the metrics' sums since then
    if checkpoints.latest_step() is not None:
        now, found = checkpoints.restore(now, meta)
        reported, sums = found["reported"], found["sums"] and {k: np.float32(v) for k, v in found["sums"].items()}
    first = int(now.step)
    size = parameter_count(now.params)
    share = size / card.unet_parameters
    print(f"MCM of {size:,} parameters ({share:.1%} of the U-Net of {card.name!r}), on {mesh.size} device(s)")
    if feed is None or first >= train.steps:
        print(f"{workdir} is finished: {first} of {train.steps} steps are done")
        checkpoints.close()
        return now
    if first:
        print(f"going on from step {first}")
    if feed.repeat and (times := train.steps * train.batch_size / (feed.examples * feed.repeat)) >= _OFTEN:
        print(
            f"training will see each cached draw {times:.0f} times and overfit to it: more draws an example "
            f"(config.draws.count, now {feed.repeat}) give better control (docs/cache.md)"
        )

    draws = config_lib.draws(config, card)
    noise_step = step.make_noise_step(modulator, draws, seed=config.seed, drop_rate=config.modalities.drop_rate)
    steps = range(first, train.steps)
    records = feed.records(noise_step, batch_size=train.batch_size, seed=config.seed, steps=steps, mesh=mesh)
    train_step = step.make_train_step(
        modulator, optimizer, weighting=config.loss.weighting, l1=config.loss.l1, ema_decay=train.ema_decay
    )
    pipeline = Pipeline(base, modulator, None, config) if validation else None
    log = _Log(workdir, first)

    def checkpoint() -> None:
        if sums is not None and not np.isfinite(float(sums["loss"])):
            raise _diverged(float(sums["loss"]), int(now.step))  # never over a good state
        pending = {"reported": reported, "sums": sums and {k: float(v) for k, v in sums.items()}}
        # The checkpoint comes last: a run that is killed between the two writes both again.
        save_mcm(workdir, now.ema_params, base=card, step=int(now.step))
        checkpoints.save(now, meta | pending)

    began, timed = time.perf_counter(), first
    try:
        with (
            _stop_requests() as stop,
            tqdm(total=train.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=1.0) as bar,
        ):
            for i, record in zip(steps, records, strict=True):
                now, metrics = train_step(now, record)
                sums = metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, metrics)
                bar.update()
                done = i + 1
                if done % train.log_every == 0 or done == train.steps:
                    means = {k: float(v) / (done - reported) for k, v in sums.items()}
                    rate = train.batch_size * (done - timed) / (time.perf_counter() - began)
                    if not np.isfinite(means["loss"]):
                        raise _diverged(means["loss"], done)
                    log.write(done, means | {"images_per_second": rate, "learning_rate": float(learning_rate(i))})
                    bar.set_postfix(loss=f"{means['loss']:.4f}", img_s=f"{rate:.0f}")
                    reported, sums = done, None
                    began, timed = time.perf_counter(), done
                stopping = bool(stop) and done < train.steps  # asked once: a later signal stops the next step
                if done % train.checkpoint_every == 0 or done == train.steps or stopping:
                    checkpoint()
                if pipeline and done % train.validate_every == 0:
                    pipeline.params = now.ema_params
                    examples = to_float(validation, [m.name for m in modulator.modalities if m.kind != "labels"])
                    sheet = _validation_pictures(pipeline, modulator, examples)
                    pictures.save_png(workdir / "validation" / f"step_{done:07d}.png", sheet)
                if reported == done:  # neither checkpoint nor pictures count as training time
                    began = time.perf_counter()
                if stopping:
                    raise Interrupted(
                        f"stopped by a signal at step {done} of {train.steps}; the state is saved in {workdir}. "
                        f"Go on with the same command"
                    )
    finally:
        log.close()
        checkpoints.close()
    return now
