"""The paper's unconditional landscapes: latent diffusion on mountains, with segmentation and sketch.

python train.py --config=configs/mountains_ldm.py --workdir=runs/mountains_ldm \
    --config.base.path=FOLDER --config.data.path=data/mountains

The paper's base, trained on Flickr Mountains, is not public. FOLDER is any LDMPipeline folder (a VQModel, a
UNet2DModel): your own, or one that diffusers converted. data/mountains is laid out as docs/data.md says; the
segmentation has as many classes as config.modalities.segmentation.channels. Network, form and training are the paper's,
as in configs/celeba_ldm.py, which has the line that takes ours. Not trained by us yet. The 200,000 steps are for tens
of thousands of pictures: take --config.train.steps in proportion, 8,000 for 1,000 (docs/cache.md).
"""

from configs import celeba_ldm


def get_config():
    c = celeba_ldm.get_config()
    c.base.path = "data/mountains_ldm"
    c.data.path = "data/mountains"
    c.modalities.segmentation.channels = 8
    return c
