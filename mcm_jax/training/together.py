"""Runs that differ only in numbers which the compiled step can take as inputs, trained as one :mod:`.program`.

What is done every n steps is done for each trial by itself, by a single run's actions on its part of the state: its
workdir is that of a single run.

On a CPU a call of the program has one trial on each device, and a step takes as many calls as there are trials for it:
vmapped, the convolutions of several trials are grouped ones, which take XLA about twice as long there as one after the
other. On accelerators one call has them all.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mcm_jax import config as config_lib
from mcm_jax import sharding
from mcm_jax.errors import Busy, Interrupted, UserError
from mcm_jax.files import check_writable
from mcm_jax.mcm import parameter_count
from mcm_jax.training import assembly
from mcm_jax.training import step as steps_lib
from mcm_jax.training import workdir as workdirs
from mcm_jax.training.actions import Diverged
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Action, Clock, Moment, train
from mcm_jax.training.optimizer import make_optimizer
from mcm_jax.training.parts import Parts, assemble, check_best
from mcm_jax.training.program import TOGETHER_KEYS, Hyper, hyper_of, make_program, records_of, stacked
from mcm_jax.training.settings import RunSettings
from mcm_jax.training.state import TrainState
from mcm_jax.training.step import Record

_SHOWN = 8  # lines of a message, of trials that diverged


@dataclasses.dataclass
class _Trial:
    """One of the trials, while it trains.

    Attributes:
      settings: of the run.
      workdir: of the run.
      before: settings that the workdir had.
      start: steps that were done before.
      actions: what is done for it, its report first.
      diverged: why it has ended.
    """

    settings: RunSettings
    workdir: pathlib.Path
    before: RunSettings | None
    start: int = 0
    actions: Sequence[Action] = ()
    diverged: Diverged | None = None


def train_together(
    trials: Sequence[tuple[RunSettings, pathlib.Path]],
    *,
    width: int | None = None,
    looked: Callable[[], object] = lambda: None,
) -> None:
    """Trains several MCMs in one program, each into a workdir as :func:`.assembly.train_and_evaluate` leaves it.

    Each is the run that it would be by itself, to rounding. Those that are finished are left alone, the others go on
    from their own newest checkpoints, where one that is ahead waits for the rest. Those that another process trains are
    passed over. One whose loss is not finite is told of and recorded in its ``diverged.json``, and the rest go on.

    Args:
      trials: settings and workdir of each. The settings differ in :data:`TOGETHER_KEYS` alone.
      width: trials of each device in one call of the program; one on CPUs, else all, if left out.
      looked: is called after each step at which trials were measured or saved.

    Raises:
      UserError: bad input, see its message, and no workdir is changed; or one cannot be written.
      Diverged: at the end, of all that did.
      Interrupted: SIGINT or SIGTERM came; the states were saved.
    """
    if not trials:
        return
    check_together([settings for settings, _ in trials])
    one = trials[0][0]
    mesh = sharding.make_mesh(one.mesh)
    sharding.check_batch_size(one.train.batch_size, mesh, "config.train.batch_size", one.train.accumulate)
    left = []
    for settings, folder in trials:
        trial = _Trial(settings, folder, workdirs.check_same_run(settings, folder))
        if max(workdirs.saved_steps(folder), default=0) < settings.train.steps:
            left.append(trial)
        else:
            print(f"{folder} is finished")
    if not left:
        return
    begun = all(workdirs.saved_steps(trial.workdir) for trial in left)
    parts = assemble(left[0].settings, left[0].workdir, mesh, begun=begun)
    check_best(one, parts.held_out is not None, parts.control)
    with contextlib.ExitStack() as stack:
        own = []
        for trial in left:
            check_writable(trial.workdir, "--workdir")
            try:
                stack.enter_context(assembly.lock_once(trial.workdir, False))
            except Busy:
                print(f"{trial.workdir}: another process trains it")
            else:  # again: another process may have trained here meanwhile
                trial.before = workdirs.check_same_run(trial.settings, trial.workdir, trial.before)
                own.append(trial)
        if own:
            _train(own, parts, mesh, stack, width, looked)


def shared_by_all(settings: RunSettings) -> str:
    """What must be the same in all trials of one program, as a text to compare."""
    flat = config_lib.flatten(settings)
    return json.dumps({key: value for key, value in flat.items() if key not in TOGETHER_KEYS}, sort_keys=True)


def check_together(trials: Sequence[RunSettings]) -> None:
    """Raises UserError where the trials are none for one program."""
    one, flat = trials[0], [config_lib.flatten(settings) for settings in trials]
    keys = sorted(set().union(*flat) - TOGETHER_KEYS)
    if wrong := [key for key in keys if any(values.get(key) != flat[0].get(key) for values in flat)]:
        raise UserError(
            f"trials differ in {', '.join(wrong)}; those of one program may in {', '.join(sorted(TOGETHER_KEYS))} only"
        )
    if one.cache.mode != "off" and not one.cache.path:
        raise UserError(
            "config.cache.path: found '', a cache in each workdir, expected a folder: trials that train together read "
            "one cache"
        )
    if one.train.wandb:
        raise UserError(
            f"config.train.wandb: found {one.train.wandb!r}, expected '' for trials that train together: Weights & "
            f"Biases has one run at a time in a process"
        )
    if jax.process_count() > 1:
        raise UserError(
            f"found {jax.process_count()} processes, expected one: trials train together over the devices of one. "
            f"Train them one after the other"
        )


def _train(
    trials: Sequence[_Trial],
    parts: Parts,
    mesh: Mesh,
    stack: contextlib.ExitStack,
    width: int | None,
    looked: Callable[[], object],
) -> None:
    """Trains, in workdirs that are its own; what is to be closed afterwards goes on the stack."""
    t = trials[0].settings.train
    seeds = sorted({trial.settings.seed for trial in trials})
    rates = sorted({trial.settings.modalities.drop_rate for trial in trials})
    hypers = [hyper_of(trial.settings, seeds, rates) for trial in trials]

    # Values of the first trial: the state that the optimizer begins with has none of them.
    schedule = assembly.schedule_of(trials[0].settings)
    optimizer = make_optimizer(t.optimizer, schedule, weight_decay=t.weight_decay, clip_norm=t.clip_norm)
    begin, states, restored = assembly.make_begin(parts, optimizer), [], []
    for trial in trials:
        stack.enter_context(workdirs.disk_errors(trial.workdir))  # of this loop and of closing
        checkpoints = Checkpoints(trial.workdir, t.keep)
        stack.enter_context(assembly.closed(checkpoints.close))
        at = assembly.last_step(checkpoints, trial.settings, trial.before, trial.workdir)
        meta = assembly.meta_of(trial.settings, parts)
        state, pending = assembly.begin_or_restore(trial.settings, parts, begin, checkpoints, meta, mesh, at)
        state = jax.device_get(state)  # the devices keep none
        trial.start = int(state.step)
        states.append(state)
        restored.append((checkpoints, at, meta, pending))
    for trial, (checkpoints, at, _, _) in zip(trials, restored, strict=True):
        with workdirs.disk_errors(trial.workdir):
            assembly.take_over(trial.settings, trial.before, checkpoints, at, trial.workdir)

    first, last = min(trial.start for trial in trials), max(trial.start for trial in trials)
    size = parameter_count(states[0].params)
    print(f"{len(trials)} MCMs of {size:,} parameters each train together, on {mesh.size} device(s)")
    if last:
        print(f"going on from step {first}" + (f"; some are ahead, up to step {last}" if last > first else ""))
    assembly.say_if_draws_come_often(trials[0].settings, parts.feed)

    held_out = _held_out(parts, mesh) if parts.held_out else lambda settings, hyper: None
    for trial, hyper, (checkpoints, _, meta, pending) in zip(trials, hypers, restored, strict=True):
        with workdirs.disk_errors(trial.workdir):
            log = Log(trial.workdir, trial.start)
        stack.enter_context(assembly.closed(log.close))
        rate, measured = hyper.learning_rate.__getitem__, held_out(trial.settings, hyper)
        trial.actions = assembly.actions_of(
            trial.settings, trial.workdir, parts, log, rate, checkpoints, meta, pending, measured
        )

    wide = -(-len(trials) // mesh.size)  # trials of each device
    wide = min(wide, width or (1 if jax.default_backend() == "cpu" else wide))
    way_out = (
        f"Fewer trials in a call of the program: --sweep_width={wide // 2}, here {wide}"
        if wide > 1
        else "Smaller steps of the same batch: config.train.accumulate=2 or more"
    )
    with sharding.memory_errors("the trials' states", "One trial after the other: --sweep_mode=serial"):
        calls = tuple(stacked(states, wide * mesh.size, mesh))
    inputs = stacked(hypers, wide * mesh.size, mesh)
    states.clear()
    repeats = t.accumulate * len(calls)
    program = assembly.Ahead(make_program(parts.modulator, trials[0].settings, mesh, len(seeds)), repeats)

    def train_step(states: Any, record: Record) -> tuple[Any, Any]:
        done = [program(state, hyper, record) for state, hyper in zip(states, inputs, strict=True)]
        return tuple(state for state, _ in done), tuple(metrics for _, metrics in done)

    clock, steps, each = Clock(), range(first, t.steps), _Each(trials, wide * mesh.size, mesh, looked)
    records = records_of(parts, trials[0].settings, seeds, rates, steps, mesh, clock)
    try:
        with sharding.memory_errors("the training step", way_out):
            train(calls, train_step, records, steps, [each], clock)
        assembly.say_what_was_skipped(parts.feed)
    except Interrupted as e:
        raise Interrupted(f"{e}; the states of all trials are saved. Go on with the same command") from None
    each.tell()


def _held_out(parts: Parts, mesh: Mesh) -> Callable[[RunSettings, Hyper], tuple[list[Record], Callable[..., Any]]]:
    """Returns a function that gives a trial's records of the held-out examples and their loss.

    Records are made once for all trials of a drop rate, and the loss is compiled once for all.
    """

    @jax.jit
    def loss_of(hyper: Hyper, params: Any, record: Record) -> tuple[jax.Array, dict[str, jax.Array]]:
        numbers = dict(weighting=hyper.weighting, l1=hyper.l1, snr_gamma=hyper.snr_gamma)
        return steps_lib.make_loss(parts.modulator, **numbers)(params, record)

    made: dict[float, list[Record]] = {}

    def held_out(settings: RunSettings, hyper: Hyper) -> tuple[list[Record], Callable[..., Any]]:
        rate = settings.modalities.drop_rate
        if rate not in made:
            made[rate] = assembly.held_out_records(settings, parts, mesh)
        return made[rate], functools.partial(loss_of, hyper)

    return held_out


@jax.jit
def _take(tree: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], tree)


class _Each:
    """The action of the loop that does each trial's own, with its part of state and metrics.

    Metrics stay on the devices until a step at which any of them is due: the steps between need not be waited for.

    Args:
      trials: all of them.
      size: how many a call of the program has.
      mesh: of the devices.
      looked: is called after each step at which trials were measured or saved.
    """

    def __init__(self, trials: Sequence[_Trial], size: int, mesh: Mesh, looked: Callable[[], object]):
        self._trials, self._size, self._mesh, self._looked = trials, size, mesh, looked
        self._train = trials[0].settings.train
        self._passed: list[tuple[int, Any]] = []  # steps since, and their metrics

    def __call__(self, now: Moment) -> None:
        """Does them if it is time."""
        t = self._train
        self._passed.append((now.step, now.metrics))
        looks = any(n and now.step % n == 0 for n in (t.checkpoint_every, t.evaluate_every, t.validate_every))
        looks |= now.stopping or now.step in (now.last, t.stable_until)
        if not looks and now.step % t.log_every:
            return
        passed, self._passed = jax.device_get(self._passed), []
        for i, trial in enumerate(self._trials):
            if trial.diverged or now.step <= trial.start:
                continue
            call, row = divmod(i, self._size)
            moments = [
                Moment(step, now.last, None, {k: v[row] for k, v in of[call].items()}, False, now.clock, _quiet)
                for step, of in passed
                if step > trial.start
            ]
            try:
                with workdirs.disk_errors(trial.workdir):
                    for moment in moments[:-1]:
                        trial.actions[0](moment)  # a report, which does not look at the state
                    if looks:
                        with now.clock.pause(now.state):
                            state = self._part(now.state[call], row)
                        moments[-1] = dataclasses.replace(moments[-1], state=state, stopping=now.stopping)
                    for action in trial.actions if looks else trial.actions[:1]:
                        action(moments[-1])
            except Diverged as e:
                trial.diverged = e
                print(f"{trial.workdir}: {e}")
        if looks:
            with now.clock.pause(now.state):
                self._looked()
        alive = [i for i, trial in enumerate(self._trials) if not trial.diverged]
        if not alive:
            self.tell()
        found = [float(passed[-1][1][i // self._size]["loss"][i % self._size]) for i in alive]
        now.show(trials=len(alive), loss=f"{min(found):.4f}..{max(found):.4f}")

    def _part(self, states: TrainState, row: int) -> TrainState:
        """One trial's state, on all devices."""
        rows = range(self._size)

        def held(leaf: jax.Array) -> jax.Array:
            return next(shard.data for shard in leaf.addressable_shards if row in rows[shard.index[0]])

        wide = self._size // self._mesh.size
        return sharding.replicate(_take(jax.tree.map(held, states), row % wide), self._mesh)

    def tell(self) -> None:
        """Raises Diverged where trials have."""
        if wrong := [f"{trial.workdir}: {trial.diverged}" for trial in self._trials if trial.diverged]:
            more = [f"and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
            lines = "\n".join([*wrong[:_SHOWN], *more])
            rest = "the others are whole" if len(wrong) < len(self._trials) else "none is left"
            raise Diverged(f"{len(wrong)} of {len(self._trials)} trials diverged, {rest}:\n{lines}")


def _quiet(**shown: Any) -> None:
    """A single run's numbers in the progress bar, where there are many runs."""
