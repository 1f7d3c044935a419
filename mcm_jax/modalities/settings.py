"""The config's section ``modalities``."""

import dataclasses

from mcm_jax.errors import UserError, expect
from mcm_jax.modalities.modality import Modality

# What else an example or a record holds.
_TAKEN = ("image", "latent", "caption", "prompt", "index", "draw", "seen", "present")
_TAKEN += ("t", "eps", "eps_scale", "noise", "x_t", "shown", "drop_rate")
# Rows of an evaluation, a judge of no modality, and what a picture's settings say beside its conditions.
_UNCLEAR = ("all", "both", "base", "real", "shuffled", "unprompted", "autoencoder", "fidelity")
_UNCLEAR += ("base_path", "device", "file", "versions", "workdir")
TAKEN = f"this name is taken, as are {', '.join(_TAKEN + _UNCLEAR)}"
"""For messages."""


@dataclasses.dataclass(frozen=True)
class ModalitiesSettings:
    """The conditions, each by its name with ``kind`` and ``channels``. The config's section ``modalities``.

    Attributes:
      shown: each :class:`Modality`, in the order of their names. ``ignore``, the value of label pixels that means
        unknown, may be left out.
      drop_rate: how often training hides each modality, independently.
    """

    shown: tuple[Modality, ...] = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
    drop_rate: float = 0.3

    def __post_init__(self):
        expect(0 <= self.drop_rate <= 1, "drop_rate", "in [0, 1]", self.drop_rate)
        expect(self.drop_rate < 1, "drop_rate", "below 1: at 1 no condition is ever seen", self.drop_rate)
        if not self.shown:
            raise UserError("shown must have a modality at least: a section by its name, with kind and channels")
        if taken := [m.name for m in self.shown if m.name in _TAKEN]:
            raise UserError(f"{taken[0]}: {TAKEN}; choose another")

    def check_new(self) -> None:
        """Raises UserError for what older runs may have, and new ones may not: names that mean two things."""
        if taken := [m.name for m in self.shown if is_taken(m.name)]:
            raise UserError(f"config.modalities.{taken[0]}: {TAKEN}; choose another")


def is_taken(name: str) -> bool:
    """Whether a new run may not call a modality so."""
    return name in _TAKEN + _UNCLEAR
