"""Control against size: each trained for 4,200 steps, at rates about that which learning_rate_size.py found.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/size.py --workdir=runs/size

22 trials from one cache; 143 minutes of steps on two cores, by what a step costs (docs/peers.md). Expect a mean IoU of
0.885 +- 0.009 of tiny and 0.896 +- 0.008 of small at 0.004, 0.932 +- 0.003 of medium at 0.004 (0.930 at 0.002), 0.939
+- 0.003 of large at 0.001 (docs/mcm.md).
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
WHOLE = {"data.size": 4_000, "train.steps": 4_200, "train.evaluate_every": 4_200, "train.held_out": 64}
RATES = {
    "tiny": (2e-3, 4e-3, 8e-3),
    "small": (2e-3, 4e-3, 8e-3),
    "medium": (1e-3, 2e-3, 4e-3),
    "large": (5e-4, 1e-3),  # in short trainings it falls back to the base at 0.002
}


def get_hyper():
    each = []
    for name, rates in RATES.items():
        size = sweep.choices("size", {name: default.sized(name)})
        each += sweep.product(size, sweep.values("train.learning_rate", rates))
    return sweep.product([WHOLE], each, sweep.values("seed", [0, 1]))
