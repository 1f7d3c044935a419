"""Optimizer and schedule, each over five learning rates, which one rate cannot compare.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/optimizer.py --workdir=runs/optimizer

40 trials from one cache, 20 minutes on two cores. Expect a mean IoU of 0.650 +- 0.009 of AdamW by cosine and 0.653 +-
0.005 by wsd, both at 0.008; 0.644 and 0.668 +- 0.007 of Muon, at 0.016 and 0.008 (docs/training.md).
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
