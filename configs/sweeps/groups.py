"""How many groups the normalisations have: with as many as the first level has channels, a channel's level is lost.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/groups.py --workdir=runs/groups_sd
python train.py --config=configs/emoji.py --sweep=configs/sweeps/groups.py --workdir=runs/groups_emoji
python train.py --config=configs/scenes.py --sweep=configs/sweeps/groups.py --workdir=runs/groups

16 trials of the size `tiny` from one cache. Expect a mean IoU of 0.656, 0.638, 0.632,
0.632 with 8, 4, 2 and 1 groups on scenes-sd, 0.135, 0.387, 0.552, 0.602 on emoji, each at 0.008, and 0.641 (at 0.008),
0.701, 0.728, 0.721 (at 0.004) on scenes, within 0.04 (docs/mcm.md).
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
