"""A training run put together of its parts (:mod:`.parts`), optimizer and actions, and handed to the loop."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcm_jax import config as config_lib
from mcm_jax import distributed, sharding
from mcm_jax.data.pipeline import Order
from mcm_jax.data.unreadable import said
from mcm_jax.errors import Busy, Interrupted, UserError
from mcm_jax.files import lock
from mcm_jax.mcm import parameter_count
from mcm_jax.trained import start_from
from mcm_jax.training import state as states
from mcm_jax.training import step as steps_lib
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.actions import Checkpoint, Control, HeldOutLoss, Profile, Report, ValidationPictures
from mcm_jax.training.caching import agree_on
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.compiled import CompiledStep
from mcm_jax.training.feed import Feed
from mcm_jax.training.logs import Log, check_wandb
from mcm_jax.training.loop import Action, Clock, train
from mcm_jax.training.optimizer import make_optimizer, make_schedule
from mcm_jax.training.parts import Parts, assemble, check_best
from mcm_jax.training.settings import RunSettings, read_run

_OFTEN = 25  # times that training may see one draw before control suffers: docs/cache.md, "How many draws"


def train_and_evaluate(
    config: Any, workdir: str | os.PathLike, *, profile: tuple[int, int] | None = None
) -> states.TrainState:
    """Trains an MCM; goes on where the workdir's newest checkpoint ends.

    Every process of a cluster calls this, with one workdir on a file system that they share.

    Args:
      config: as configs/default.py has it.
      workdir: gets ``config.json``, ``checkpoints/``, ``mcm.safetensors`` (what samples), ``metrics.jsonl``,
        ``tensorboard/`` and ``validation/``; ``best/`` where the config names what is best. One that holds another
        run's config is refused.
      profile: (start, stop): a trace of the steps between, as far as they are not done yet, is written into
        ``profile/``.

    Returns:
      The final state.

    Raises:
      UserError: bad input, see its message; nothing of the workdir is changed.
      Interrupted: SIGINT or SIGTERM came; the state was saved.
    """
    workdir = pathlib.Path(workdir).expanduser()
    settings = workdirs.as_begun(read_run(config, workdir), workdirs.settings_in(workdir))
    agree_on(settings)
    mesh = sharding.make_mesh(settings.mesh)
    sharding.check_batch_size(settings.train.batch_size, mesh, "config.train.batch_size", settings.train.accumulate)
    before, there = _found(settings, workdir)
    finished = max(there, default=0) >= settings.train.steps
    if settings.train.wandb and not finished and distributed.is_first():
        check_wandb(settings.train.wandb)
    parts = assemble(settings, workdir, mesh, finished, bool(there))
    with workdirs.disk_errors(workdir), lock_once(workdir, finished):
        if not finished:  # again: another process may have trained here meanwhile
            before, _ = _found(settings, workdir, before)
        return _run(settings, workdir, parts, mesh, before, profile)


def _found(
    settings: RunSettings, workdir: pathlib.Path, known: RunSettings | None = None
) -> tuple[RunSettings | None, list[int]]:
    """The settings of a run that is in its workdir already, the same for all processes, and the steps it has saved."""
    before, there = workdirs.check_same_run(settings, workdir, known), sorted(workdirs.saved_steps(workdir))
    distributed.agree({"checkpoints in --workdir": str(there), "config.json there": repr(before)})
    return before, there


@contextlib.contextmanager
def lock_once(workdir: pathlib.Path, finished: bool) -> Iterator[None]:
    """Holds the workdir of a run that is not finished, by one process for all.

    Raises:
      Busy: another program holds it; on all processes.
    """
    if finished:
        yield
        return
    with contextlib.ExitStack() as held:
        busy = ""
        if distributed.is_first():
            try:
                held.enter_context(lock(workdir, "training in this workdir", "--workdir"))
            except Busy as e:
                busy = str(e)
        if told := distributed.everyones(busy)[0]:
            raise Busy(told, workdir)
        yield


def _run(
    settings: RunSettings,
    workdir: pathlib.Path,
    parts: Parts,
    mesh: jax.sharding.Mesh,
    before: RunSettings | None,
    profile: tuple[int, int] | None,
) -> states.TrainState:
    """The run itself, in a workdir that is its own."""
    t, card, modulator, feed = settings.train, parts.card, parts.modulator, parts.feed
    distributed.agree({"the data": feed.data if feed else ""})
    meta, schedule = meta_of(settings, parts), schedule_of(settings)
    optimizer = make_optimizer(t.optimizer, schedule, weight_decay=t.weight_decay, clip_norm=t.clip_norm)
    checkpoints = Checkpoints(workdir, t.keep)
    with closed(checkpoints.close):
        at = last_step(checkpoints, settings, before, workdir)
        begin = make_begin(parts, optimizer)
        state, pending = begin_or_restore(settings, parts, begin, checkpoints, meta, mesh, at)
        first = int(state.step)
        if feed is not None:
            check_best(settings, parts.held_out is not None, parts.control)
        if profile and parts.feed and not (profile[0] < t.steps and first < profile[1]):
            raise UserError(
                f"--profile={profile[0]}:{profile[1]}: none of these steps is left to trace: {first} of {t.steps} are "
                f"done. Take others, between these two numbers"
            )
        # Nothing of the workdir has changed so far.
        if take_over(settings, before, checkpoints, at, workdir):
            pending["best"] = None
        size = parameter_count(state.params)
        share = size / card.unet_parameters
        print(f"MCM of {size:,} parameters ({share:.1%} of the U-Net of {card.name!r}), on {mesh.size} device(s)")
        if feed is None or first >= t.steps:
            print(f"{workdir} is finished: {first} of {t.steps} steps are done")
            return state
        if first:
            print(f"going on from step {first}")
        say_if_draws_come_often(settings, feed)
        drops = settings.modalities.drop_rate
        noise_step = steps_lib.make_noise_step(modulator, settings.draws_for(card), seed=settings.seed, drop_rate=drops)
        steps, clock = range(first, t.steps), Clock()
        records = feed.records(
            noise_step, batch_size=t.batch_size, seed=settings.seed, steps=steps, mesh=mesh, waited=clock.wait
        )
        how = dict(weighting=settings.loss.weighting, l1=settings.loss.l1, snr_gamma=settings.loss.snr_gamma)
        train_step = steps_lib.make_train_step(
            modulator, optimizer, ema_decay=t.ema_decay, accumulate=t.accumulate, **how
        )
        config = config_lib.to_dict(settings)
        log = Log(workdir, first, wandb=t.wandb, config=config, active=distributed.is_first())
        with closed(log.close):
            held_out = None
            if parts.held_out:
                held_out = held_out_records(settings, parts, mesh), jax.jit(steps_lib.make_loss(modulator, **how))
            actions = actions_of(settings, workdir, parts, log, jax.jit(schedule), checkpoints, meta, pending, held_out)
            if profile:
                actions.append(trace := Profile(workdir / "profile", *profile))
                trace.begin(first)
            try:
                with sharding.memory_errors(
                    "the training step",
                    "Smaller steps of the same batch: config.train.accumulate=2 or more, config.mcm.remat=True; or "
                    "another batch: config.train.batch_size",
                ):
                    state = train(state, Ahead(train_step, t.accumulate), records, steps, actions, clock)
                say_what_was_skipped(feed)
                return state
            except Interrupted as e:
                raise Interrupted(f"{e}; the state is saved in {workdir}. Go on with the same command") from None


class Ahead:
    """A training step that is compiled ahead with its first arguments; says so before, and what it costs after."""

    def __init__(self, train_step: Any, repeats: int):
        self._train_step, self._repeats, self._compiled = train_step, repeats, None

    def __call__(self, *arguments: Any) -> Any:
        """Does the step."""
        if self._compiled is None:
            print("compiling the training step, before the first one: it may take a minute", flush=True)
            self._compiled = CompiledStep(self._train_step, *arguments, repeats=self._repeats)
            print(self._compiled)
        return self._compiled(*arguments)


def meta_of(settings: RunSettings, parts: Parts) -> dict[str, Any]:
    """What checkpoints of a run belong to."""
    card, feed = parts.card, parts.feed
    meta = {"base": card.name, "fingerprint": card.fingerprint, "config": config_lib.to_dict(settings)}
    return meta | {"examples": feed and feed.data}


def schedule_of(settings: RunSettings) -> optax.Schedule:
    """The learning rate of each step of a run."""
    t = settings.train
    return make_schedule(
        t.schedule,
        steps=t.steps,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup_steps,
        decay_steps=t.decay_steps,
    )


def take_over(
    settings: RunSettings,
    before: RunSettings | None,
    checkpoints: Checkpoints,
    at: int | None,
    workdir: pathlib.Path,
) -> bool:
    """Makes a workdir that of the run that goes on from step ``at``. Tells whether what was the best is set aside."""
    if distributed.is_first():
        settings.data.keep_described(settings.modalities.shown, workdir)
    # Checkpoints before the config: without them the old one still goes on.
    later = [step for step in checkpoints.steps() if step > (at or 0)]
    aside = bool(later) and distributed.is_first() and workdirs.set_aside_best(workdir, at or 0)
    checkpoints.drop(later)
    if distributed.is_first() and before != settings:
        config_lib.save(settings, workdir)
    return distributed.everyones(aside)[0]


def say_if_draws_come_often(settings: RunSettings, feed: Feed) -> None:
    """Prints a word where a run will see each of a cache's draws so often that it overfits to them."""
    t = settings.train
    if feed.repeat and (times := t.steps * t.batch_size / (feed.examples * feed.repeat)) >= _OFTEN:
        print(
            f"training will see each cached draw {times:.0f} times and overfit to it: more draws an example "
            f"(config.draws.count, now {feed.repeat}) give better control (docs/cache.md)"
        )


def say_what_was_skipped(feed: Feed) -> None:
    """Prints which examples could not be read, if there are any."""
    if feed.skipped:
        print(said(feed.skipped, feed.examples, feed.names))


@contextlib.contextmanager
def closed(close: Callable[[], object]):
    """Closes something after the block; where the block failed, what closing raises as well is not told."""
    try:
        yield
    except BaseException as e:
        distributed.fail(e) if not isinstance(e, Interrupted) else None  # others would wait for this process to close
        with contextlib.suppress(Exception):
            close()
        raise
    close()


def last_step(
    checkpoints: Checkpoints, settings: RunSettings, before: RunSettings | None, workdir: pathlib.Path
) -> int | None:
    """The checkpoint to go on from: the newest; of a ``wsd`` run made longer, the newest before its decay."""
    there = checkpoints.steps()
    longer = before is not None and before.train.steps != settings.train.steps
    if longer and before.train.stable_until is not None and there:
        stable = before.train.stable_until
        if there[0] > stable:
            raise UserError(
                f"{workdir}: the run has decayed from step {stable} on, and no checkpoint from before is there: it "
                f"cannot be made longer. Take another --workdir, and train.init_from={workdir} to begin with its MCM"
            )
        there = [step for step in there if step <= stable]
    return max(there, default=None)


def make_begin(parts: Parts, optimizer: optax.GradientTransformation) -> Callable[[jax.Array], states.TrainState]:
    """Returns jitted ``begin(key) -> state``, before the first step."""
    # One program: made by many small ones, the state takes seconds to begin with.
    modulator, shape, grid = parts.modulator, parts.card.latent_shape, parts.modulator.grid(parts.card)
    return jax.jit(lambda key: states.init_state(modulator.init(key, shape, grid), optimizer))


def begin_or_restore(
    settings: RunSettings,
    parts: Parts,
    begin: Callable[[jax.Array], states.TrainState],
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    mesh: jax.sharding.Mesh,
    at: int | None,
) -> tuple[states.TrainState, dict[str, Any]]:
    """The state that the run goes on from, on all devices, and what was not reported or is the best so far."""
    state = sharding.replicate(begin(jax.random.fold_in(jax.random.key(settings.seed), 1)), mesh)
    if at is not None:
        state, found = checkpoints.restore(state, meta, at)
        return state, {name: found.get(name) for name in ("reported", "sums", "best")}
    if settings.train.init_from:
        params = start_from(settings.train.init_from, settings.mcm, parts.modulator, parts.card)
        state = state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
        state = sharding.replicate(state, mesh)
    return state, {"reported": 0, "sums": None, "best": None}


def actions_of(
    settings: RunSettings,
    workdir: pathlib.Path,
    parts: Parts,
    log: Log,
    learning_rate: Callable[[int], Any],
    checkpoints: Checkpoints,
    meta: dict[str, Any],
    pending: dict[str, Any],
    held_out: tuple[Sequence[steps_lib.Record], Callable[..., Any]] | None,
) -> list[Action]:
    """What the run does every n steps, in its order: a report comes first, a checkpoint after all that is measured.

    `held_out` has records of the held-out examples and their loss; None where it is not measured.
    """
    t, feed = settings.train, parts.feed
    order = Order(feed.examples, t.batch_size, settings.seed)

    def blame(step: int) -> dict[str, Any]:
        index = order(step)[0].tolist()
        return {"examples": index, **({"names": [feed.names[i] for i in index]} if len(feed.names) else {})}

    report = Report(
        log,
        every=t.log_every,
        batch_size=t.batch_size,
        learning_rate=learning_rate,
        blame=blame,
        skipped=feed.skipped,
        workdir=workdir,
        reported=pending["reported"],
        sums=pending["sums"],
    )
    actions: list[Action] = [report]
    if held_out:
        records, loss_of = held_out
        actions.append(HeldOutLoss(log, every=t.evaluate_every, records=records, loss_of=loss_of))
    if parts.control and parts.pipeline:
        shown, judges = parts.control
        control = Control(log, every=t.evaluate_every, pipeline=parts.pipeline, held_out=shown, judges=judges)
        actions.append(control)
    actions.append(
        Checkpoint(
            workdir, checkpoints, settings=settings, report=report, card=parts.card, meta=meta, best=pending["best"]
        )
    )
    if parts.pipeline and parts.examples:
        folder = workdir / "validation"
        pictures = ValidationPictures(
            folder,
            every=t.validate_every,
            pipeline=parts.pipeline,
            examples=parts.examples,
            palettes={m.name: settings.data.palette(m.name) for m in parts.modulator.modalities},
        )
        actions.append(pictures)
    return actions


def held_out_records(settings: RunSettings, parts: Parts, mesh: jax.sharding.Mesh) -> list[steps_lib.Record]:
    """Records of all draws of the held-out examples; what fills up the last one counts nothing."""
    feed, t, draws = parts.held_out, settings.train, settings.held_out().draws_for(parts.card)
    noise_step = steps_lib.make_noise_step(
        parts.modulator, draws, seed=draws.seed, drop_rate=settings.modalities.drop_rate
    )
    unit = mesh.size * t.accumulate
    size = min(t.batch_size, -(-feed.examples // unit) * unit)
    steps = range(-(-feed.examples * draws.count // size))
    records = list(feed.records(noise_step, batch_size=size, seed=0, steps=steps, mesh=mesh))
    rows, real = len(steps) * size, feed.examples * draws.count
    counts = np.where(np.arange(rows) < real, rows / real, 0).astype(np.float32).reshape(len(steps), size)
    own = sharding.local_rows(mesh, size)
    shares = [sharding.split_batch(row[own], mesh) for row in counts]
    return [r | {"importance": r["importance"] * share} for r, share in zip(records, shares, strict=True)]
