"""What the paper leaves open, one choice changed at a time, each at three learning rates: no form loses by its rate.

python train.py --config=configs/scenes.py --sweep=configs/sweeps/paper_choices.py --workdir=runs/paper_choices
python train.py --config=configs/scenes_sd.py --sweep=configs/sweeps/paper_choices.py --workdir=runs/paper_choices_sd

66 trials of the size `tiny` from one cache, 500 steps each: 11 choices, 3 rates, 2 seeds. What a choice does not name
is as in OURS, conditions on the latent grid; docs/mcm.md explains each. On scenes-sd expect a mean IoU of 0.583 for
OURS at the rate 0.004, 0.605 for the drop rate 0.1, 0.539 for the paper's form, 0.466 for the bare product, each within
0.01, by --config.sampling.sampler=ddim, the default then; on scenes 0.652, 0.691, 0.508 (at 0.001) and 0.354, within
0.03, by euler (docs/mcm.md). An hour and a half on two cores that have other work.
"""

from configs import default
from mcm_jax import sweep

METRIC = "mean_iou"  # losses of different weightings do not compare

OURS = {
    "mcm.conditions": "grid",  # the paper's, and one cache for all
    "mcm.residual_scale": True,
    "mcm.shift_space": "x0",
    "mcm.inputs": ("x_t", "eps", "x0"),
    "loss.weighting": "v",
    "loss.l1": 0.0,
    "modalities.drop_rate": 0.3,
}
CHOICES = {
    "ours": {},
    "bare product": {"mcm.residual_scale": False},
    "shift in eps": {"mcm.shift_space": "eps"},
    "inputs x_t, eps": {"mcm.inputs": ("x_t", "eps")},
    "weighting eps": {"loss.weighting": "eps"},
    "weighting x0": {"loss.weighting": "x0"},
    "weighting min-SNR": {"loss.weighting": "min_snr"},
    "L1 0.15": {"loss.l1": 0.15},
    "drop rate 0.1": {"modalities.drop_rate": 0.1},
    "drop rate 0.5": {"modalities.drop_rate": 0.5},
    "the paper's form": {"mcm.shift_space": "eps", "mcm.inputs": ("x_t", "eps"), "loss.weighting": "eps"},
}


def get_hyper():
    return sweep.product(
        [default.SHORT | default.sized("tiny")],
        sweep.choices("choice", {name: OURS | changes for name, changes in CHOICES.items()}),
        sweep.values("train.learning_rate", [1e-3, 2e-3, 4e-3]),
        sweep.values("seed", [0, 1]),
    )
