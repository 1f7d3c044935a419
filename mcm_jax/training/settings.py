"""The settings of a training run: its own section, and all sections together."""

import dataclasses

from mcm_jax.base import BaseCard, BaseSettings
from mcm_jax.cache import CacheSettings
from mcm_jax.data import DataSettings
from mcm_jax.draws import Draws, DrawsSettings, expect_seed
from mcm_jax.errors import expect
from mcm_jax.evaluation.evaluate import EvaluationSettings
from mcm_jax.losses import LossSettings
from mcm_jax.mcm import MCMSettings
from mcm_jax.modalities import ModalitiesSettings
from mcm_jax.sampling import SamplingSettings


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The config's section ``train``.

    Attributes:
      steps: optimizer steps.
      batch_size: over all devices.
      learning_rate: the highest.
      warmup_steps: linear, then cosine decay to zero.
      weight_decay: decoupled.
      clip_norm: of the gradient; 0 is off.
      ema_decay: of the averaged params, which sample.
      log_every: steps between reports.
      checkpoint_every: steps between checkpoints.
      keep: how many of the newest checkpoints stay.
      validate_every: steps between validation pictures; 0 is never.
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 50
    checkpoint_every: int = 500
    keep: int = 2
    validate_every: int = 1_000

    def __post_init__(self):
        for key in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
            expect(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "clip_norm", "validate_every"):
            expect(getattr(self, key) >= 0, key, "at least 0", getattr(self, key))
        expect(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)
        expect(0 <= self.ema_decay <= 1, "ema_decay", "in [0, 1]", self.ema_decay)
        expect(self.ema_decay < 1, "ema_decay", "below 1: at 1 the average never moves", self.ema_decay)


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

    def __post_init__(self):
        expect_seed(self.seed)
        views, count = self.data.views, self.draws.count
        expect(views <= count, "data.views", f"at most draws.count ({count}): each draw sees one view", views)
        self.data.check_holds(self.modalities.shown)

    def draws_for(self, card: BaseCard) -> Draws:
        """What is drawn of each example, for a base. Raises UserError where the density has too many parts."""
        return self.draws.of(card.schedule, self.data.prompt_drop_rate if card.is_text_conditional else 0.0)
