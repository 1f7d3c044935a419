"""Conditions at the pictures' resolution, through an encoder within the MCM (``mcm.conditions=encoder``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from configs import default
from mcm_jax import config as config_lib
from mcm_jax.base import BaseCard, BaseSettings
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.mcm import MCMSettings
from mcm_jax.modalities import Modality
from mcm_jax.pipeline import Pipeline
from mcm_jax.schedules import Schedule
from mcm_jax.trained import start_from
from mcm_jax.training import RunSettings, caching, train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

MODALITIES = (Modality("segmentation", "labels", 3, 255), Modality("sketch", "lines", 1))
ENCODER = (
    tiny.SMALL
    | {"mcm.conditions": "encoder", "data.size": 4, "draws.count": 2}
    | {
        "cache.mode": "build",
        "cache.load_base": True,
    }
)


def _shapes(modulator, card):
    return modulator.shapes(card)


@pytest.fixture(scope="module")
def workdir(ldm_path, tmp_path_factory):
    """Of a run from a cache, with validation pictures and held-out losses."""
    changes = {"train.steps": 1, "train.validate_every": 1, "train.evaluate_every": 1, "train.held_out": 4}
    changes |= {"train.learning_rate": 0.1, "train.warmup_steps": 0}  # so that one step is to be seen
    folder = tmp_path_factory.mktemp("runs") / "encoder"
    config = tiny.make_config(ldm_path, ENCODER | changes)
    train_and_evaluate(config, folder)
    return folder


def test_its_parameters_are_few():
    """However many channels the conditions have: the U-Net's first convolution does without as many."""
    schedule = Schedule.from_config({"_class_name": "DDIMScheduler"})
    card, found = BaseCard("", "", schedule, (16, 16, 4), (64, 64, 3), False, 1, 1), {}
    for conditions in ("grid", "encoder"):
        mcm = MCMSettings(**default.SIZES["medium"], conditions=conditions)
        found[conditions] = tiny.count(_shapes(mcm.modulator((Modality("pose", "map", 40),), card), card))
    assert found["encoder"] - found["grid"] == 2 * (9 * 16**2 + 16) < 0.02 * found["grid"]


def test_it_sees_what_the_grid_cannot_and_no_more_than_it_is_shown(ldm_path):
    """Untrained it changes nothing; then every weight learns, detail within a cell counts, what is hidden does not."""
    card = BaseSettings(path=str(ldm_path)).outline().card
    mcm = MCMSettings(channels=4, multipliers=(1,), blocks=1, attention=(0,), groups=2, conditions="encoder")
    modulator = mcm.modulator(MODALITIES, card)
    assert modulator.grid(card) == (32, 32) and card.latent_shape == (16, 16, 3)
    rng = np.random.default_rng(0)
    x_t, eps = rng.standard_normal((2, 3, 16, 16, 3)).astype(np.float32)
    stripes = np.broadcast_to(np.arange(32, dtype=np.float32) % 2, (3, 32, 32))
    conditions = {"segmentation": rng.integers(0, 3, (3, 32, 32)).astype(np.uint8), "sketch": stripes}
    present = np.array([[1, 1], [1, 0], [0, 1]]) > 0
    t = np.array([3, 500, 900], np.int32)

    @jax.jit
    def run(params, conditions, present):
        return modulator(params, x_t, eps, t, conditions, present)[0]

    params = jax.jit(lambda key: modulator.init(key, card.latent_shape, (32, 32)))(jax.random.key(0))
    np.testing.assert_array_equal(run(params, conditions, present), eps)
    params = jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape).astype(np.float32), params)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, conditions, present)).mean()))(params)
    assert set(gradient) == {"unet", "encoder"} and all(np.any(leaf) for leaf in jax.tree.leaves(gradient["encoder"]))

    one = run(params, conditions, present)
    shifted = conditions | {"sketch": 1 - stripes}  # on the grid both are grey
    np.testing.assert_array_equal(
        MODALITIES[1].resize(stripes[0], 16, 16), MODALITIES[1].resize(1 - stripes[0], 16, 16)
    )
    other = run(params, shifted, present)
    assert np.abs(other - one).max(axis=(1, 2, 3))[[0, 2]].min() > 1e-3
    np.testing.assert_array_equal(other[1], one[1])
    # A pixel that is unknown is as in an example without the modality, whatever stands in the others.
    unknown = conditions | {"segmentation": np.full((3, 32, 32), 255, np.uint8)}
    absent = present & np.array([False, True])
    np.testing.assert_array_equal(run(params, unknown, present), run(params, conditions, absent))
    holed = {k: v.copy() for k, v in conditions.items()}
    holed["segmentation"][:, 5, 7] = 255  # one pixel of a cell
    assert np.abs(run(params, holed, present) - one)[:2].max() > 1e-4


def test_the_bound_of_x0_is_the_bases_or_as_a_run_began(ldm_path, base_path, tmp_path):
    """Older configs wrote 1, whatever the base: such a run goes on with it, by the command that began it."""
    cards = [BaseSettings(path=str(path)).outline().card for path in (ldm_path, base_path)]
    for clip, bounds in ((0.0, [4, 1]), (2.0, [2, 2])):
        assert [MCMSettings(x0_clip=clip).modulator(MODALITIES, card).x0_clip for card in cards] == bounds
    changes = ENCODER | {"cache.mode": "off", "train.schedule": "constant"}
    old = changes | {"mcm.x0_clip": 1.0, "train.steps": 1}
    train_and_evaluate(tiny.make_config(ldm_path, old), tmp_path)
    longer = {"train.steps": 2}
    train_and_evaluate(tiny.make_config(ldm_path, changes | longer), tmp_path)
    assert config_lib.load(RunSettings, tmp_path).mcm.x0_clip == 1
    with pytest.raises(UserError, match="mcm.x0_clip: there 1.0, now 4.0"):
        train_and_evaluate(tiny.make_config(ldm_path, old | longer | {"mcm.x0_clip": 4.0}), tmp_path)


def test_a_run_keeps_its_conditions_at_full_resolution(ldm_path, workdir, tmp_path):
    settings = tiny.settings_of(tiny.make_config(ldm_path, ENCODER))
    cache = caching.open_cache(settings, workdir)
    assert cache.fields["latent"][1] == (16, 16, 3)
    assert cache.fields["segmentation"][1] == cache.fields["sketch"][1] == (32, 32)
    assert (workdir / "validation/step_0000001.png").is_file()
    assert any("held_out_loss" in line for line in tiny.metrics_of(workdir))
    grid = tiny.make_config(ldm_path, ENCODER | {"mcm.conditions": "grid", "cache.path": str(workdir / "cache")})
    assert len({caching.shared_by(s, cache.card) for s in (tiny.settings_of(grid), settings)}) == 2
    with pytest.raises(UserError, match="(?s)differ in.*conditions"):
        train_and_evaluate(grid, tmp_path / "grid")


def test_it_samples_from_condition_files_of_the_pictures_size(workdir, tmp_path):
    stripes = np.broadcast_to((np.arange(32) % 2 * 255).astype(np.uint8), (32, 32))
    images = []
    for name, values in (("a", stripes), ("b", 255 - stripes)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
        images.append(generate(str(workdir), {"sketch": str(tmp_path / f"{name}.png")}, tmp_path / name, num_samples=1))
    assert images[0].shape == (1, 32, 32, 3) and (tmp_path / "a/grid.png").is_file()
    assert np.any(images[0] != images[1])
    pipeline = Pipeline.from_folder(workdir)
    with pytest.raises(UserError, match=r"sketch: expected shape \[1, 32, 32\], got \[1, 16, 16\]"):
        pipeline({"sketch": np.zeros((1, 16, 16), np.float32)}, jax.random.split(jax.random.key(0), 1))


def test_training_begins_with_one_of_fewer_modalities(ldm_path, workdir):
    """What the encoder makes of the new modality starts at zero; all else is the trained one's."""
    settings = tiny.settings_of(tiny.make_config(ldm_path, ENCODER))
    card = settings.base.outline().card
    modulator = settings.mcm.modulator((Modality("anew", "lines", 1), *settings.modalities.shown), card)
    params, before = (
        start_from(str(workdir), settings.mcm, modulator, card),
        Pipeline.from_folder(workdir).mcms[0].params,
    )
    first = params["encoder"]["down_0"]["conv"]
    np.testing.assert_array_equal(first["kernel"][:, :, :2], 0)
    first["kernel"] = first["kernel"][:, :, 2:]
    tiny.assert_same_bits(params, before)


def test_a_base_of_pixels_has_nothing_to_encode(base_path):
    """There both ways are one network on one grid, and params go from the one to the other."""
    base = tiny.settings_of(tiny.make_config(base_path)).base.outline()
    found = []
    for conditions in ("grid", "encoder"):
        modulator = tiny.modulator_of(tiny.make_config(base_path, {"mcm.conditions": conditions}), base)
        assert modulator.grid(base) == (tiny.SIZE, tiny.SIZE)
        found.append(jax.tree.map(lambda x: x.shape, modulator.shapes(base)))
    assert found[0] == found[1]
