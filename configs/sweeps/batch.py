"""Batch size at equal numbers of examples seen: many small steps, or few large ones.

python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/batch.py --workdir=runs/batch

32 trials from one cache, 25 minutes on two cores. Expect a mean IoU of 0.658, 0.656, 0.650, 0.631 at 8, 16, 32, 64,
each at 0.008, within 0.01 (docs/training.md).
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"
EXAMPLES = 16_000
SHORT = {k: v for k, v in default.SHORT.items() if k not in ("train.steps", "train.evaluate_every")}


def batch_of(size):
    steps = EXAMPLES // size
    return {"train.batch_size": size, "train.steps": steps, "train.evaluate_every": steps}


def get_hyper():
    return sweep.product(
        [SHORT | default.sized("tiny")],
        sweep.choices("batch", {str(size): batch_of(size) for size in (8, 16, 32, 64)}),
        sweep.values("train.learning_rate", [1e-3, 2e-3, 4e-3, 8e-3]),
        sweep.values("seed", [0, 1]),
    )
