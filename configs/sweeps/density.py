"""Which timesteps to train at: densities over parts of 0..T-1, whose importance weights keep the loss what it is.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/density.py --workdir=runs/density

20 trials, 5 caches, as the cache holds the draws. Expect a mean IoU at 0.008 of 0.650 +- 0.009 for uniform, 0.650 for
noisy, 0.640 for middle, 0.634 for clean, 0.628 +- 0.012 for ends (docs/training.md).
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
DENSITIES = {"uniform": [1.0], "clean": [3.0, 1.0], "noisy": [1.0, 3.0], "middle": [1, 3, 1], "ends": [3, 1, 3]}


def get_hyper():
    return sweep.product(
        [default.SHORT | default.sized("tiny")],
        sweep.choices("timesteps", {name: {"draws.density": density} for name, density in DENSITIES.items()}),
        sweep.values("train.learning_rate", [4e-3, 8e-3]),
        sweep.values("seed", [0, 1]),
    )
