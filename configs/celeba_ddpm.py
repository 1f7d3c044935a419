"""A pixel base of the paper's kind: google/ddpm-celebahq-256, 113.7M parameters, faces of 256x256 pixels.

python train.py --config=configs/celeba_ddpm.py --workdir=runs/celeba_ddpm --config.data.path=data/celebahq

Data and base as in configs/celeba_ldm.py. The grid is 256x256, so the MCM's levels are 256, 128, 64 and 32 wide, and
attention is left to the middle block. Not trained by us yet.
"""

from configs import celeba_ldm


def get_config():
    c = celeba_ldm.get_config()
    c.base.path = "google/ddpm-celebahq-256"
    c.cache.mode, c.draws.count = "off", 5  # a prediction of 256x256x3 takes 384 KiB
    c.mcm.attention = (0, 0, 0, 0)
    c.train.batch_size = 16
    return c
