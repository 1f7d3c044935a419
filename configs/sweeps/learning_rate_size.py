"""Learning rate by size of the MCM: which rate each size wants, and what size is worth at its own.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/learning_rate_size.py --workdir=runs/sizes

24 trials from one cache, 35 minutes on two cores. Expect a mean IoU of 0.64 +- 0.01 of tiny and 0.62 +- 0.01 of small
at 0.004, 0.65 +- 0.01 of medium at 0.002 (0.65 +- 0.05 at 0.004), 0.66 +- 0.03 of large at 0.001; large falls back to
the base (0.45) from 0.002 on. So short a training sees little of size: size.py trains to the end.
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
