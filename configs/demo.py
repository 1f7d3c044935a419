"""The README's demo: control over scenes-ddpm in minutes on two CPU cores.

make demo

9 to 10 minutes on 2 CPU cores; mean IoU over 64 maps 0.85 with both conditions, 0.33 for the base alone.
"""

from configs import default


def get_config():
    c = default.get_config()
    c.mcm.update(default.SIZES["medium"])
    c.data.size = 1_500
    c.draws.count = 3
    c.cache.mode = "build"
    c.train.steps = 600
    c.train.batch_size = 32
    c.train.learning_rate = 2e-3
    c.train.ema_decay = 0.99
    c.train.checkpoint_every = 300
    c.train.validate_every = 0
    c.sampling.steps = 16
    c.sampling.guidance = 1.25
    c.evaluation.maps = 64
    c.evaluation.diversity_conditions = 8
    c.evaluation.diversity_seeds = 2
    c.evaluation.expected = dict(both="at least 0.70", base="at most 0.40")
    return c
