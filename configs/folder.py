"""Your own pairs, with nothing to configure: modalities, kinds and numbers of classes are found in the folder.

python train.py --config=configs/folder.py --workdir=runs/mine --config.data.path=DATA
python evaluate.py --workdir=runs/mine --out=runs/mine/metrics.json

DATA is as docs/data.md says. What was found is printed and written into the workdir's config; any of it is overridden
as any key is, e.g. --config.modalities.depth.kind=map. The steps suit some hundreds of pairs on the shipped base; for
thousands take --config.train.steps=4200 --config.draws.count=4.
"""

from configs import default
from mcm_jax import config
from mcm_jax.modalities import ModalitiesSettings


def get_config():
    c = default.get_config()
    c.data.name = "folder"
    c.data.discover = True
    c.modalities = config.undecided(ModalitiesSettings)
    c.modalities.drop_rate = 0.4
    c.mcm.update(default.SIZES["medium"])
    c.draws.count = 16
    c.cache.mode = "build"
    c.cache.load_base = True
    c.train.steps = 1_500
    c.train.learning_rate = 2e-3
    c.train.ema_decay = 0.998
    c.train.checkpoint_every = 500
    c.train.validate_every = 500
    c.sampling.steps = 16
    c.sampling.guidance = 1.5
    return c
