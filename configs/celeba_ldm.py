"""The paper's unconditional faces: latent diffusion on CelebA-HQ 256 with 19-class segmentation and sketch.

python train.py --config=configs/celeba_ldm.py --workdir=runs/celeba_ldm --config.data.path=data/celebahq

data/celebahq is laid out as docs/data.md says; label maps are those of CelebAMask-HQ, its parts merged into one PNG a
face. The base is downloaded from the Hugging Face Hub (pip install -e '.[hub]'), or read from
--config.base.path=FOLDER (one with .bin files needs '.[torch]').

Network, form and training are the paper's: 3.87M parameters, 1.4% of the base's 274M; batch 64, learning rate 1e-5.
Ours reaches more control in fewer steps on small bases (docs/mcm.md): --config.mcm.inputs="('x_t','eps','x0')"
--config.mcm.shift_space=x0 --config.mcm.conditions=encoder --config.loss.weighting=v --config.train.learning_rate=1e-3.
Not trained by us yet. CelebA's 24,183 training pictures with 50 cached draws each (28 GiB) are seen 11 times a draw;
take --config.train.steps in proportion to your number of pictures (docs/cache.md, "How many draws").
"""

from configs import default


def get_config():
    c = default.get_config()
    c.base.path = "CompVis/ldm-celebahq-256"
    c.base.dtype = "bfloat16"
    c.data.name = "folder"
    c.data.path = "data/celebahq"
    c.cache.mode = "build"
    c.draws.count = 50
    c.cache.load_base = True
    c.modalities.segmentation.channels = 19
    default.paper(c)
    c.train.steps = 200_000
    c.train.checkpoint_every = 5_000
    c.train.validate_every = 5_000
    c.sampling.sampler = ""  # the base's own
    c.sampling.steps = 50
    return c
