"""Draws a picture: how many of the base's predictions a cache must hold, at the same number of training steps.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/draws.py --workdir=runs/draws

10 trials, 5 caches: one for each number of draws, as the cache is what is swept.
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"


def get_hyper():
    return sweep.product(
        [default.SHORT | default.sized("tiny")],
        sweep.values("draws.count", [1, 2, 4, 8, 16]),
        sweep.values("seed", [0, 1]),
    )
