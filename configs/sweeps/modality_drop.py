"""How often training hides a modality: control by one condition alone against control by both.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/modality_drop.py --workdir=runs/modality_drop

10 trials from one cache, about 15 minutes on two cores. results.md ranks by control with both conditions, which hiding
can only cost: expect a mean IoU of 0.72 at 0, 0.64 at 0.1, 0.62 at 0.3, 0.58 at 0.5, 0.54 at 0.7. What it buys, control
by one alone: docs/mcm.md, by python -m benchmarks.sweep_subsets --sweep=runs/modality_drop --axis=drop_rate --out=FILE.
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"


def get_hyper():
    return sweep.product(
        [default.SHORT | default.sized("tiny")],
        sweep.values("modalities.drop_rate", [0.0, 0.1, 0.3, 0.5, 0.7]),
        sweep.values("seed", [0, 1]),
    )
