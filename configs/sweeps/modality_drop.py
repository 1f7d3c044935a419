"""How often training hides a modality: control by one condition alone against control by both.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/modality_drop.py --workdir=runs/modality_drop

10 trials from one cache. results.md ranks by control with both conditions, which hiding can only cost; what it buys,
control by one alone, evaluate.py shows: python evaluate.py --workdir=runs/modality_drop/NAME --out=METRICS.json
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
