"""Learning rate by size of the MCM, on the scenes: which rate each size wants, and what size is worth at its own.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/learning_rate_size.py --workdir=runs/sizes

24 trials from one cache.
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
SIZES = ("tiny", "small", "medium", "large")


def get_hyper():
    return sweep.product(
        [default.SHORT],
        sweep.choices("size", {name: default.sized(name) for name in SIZES}),
        sweep.values("train.learning_rate", [1e-3, 2e-3, 4e-3]),
        sweep.values("seed", [0, 1]),
    )
