"""Draws a picture: how many of the base's predictions a cache must hold, at the same number of training steps.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/draws.py --workdir=runs/draws

10 trials, 5 caches: one for each number of draws, as the cache is what is swept; 31 draws of 1,500 pictures to predict.
So short a training sees no difference: expect a mean IoU of 0.60 for each, 0.600 +- 0.014 at 1, 0.606 +- 0.001 at 4,
0.600 +- 0.003 at 16 (docs/cache.md has what longer ones see).
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
