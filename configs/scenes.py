"""The shipped MCM: an MCM of 8% of scenes-ddpm, segmentation and sketch.

python train.py --config=configs/scenes.py --workdir=runs/scenes
python evaluate.py --workdir=runs/scenes --out=runs/scenes/metrics.json

39 minutes on 2 shared CPU cores; mean IoU over 256 maps 0.98 with both conditions, 0.91 with the sketch alone.
"""

from configs import default


def get_config():
    c = default.get_config()
    c.mcm.update(default.SIZES["medium"])
    c.data.size = 4_000
    c.draws.count = 4
    c.cache.mode = "build"
    c.cache.load_base = True
    c.modalities.drop_rate = 0.4
    c.train.steps = 4_200
    c.train.learning_rate = 2e-3
    c.train.ema_decay = 0.998
    c.train.checkpoint_every = 700
    c.train.validate_every = 1_400
    c.sampling.steps = 16
    c.sampling.guidance = 1.5
    c.evaluation.expected = dict(both="at least 0.87", sketch="at least 0.62")
    return c
