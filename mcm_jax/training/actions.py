"""What a run does every n steps, each a small object: see :class:`mcm_jax.training.loop.Action`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from mcm_jax import pictures, sampling
from mcm_jax.base import BaseCard
from mcm_jax.data.pipeline import to_float
from mcm_jax.errors import UserError
from mcm_jax.pipeline import Pipeline, save_mcm
from mcm_jax.training.checkpoints import Checkpoints
from mcm_jax.training.logs import Log
from mcm_jax.training.loop import Moment


class Report:
    """Means of the steps' metrics since the last report, the pace and the learning rate, into the log.

    Args:
      log: where they go.
      every: steps.
      batch_size: for the pace.
      learning_rate: by step.
      reported: the last step that was reported before the run was stopped.
      sums: of the metrics since then; None for nothing.
    """

    def __init__(
        self,
        log: Log,
        *,
        every: int,
        batch_size: int,
        learning_rate: optax.Schedule,
        reported: int = 0,
        sums: Mapping[str, float] | None = None,
    ):
        self._log, self._every, self._batch_size, self._rate = log, every, batch_size, learning_rate
        self._reported, self._sums = reported, sums and {k: np.float32(v) for k, v in sums.items()}
        self._timed: tuple[int, float] | None = None  # steps and seconds, when the pace was last told

    @property
    def pending(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next report to be the uninterrupted run's."""
        return {"reported": self._reported, "sums": self._sums and {k: float(v) for k, v in self._sums.items()}}

    def check(self, step: int) -> None:
        """Raises UserError where the loss since the last report is not finite."""
        if self._sums is not None and not np.isfinite(loss := float(self._sums["loss"])):
            raise UserError(
                f"the loss is {loss} at step {step}; lower train.learning_rate or set train.clip_norm, and train in "
                f"another workdir"
            )

    def __call__(self, now: Moment) -> None:
        """Adds the step's metrics, and reports every n steps and at the end."""
        if self._timed is None:
            self._timed = now.step - 1, 0.0
        sums = self._sums
        self._sums = now.metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, now.metrics)
        if now.step % self._every and now.step != now.last:
            return
        self.check(now.step)
        means = {k: float(v) / (now.step - self._reported) for k, v in self._sums.items()}
        steps, seconds = self._timed
        pace = self._batch_size * (now.step - steps) / (now.clock.seconds - seconds)
        self._log.write(now.step, means | {"images_per_second": pace, "learning_rate": float(self._rate(now.step - 1))})
        now.show(loss=f"{means['loss']:.4f}", img_s=f"{pace:.0f}")
        self._reported, self._sums, self._timed = now.step, None, (now.step, now.clock.seconds)


class Checkpoint:
    """A checkpoint every n steps, at the end, and where the run is stopped; before it, the averaged MCM.

    Args:
      workdir: of the run.
      checkpoints: in it.
      every: steps.
      report: whose unfinished means are kept too, and which knows whether the state is sound.
      card: of the base.
      meta: what the checkpoint belongs to.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        *,
        every: int,
        report: Report,
        card: BaseCard,
        meta: Mapping[str, Any],
    ):
        self._workdir, self._checkpoints, self._every = workdir, checkpoints, every
        self._report, self._card, self._meta = report, card, dict(meta)

    def __call__(self, now: Moment) -> None:
        """Saves if it is time."""
        if now.step % self._every and now.step != now.last and not now.stopping:
            return
        with now.clock.pause(now.state):
            self._report.check(now.step)  # never over a good state
            # The checkpoint comes last: a run that is killed between the two writes both again.
            save_mcm(self._workdir, now.state.ema_params, base=self._card, step=now.step)
            self._checkpoints.save(now.state, self._meta | self._report.pending)


class ValidationPictures:
    """A sheet of held-out conditions, samples of the base alone and samples under control, every n steps.

    Args:
      folder: for the sheets.
      every: steps.
      pipeline: base and MCM; takes the averaged params of the moment.
      examples: held-out ones, stacked, 8 bits a value.
    """

    def __init__(self, folder: pathlib.Path, *, every: int, pipeline: Pipeline, examples: Mapping[str, np.ndarray]):
        maps = [m.name for m in pipeline.modulator.modalities if m.kind != "labels"]
        self._folder, self._every, self._pipeline = folder, every, pipeline
        self._examples = to_float(dict(examples), maps)

    def __call__(self, now: Moment) -> None:
        """Draws the sheet if it is time."""
        if now.step % self._every:
            return
        with now.clock.pause(now.state):
            self._pipeline.params = now.state.ema_params
            pictures.save_png(self._folder / f"step_{now.step:07d}.png", self._sheet())

    def _sheet(self) -> np.ndarray:
        pipeline, examples = self._pipeline, self._examples
        modalities, count = pipeline.modulator.modalities, len(self._examples["image"])
        height, width, _ = pipeline.base.latent_shape
        conditions = {m.name: m.resize_all(examples[m.name], height, width) for m in modalities}
        prompts = list(map(str, examples["caption"])) if pipeline.base.is_text_conditional else None
        keys = sampling.sample_keys(0, count)
        rows = [pictures.show(m, examples[m.name]) for m in modalities]
        alone = pipeline(conditions, keys, prompts=prompts, guidance=0.0, batch_size=count)
        controlled = pipeline(conditions, keys, prompts=prompts, batch_size=count)
        return pictures.grid([*rows, pictures.to_uint8(alone), pictures.to_uint8(controlled)])
