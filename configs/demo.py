"""The README's demo: control over scenes-ddpm in minutes on two CPU cores.

make demo
"""

from configs import default


def get_config():
    c = default.get_config()
    c.mcm.update(default.SIZES["medium"])
    c.data.size = 2_000
    c.train.steps = 800
    c.train.batch_size = 32
    c.train.learning_rate = 2e-3
    c.train.ema_decay = 0.99
    c.train.checkpoint_every = 400
    c.train.validate_every = 0
    c.sampling.guidance = 1.0
    c.evaluation.maps = 64
    c.evaluation.expected = dict(both="at least 0.70", base="at most 0.40")
    return c
