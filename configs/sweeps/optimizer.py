"""Optimizer and schedule, each over five learning rates, which one rate cannot compare.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/optimizer.py --workdir=runs/optimizer
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
WAYS = {
    "adamw, cosine": {"train.optimizer": "adamw", "train.schedule": "cosine"},
    "adamw, wsd": {"train.optimizer": "adamw", "train.schedule": "wsd", "train.decay_steps": 100},
    "muon, cosine": {"train.optimizer": "muon", "train.schedule": "cosine"},
    "muon, wsd": {"train.optimizer": "muon", "train.schedule": "wsd", "train.decay_steps": 100},
}


def get_hyper():
    return sweep.product(
        [default.SHORT | default.sized("tiny")],
        sweep.choices("way", WAYS),
        sweep.values("train.learning_rate", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]),
        sweep.values("seed", [0, 1]),
    )
