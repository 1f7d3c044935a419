"""Control against size: each size trained to the config's end, at the two rates that short training leaves in question.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/size.py --workdir=runs/size
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
WHOLE = {"data.size": 4_000, "train.steps": 4_200, "train.evaluate_every": 4_200, "train.held_out": 64}


def get_hyper():
    return sweep.product(
        [WHOLE],
        sweep.choices("size", {name: default.sized(name) for name in ("tiny", "small", "medium", "large")}),
        sweep.values("train.learning_rate", [2e-3, 4e-3]),
        sweep.values("seed", [0, 1]),
    )
