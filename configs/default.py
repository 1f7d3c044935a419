"""Every key that a config has, with its default and meaning. Experiments override a few; the command line any.

python train.py --config=configs/default.py --workdir=runs/default --config.train.steps=100
"""

import ml_collections

# Shapes of the MCM for small bases; the share is that of the shipped base scenes-ddpm (5.55M parameters).
# "paper" is the network of the paper's table, 3.9M parameters, for bases with grids of 64x64.
SIZES = {
    "tiny": dict(channels=8, multipliers=(1, 1, 2), blocks=1, attention=(0, 0, 0), head_dim=0, groups=8),  # 0.9%
    "small": dict(channels=8, multipliers=(1, 2, 4), blocks=1, attention=(0, 0, 0), head_dim=0, groups=8),  # 2.9%
    "medium": dict(channels=16, multipliers=(1, 2, 3), blocks=1, attention=(0, 1, 1), head_dim=16, groups=8),  # 8.5%
    "large": dict(channels=32, multipliers=(1, 2, 3), blocks=1, attention=(0, 1, 1), head_dim=16, groups=8),  # 33%
    "paper": dict(channels=32, multipliers=(1, 1, 2, 4), blocks=2, attention=(0, 0, 1, 0), head_dim=0, groups=32),
}


def paper_form(c: ml_collections.ConfigDict) -> None:
    """Sets what the MCM sees, what it changes and what it is trained for to the paper's (docs/mcm.md)."""
    c.mcm.update(inputs=("x_t", "eps"), shift_space="eps")
    c.loss.weighting = "eps"


def paper(c: ml_collections.ConfigDict) -> None:
    """Sets the network, form and training to the paper's, where known."""
    c.mcm.update(SIZES["paper"])
    paper_form(c)
    c.train.batch_size = 64
    c.train.learning_rate = 1e-5


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0  # of everything: initial weights, order, noise, drops

    c.base = dict(
        path="scenes-ddpm",  # a folder in diffusers format, or the name of a shipped one
        dtype="float32",  # of the frozen weights and the base's computation: float32, bfloat16, float16
    )
    c.data = dict(
        name="scenes",  # procedural landscapes, at the base's resolution; or folder: your own pairs
        path="",  # of a folder of pairs, see docs/data.md
        size=2_000,  # training examples of scenes
        seed=2,  # of scenes: another seed is another data set; 0 trained the base, 1 the segmentation net
        prompt_drop_rate=0.1,  # how often the base is shown the empty prompt; for text-conditional bases
        views=1,  # augmented versions of each example, the first one as it is; see docs/data.md
        flip=False,  # every other view is mirrored
        crop=1.0,  # the least share of the picture's sides that a view shows
    )
    c.draws = dict(  # timestep, noise, view and prompt drop of each example
        count=5,  # what a cache holds of each; online, new ones come without end, and each 5 cover all timesteps
        seed=0,  # apart from the run's: a cache serves any config.seed
        density=(1.0,),  # of timesteps over equal parts of 0..T-1; importance weights keep the loss unbiased
    )
    c.cache = dict(  # of the base's predictions, see docs/cache.md
        mode="off",  # off: the base predicts each batch; on: a cache serves in its place; build: that, made if needed
        path="",  # a folder; '' is the workdir's own
        dtype="float16",  # of the predictions on disk: float16, bfloat16, float32, int8
        shard_draws=1_024,  # predictions in a file: what a kill can lose
        batch_size=32,  # predictions at a time, over all devices
        verify=True,  # all checksums before training
        load_base=False,  # for validation pictures, which are left to sample.py otherwise
    )
    c.modalities = dict(  # kind: labels (classes), map (values in [0, 1]), lines (a map, black lines on white)
        segmentation=dict(kind="labels", channels=6),
        sketch=dict(kind="lines", channels=1),
        drop_rate=0.3,  # how often training hides each modality, independently
    )
    c.mcm = dict(
        **SIZES["paper"],
        inputs=("x_t", "eps", "x0"),  # x0: the base's estimate (ours; the paper: x_t, eps)
        shift_space="x0",  # the shift as a bounded change of x0 (ours), or eps (the paper)
        residual_scale=True,  # eps * (1 + gamma), or False: eps * gamma
        x0_clip=1.0,  # bound of the estimate of x0
        dtype="float32",
    )
    c.loss = dict(
        weighting="v",  # v (ours), eps (the paper's descendant), x0, min_snr: see mcm_jax/losses.py
        l1=0.0,  # pull of gamma and nu to zero; VCM: 0.15
    )
    c.train = dict(
        steps=10_000,
        batch_size=32,  # over all devices
        learning_rate=1e-3,
        warmup_steps=100,  # linear, then cosine decay to zero
        weight_decay=0.01,
        clip_norm=1.0,  # of the gradient; 0 is off
        ema_decay=0.999,
        log_every=50,
        checkpoint_every=500,
        keep=2,  # checkpoints
        validate_every=1_000,  # pictures; 0 is never
    )
    c.sampling = dict(
        sampler="ddim",  # or ddpm (ancestral)
        steps=25,
        eta=0.0,  # of ddim
        guidance=1.0,  # eps + guidance * (eps' - eps)
        text_guidance=7.5,  # classifier-free guidance of the prompt; this and the next two: for text-conditional bases
        negative_prompt="",
        modulate="before_cfg",  # the MCM modulates each branch of the prompt's guidance, or its result (after_cfg)
        batch_size=32,
    )
    c.evaluation = dict(
        maps=256,  # held-out maps
        diversity_conditions=16,  # of these, how many are sampled
        diversity_seeds=4,  # how often
        expected=dict(both="", base=""),  # shown beside the table
    )
    return c
