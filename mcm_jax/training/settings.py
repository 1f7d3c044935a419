"""The settings of a training run: its own section, and all sections together."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mcm_jax import config as config_lib
from mcm_jax.base import BaseCard, BaseSettings
from mcm_jax.cache import CacheSettings
from mcm_jax.config import setting
from mcm_jax.data import DataSettings
from mcm_jax.data.discover import NONE, discover
from mcm_jax.draws import Draws, DrawsSettings, expect_seed
from mcm_jax.errors import UserError, expect
from mcm_jax.evaluation.evaluate import EvaluationSettings
from mcm_jax.losses import LossSettings
from mcm_jax.mcm import MCMSettings
from mcm_jax.modalities import ModalitiesSettings, Modality
from mcm_jax.sampling import SamplingSettings
from mcm_jax.sharding import MeshSettings
from mcm_jax.training.optimizer import OPTIMIZERS, SCHEDULES


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The config's section ``train``.

    Attributes:
      steps: optimizer steps.
      batch_size: examples of a step, over all devices and micro-batches.
      accumulate: micro-batches that a batch is worked through in, one after the other: less memory, the same step.
      init_from: a folder, or a shipped name, whose MCM training begins with, in place of a fresh one; '' for none.
      optimizer: ``adamw``, ``lion``, ``muon``: see mcm_jax/training/optimizer.py.
      learning_rate: the highest.
      schedule: of the learning rate after a linear warm-up: ``cosine`` or ``linear`` to zero, ``constant``, ``wsd``
        (constant, then linear to zero). A run of the last two can be made longer later.
      warmup_steps: of the learning rate.
      decay_steps: the last steps, in which ``wsd`` decays.
      weight_decay: decoupled.
      clip_norm: of the gradient; 0 is off.
      ema_decay: of the averaged params, which sample.
      log_every: steps between reports.
      checkpoint_every: steps between checkpoints.
      keep: how many of the newest checkpoints stay.
      best: which number of the evaluations while training tells the best MCM, kept in ``best/``: ``held_out_loss``,
        ``held_out_mse``; ``mean_iou``, ``edge_f1``, ``ms_ssim``, ``depth_rmse``, ``delta_e``, ``angular_error``,
        ``pck``, ``clip_score``, ``facts`` of the judges (section ``evaluation``). '' keeps none.
      validate_every: steps between validation pictures; 0 is never.
      evaluate_every: steps between evaluations on held-out examples; 0 is never.
      held_out: examples of these.
      wandb: project of Weights & Biases that reports go to as well (extra ``wandb``); '' for none.
    """

    steps: int = 10_000
    batch_size: int = 32
    accumulate: int = 1
    init_from: str = ""
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 1_000
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2
    best: str = ""
    validate_every: int = 1_000
    evaluate_every: int = 0
    held_out: int = 64
    wandb: str = ""

    def __post_init__(self):
        expect(self.optimizer in OPTIMIZERS, "optimizer", f"one of {', '.join(OPTIMIZERS)}", self.optimizer)
        expect(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self.schedule)
        for key in ("steps", "batch_size", "accumulate", "decay_steps", "log_every", "checkpoint_every", "keep"):
            expect(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        expect(self.held_out >= 1, "held_out", "at least 1", self.held_out)
        for key in ("warmup_steps", "weight_decay", "clip_norm", "validate_every", "evaluate_every"):
            expect(getattr(self, key) >= 0, key, "at least 0", getattr(self, key))
        expect(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        expect(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]", self.ema_decay)
        expect(self.ema_decay < 1, "ema_decay", "below 1: at 1 the average never moves", self.ema_decay)
        wanted = "'' where train.evaluate_every is 0: it is one of the evaluations' numbers"
        expect(not self.best or self.evaluate_every > 0, "best", wanted, self.best)

    @property
    def stable_until(self) -> int | None:
        """The step from which a ``wsd`` run decays: up to there it is that of any longer one. None for others."""
        return max(0, self.steps - self.decay_steps) if self.schedule == "wsd" else None


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All that a config says.

    Attributes:
      seed: of initial weights, order and modality drops.
    """

    seed: int = 0
    base: BaseSettings = BaseSettings()
    data: DataSettings = DataSettings()
    draws: DrawsSettings = DrawsSettings()
    cache: CacheSettings = CacheSettings()
    modalities: ModalitiesSettings = ModalitiesSettings()
    mcm: MCMSettings = MCMSettings()
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    mesh: MeshSettings = setting(MeshSettings(), before=MeshSettings())

    def __post_init__(self):
        expect_seed(self.seed)
        views, count = self.data.views, self.draws.count
        expect(views <= count, "data.views", f"at most draws.count ({count}): each draw sees one view", views)
        self.data.check_holds(self.modalities.shown)

    def check_new(self) -> None:
        """Raises UserError for what a run that begins may not have; older ones, which go on, may."""
        self.modalities.check_new()
        self.mcm.check_new()

    def held_out(self) -> "RunSettings":
        """The same for the held-out examples: so many, as they are, with draws of their own that never change."""
        data = dataclasses.replace(self.data.without_views(), size=self.train.held_out)
        draws = dataclasses.replace(self.draws, seed=(self.draws.seed + 1) % 2**32)
        return dataclasses.replace(self, data=data, draws=draws)

    def draws_for(self, card: BaseCard) -> Draws:
        """What is drawn of each example, for a base. Raises UserError where the density has too many parts."""
        return self.draws.of(card.schedule, self.data.prompt_drop_rate if card.is_text_conditional else 0.0)


def read_run(
    config: Any, workdir: str | os.PathLike | None = None, known: Sequence[Modality] | None = None
) -> RunSettings:
    """The settings of a run.

    Where the config leaves it to ``data.discover``, the modalities are the `known` ones, or those of the workdir's own
    config, or else what is found in the folder of pairs, which is printed. What the config says of them counts before
    that; of the kind ``none`` is one that is left out.

    Raises:
      UserError: a key is wrong, or the folder is not what docs/data.md says.
    """
    given = config_lib.given(config)
    data, said = given.get("data"), given.get("modalities")
    if not (isinstance(data, dict) and isinstance(said, dict) and data.get("discover") is True):
        if isinstance(said, dict):
            kept = {k: v for k, v in said.items() if not (isinstance(v, dict) and v.get("kind") == NONE)}
            given = given | {"modalities": kept}
        return _checked(config_lib.read(RunSettings, given))
    source = config_lib.read(DataSettings, data, where="config.data")
    own = {name: section for name, section in said.items() if isinstance(section, dict)}
    if known is not None:
        there = known
    elif workdir is not None and (pathlib.Path(workdir).expanduser() / config_lib.FILE).is_file():
        there = config_lib.load(RunSettings, pathlib.Path(workdir).expanduser()).modalities.shown
    else:
        print(found := discover(source.path, own, source.held_out_share))
        there = [finding.modality for finding in found.findings]
    sections = {m.name: {"kind": m.kind, "channels": m.channels, "ignore": m.ignore} for m in there}
    for name, section in own.items():
        sections[name] = sections.get(name, {}) | section
    rest = {key: value for key, value in said.items() if key not in own}
    rest |= {name: section for name, section in sections.items() if section.get("kind") != NONE}
    return _checked(config_lib.read(RunSettings, given | {"data": data | {"discover": False}, "modalities": rest}))


def _checked(run: RunSettings) -> RunSettings:
    """The same.

    Raises:
      UserError: a judge is named for what is no modality (any name can be typed); a dtype that does not train.
    """
    if run.mcm.dtype == "float16":
        raise UserError(
            "config.mcm.dtype: found float16, expected float32 or bfloat16 to train in: float16 wants the loss scaled "
            "lest small gradients become 0, and nothing here does. sample.py --dtype=float16 computes in it"
        )
    known = [m.name for m in (*run.modalities.shown, *run.data.holds)] + ["caption", "fidelity"]
    if odd := sorted(name for name, spec in run.evaluation.judges.items() if spec and name not in known):
        names = ", ".join(dict.fromkeys(known))
        raise UserError(f"config.evaluation.judges.{odd[0]}: no modality of this run; expected one of {names}")
    return run
