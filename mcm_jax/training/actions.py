"""What a run does every n steps, each a small object: see :class:`mcm_jax.training.loop.Action`.

Every process of a cluster has the same actions and does them at the same steps, since they compute together; files are
written by the first one.
"""

import json
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mcm_jax import config, distributed, pictures, sampling, sharding
from mcm_jax.base import BaseCard
from mcm_jax.data.pipeline import to_float
from mcm_jax.errors import OutOfMemory, UserError
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge
from mcm_jax.evaluation.rows import Row, Sampler
from mcm_jax.files import write_atomically
from mcm_jax.pipeline import Pipeline
from mcm_jax.trained import save_mcm
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Moment
from mcm_jax.training.settings import RunSettings
from mcm_jax.training.step import Record
from mcm_jax.training.workdir import BEST

_LESS_IS_BETTER = ("held_out_loss", "held_out_mse", "depth_rmse", "delta_e", "angular_error", "loss", "mse")
_LESS_IS_BETTER += ("input_wait",)
DIVERGED = "diverged.json"


def less_is_better(name: str) -> bool:
    """Whether the lower one wins of a number that training measures; of two such judges it is `MODALITY/delta_e`."""
    return name.rpartition("/")[2] in _LESS_IS_BETTER


# What a device's memory may not hold, and the way out.
_DRAWN = (
    "what is drawn and judged while training",
    "Fewer at a time: config.sampling.batch_size; or nothing, by 0 for config.train.validate_every and evaluate_every",
)


def _check_alone(e: UserError) -> None:
    """Raises what ends the run; else it is of this moment, the training goes on, and its checkpoint is kept.

    Of several processes one may be out of memory by itself, while the others wait for it in the middle of a sample.
    """
    if isinstance(e, OutOfMemory) and jax.process_count() > 1:
        raise e


class Diverged(UserError):
    """A loss that is not finite."""


class Report:
    """Means of the steps' metrics since the last report, the pace and the learning rate, into the log.

    Args:
      log: where they go.
      every: steps.
      batch_size: for the pace.
      learning_rate: by step.
      blame: gives, of a step (from 0), what its batch was, as JSON has it; for a loss that is not finite.
      workdir: where that is written.
      skipped: examples that could not be read so far: how many is reported, if any.
      reported: the last step that was reported before the run was stopped.
      sums: of the metrics since then; None for nothing.
    """

    def __init__(
        self,
        log: Log,
        *,
        every: int,
        batch_size: int,
        learning_rate: Callable[[int], Any],
        blame: Callable[[int], dict[str, Any]],
        workdir: pathlib.Path,
        skipped: Collection[int] = (),
        reported: int = 0,
        sums: Mapping[str, float] | None = None,
    ):
        self._log, self._every, self._batch_size, self._rate = log, every, batch_size, learning_rate
        self._blame, self._workdir, self._skipped = blame, workdir, skipped
        self._reported, self._sums = reported, sums and {k: np.float32(v) for k, v in sums.items()}
        self._recent: list[tuple[int, dict[str, jax.Array]]] = []  # metrics of each step since the last report
        self._timed: tuple[int, float, float] | None = None  # steps, seconds, and those waited, at the last report

    @property
    def pending(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next report to be the uninterrupted run's."""
        return {"reported": self._reported, "sums": self._sums and {k: float(v) for k, v in self._sums.items()}}

    def check(self) -> None:
        """Raises Diverged where a loss since the last report is not finite; what its batch was is written first."""
        # A gradient may overflow where the loss does not, and the params with it.
        if self._sums is None or all(np.isfinite(float(value)) for value in self._sums.values()):
            return
        bad = ((step, m) for step, m in self._recent if not all(np.isfinite(float(value)) for value in m.values()))
        step, metrics = next(bad, self._recent[-1])  # the last one should only their sum have grown too large
        loss, norm = float(metrics["loss"]), float(metrics.get("gradient_norm", np.nan))
        path = self._workdir / DIVERGED
        if distributed.is_first():
            batch = {"step": step, "loss": str(loss), **self._blame(step - 1)}
            write_atomically(path, (json.dumps(batch, indent=1) + "\n").encode())
        raise Diverged(
            f"the loss is {loss} at step {step}, its gradient's norm {norm}; lower train.learning_rate or "
            f"set train.clip_norm, and train in another workdir. The last checkpoint is from before; "
            f"{path} has the examples of that batch"
        )

    def __call__(self, now: Moment) -> None:
        """Adds the step's metrics, and reports every n steps and at the end."""
        if self._timed is None:
            self._timed = now.step - 1, 0.0, 0.0
        sums = self._sums
        self._sums = now.metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, now.metrics)
        self._recent.append((now.step, now.metrics))
        if now.step % self._every and now.step != now.last:
            return
        self.check()
        means = {k: float(v) / (now.step - self._reported) for k, v in self._sums.items()}
        steps, seconds, waited = self._timed
        elapsed = now.clock.seconds - seconds
        pace = self._batch_size * (now.step - steps) / elapsed
        waits = min(1.0, (now.clock.waited - waited) / elapsed)
        more = {"images_per_second": pace, "input_wait": waits, "learning_rate": float(self._rate(now.step - 1))}
        more |= {"unreadable": len(self._skipped)} if self._skipped else {}
        self._log.write(now.step, means | more)
        now.show(loss=f"{means['loss']:.4f}", img_s=f"{pace:.0f}")
        self._reported, self._sums, self._recent = now.step, None, []
        self._timed = now.step, now.clock.seconds, now.clock.waited


class HeldOutLoss:
    """The averaged params' loss on held-out examples, always with the same timesteps, noise and hidden modalities.

    Args:
      log: where it goes.
      every: steps; at the end, too.
      records: of the examples, in host memory or on the devices.
      loss_of: jitted ``(params, record) -> (loss, metrics)``.
    """

    names = ("held_out_loss", "held_out_mse")

    def __init__(
        self,
        log: Log,
        *,
        every: int,
        records: Sequence[Record],
        loss_of: Callable[[Any, Record], tuple[jax.Array, dict[str, jax.Array]]],
    ):
        self._log, self._every, self._records, self._loss_of = log, every, records, loss_of

    def __call__(self, now: Moment) -> None:
        """Measures if it is time."""
        if now.step % self._every and now.step != now.last:
            return
        with now.clock.pause(now.state):
            found = [self._loss_of(now.state.ema_params, record) for record in self._records]
            losses, errors = zip(*((float(loss), float(metrics["mse"])) for loss, metrics in found), strict=True)
            means = dict(zip(self.names, (float(np.mean(losses)), float(np.mean(errors))), strict=True))
            now.measured.update(means)
            self._log.write(now.step, means)


class Control:
    """How well samples follow held-out conditions, all modalities given, by the judges of the evaluation.

    Args:
      log: where their numbers go.
      every: steps; at the end, too.
      pipeline: base and MCM; takes the averaged params of the moment.
      held_out: the examples; always with the same noise.
      judges: of the samples.
    """

    def __init__(self, log: Log, *, every: int, pipeline: Pipeline, held_out: HeldOut, judges: Sequence[Judge]):
        self._log, self._every, self._pipeline, self._judges = log, every, pipeline, judges
        size = min(pipeline.settings.batch_size, len(held_out))
        self._sampler = Sampler(pipeline, held_out, pipeline.settings.but(batch_size=size))
        self._row = Row("all", tuple(m.name for m in pipeline.modalities), pipeline.settings.guidance)
        self._keys, self._which = sampling.sample_keys(0, len(held_out)), np.arange(len(held_out))

    def __call__(self, now: Moment) -> None:
        """Measures if it is time."""
        if now.step % self._every and now.step != now.last:
            return
        with now.clock.pause(now.state):
            found: dict[str, float] = {}
            try:
                with sharding.memory_errors(*_DRAWN):
                    self._pipeline.update(now.state.ema_params)
                    images = self._sampler(self._row, self._keys, self._which)
                    for judge in self._judges:
                        found |= judge.watch(images, self._which)
            except UserError as e:
                _check_alone(e)
                warnings.warn(f"step {now.step}: no control was measured: {e}", stacklevel=2)
                # Whatever reads the log must not take an older number for this step's.
                found = {name: float("nan") for judge in self._judges for name in judge.watched}
                now.measured.update(found)
                self._log.write(now.step, found)
                return
            now.measured.update(found)
            self._log.write(now.step, found)
            now.show(**{name: f"{value:.3f}" for name, value in found.items()})


class Checkpoint:
    """A checkpoint every n steps, at the end, where the run is stopped, and of the best; before it, the averaged MCM.

    Args:
      workdir: of the run.
      checkpoints: in it.
      settings: of the run.
      report: whose unfinished means are kept too, and which knows whether the state is sound.
      card: of the base.
      meta: what the checkpoint belongs to.
      best: the best so far, ``step`` and ``value``; None for none.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        *,
        settings: RunSettings,
        report: Report,
        card: BaseCard,
        meta: Mapping[str, Any],
        best: Mapping[str, float] | None = None,
    ):
        self._workdir, self._checkpoints, self._settings = workdir, checkpoints, settings
        self._report, self._card, self._meta, self._best = report, card, dict(meta), best
        self._stable = settings.train.stable_until
        self._keep()

    def _keep(self) -> None:
        """Tells which checkpoints stay: the best, and the one from which a run with a decay can be made longer."""
        kept = {int(self._best["step"])} if self._best else set()
        self._checkpoints.kept.clear()
        self._checkpoints.kept.update(kept | ({self._stable} if self._stable else set()))

    def _is_best(self, now: Moment) -> bool:
        name = self._settings.train.best
        if name not in now.measured:
            return False
        value = now.measured[name]
        if not np.isfinite(value):
            return False
        if self._best and self._best.get("metric") == name:
            before = self._best["value"]
            if not (value < before if less_is_better(name) else value > before):
                return False
        self._best = {"metric": name, "step": now.step, "value": value}
        self._keep()
        return True

    def __call__(self, now: Moment) -> None:
        """Saves if it is time."""
        best = self._is_best(now)
        due = now.step % self._settings.train.checkpoint_every == 0 or now.step in (now.last, self._stable)
        if not (due or best or now.stopping):
            return
        with now.clock.pause(now.state):
            self._report.check()  # never over a good state
            if distributed.is_first():
                # The checkpoint comes last: a run that is killed between the two writes both again.
                save_mcm(self._workdir, now.state.ema_params, base=self._card, step=now.step)
                if best:
                    folder = self._workdir / BEST
                    folder.mkdir(exist_ok=True)
                    config.save(self._settings, folder)
                    self._settings.data.keep_described(self._settings.modalities.shown, folder, self._workdir)
                    save_mcm(folder, now.state.ema_params, base=self._card, step=now.step)
            self._checkpoints.save(now.state, self._meta | self._report.pending | {"best": self._best})
            if now.stopping or now.step == now.last:
                self._checkpoints.wait()


class ValidationPictures:
    """A sheet of held-out conditions, samples of the base alone and samples under control, every n steps.

    Args:
      folder: for the sheets.
      every: steps.
      pipeline: base and MCM; takes the averaged params of the moment.
      examples: held-out ones, stacked, 8 bits a value.
      palettes: colours of the classes, by modality, uint8 ``[C, 3]``; None where there are none.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every: int,
        pipeline: Pipeline,
        examples: Mapping[str, np.ndarray],
        palettes: Mapping[str, np.ndarray | None],
    ):
        maps = [m.name for m in pipeline.modalities if m.continuous]
        self._folder, self._every, self._pipeline, self._palettes = folder, every, pipeline, palettes
        self._examples = to_float(dict(examples), maps)

    def __call__(self, now: Moment) -> None:
        """Draws the sheet if it is time."""
        if now.step % self._every:
            return
        with now.clock.pause(now.state):
            self._pipeline.update(now.state.ema_params)
            try:
                with sharding.memory_errors(*_DRAWN):
                    sheet = self._sheet()
            except UserError as e:
                _check_alone(e)
                warnings.warn(f"step {now.step}: no validation pictures were drawn: {e}", stacklevel=2)
                return
            if distributed.is_first():
                pictures.save_png(self._folder / f"step_{now.step:07d}.png", sheet)

    def _sheet(self) -> np.ndarray:
        pipeline, examples = self._pipeline, self._examples
        modalities, count = pipeline.modalities, len(self._examples["image"])
        conditions = {m.name: m.resize_all(examples[m.name], *pipeline.grid) for m in modalities}
        prompts = list(map(str, examples["caption"])) if pipeline.base.is_text_conditional else None
        keys = sampling.sample_keys(0, count)
        there = examples.get("present", np.ones((count, len(modalities)))) > 0
        present = {m.name: there[:, i] for i, m in enumerate(modalities)}
        rows = [
            pictures.show(m, examples[m.name], self._palettes.get(m.name), present=present[m.name]) for m in modalities
        ]
        how = dict(prompts=prompts, present=present, batch_size=min(count, pipeline.settings.batch_size))
        alone, controlled = pipeline(conditions, keys, guidance=0.0, **how), pipeline(conditions, keys, **how)
        return pictures.grid([*rows, pictures.to_uint8(alone), pictures.to_uint8(controlled)])


class Profile:
    """A trace of some steps for TensorBoard's profiler or Perfetto.

    Args:
      folder: for the trace; each process writes its own.
      start: the step after which it begins; a run that goes on from a later one begins it there.
      stop: the step after which it ends.
    """

    def __init__(self, folder: pathlib.Path, start: int, stop: int):
        # JAX makes Perfetto's file of the one trace that it finds in a folder.
        self._folder = folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder
        self._start, self._stop = start, stop
        self._began: int | None = None  # after which step, while a trace is on

    def begin(self, step: int, pending: Any = None) -> None:
        """Begins the trace if it is time; to be asked before the first step, too.

        Args:
          step: how many are done.
          pending: what the device may not have done of them yet.
        """
        if self._began is None and self._start <= step < self._stop:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._began = step

    def __call__(self, now: Moment) -> None:
        """Begins and ends the trace."""
        ends = now.step == now.last or now.stopping
        if self._began is not None and (ends or now.step >= self._stop):
            jax.block_until_ready(now.state)
            jax.profiler.stop_trace()
            print(f"a trace of steps {self._began + 1} to {now.step} is in {self._folder}")
            self._began = None
        elif not ends:
            self.begin(now.step, now.state)
