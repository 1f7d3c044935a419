"""Every key at its default: docs/config.md lists them with their meaning. Configs override a few, the command line any.

python train.py --config=configs/default.py --workdir=runs/default --config.train.steps=100
"""

from typing import Any

import ml_collections

from mcm_jax import config
from mcm_jax.training import RunSettings

# Shapes of the MCM for small bases; the share is that of the shipped base scenes-ddpm (5.55M parameters).
# "paper" is the network of the paper's table, 3.9M parameters, for bases with grids of 64x64.
SIZES = {
    "tiny": dict(channels=8, multipliers=(1, 1, 2), blocks=1, attention=(0, 0, 0), head_dim=0, groups=8),  # 0.9%
    "small": dict(channels=8, multipliers=(1, 2, 4), blocks=1, attention=(0, 0, 0), head_dim=0, groups=8),  # 2.9%
    "medium": dict(channels=16, multipliers=(1, 2, 3), blocks=1, attention=(0, 1, 1), head_dim=16, groups=8),  # 8.5%
    "large": dict(channels=32, multipliers=(1, 2, 3), blocks=1, attention=(0, 1, 1), head_dim=16, groups=8),  # 33%
    "paper": dict(channels=32, multipliers=(1, 1, 2, 4), blocks=2, attention=(0, 0, 1, 0), head_dim=0, groups=32),
}

# What the shipped sweeps train, for any size: far from converged, to compare.
SHORT = {
    "data.size": 1_500,
    "train.steps": 500,
    "train.checkpoint_every": 100,  # what a kill can lose
    "train.evaluate_every": 500,
    "train.held_out": 64,
    "sampling.steps": 12,
    "sampling.guidance": 1.0,
}


def sized(name: str) -> dict[str, Any]:
    """Overrides of a config's keys that give the MCM one of :data:`SIZES`."""
    return {f"mcm.{key}": value for key, value in SIZES[name].items()}


def paper_form(c: ml_collections.ConfigDict) -> None:
    """Sets what the MCM sees, what it changes and what it is trained for to the paper's (docs/mcm.md)."""
    c.mcm.update(inputs=("x_t", "eps"), shift_space="eps", conditions="grid")
    c.loss.weighting = "eps"


def paper(c: ml_collections.ConfigDict) -> None:
    """Sets the network, form and training to the paper's, where known."""
    c.mcm.update(SIZES["paper"])
    paper_form(c)
    c.train.batch_size = 64
    c.train.learning_rate = 1e-5


def get_config() -> ml_collections.ConfigDict:
    """The defaults of all settings; docs/config.md lists them with their meaning."""
    return config.default(RunSettings)
