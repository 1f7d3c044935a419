"""How many groups the normalisations have: with as many as the first level has channels, a channel's level is lost.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/groups.py --workdir=runs/groups_sd
python train.py --config=configs/emoji.py --sweep=configs/sweeps/groups.py --workdir=runs/groups_emoji
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
TINY = {key: value for key, value in default.sized("tiny").items() if key != "mcm.groups"}


def get_hyper():
    return sweep.product(
        [default.SHORT | TINY],
        sweep.values("mcm.groups", [8, 4, 2, 1]),
        sweep.values("train.learning_rate", [4e-3, 8e-3]),
        sweep.values("seed", [0, 1]),
    )
