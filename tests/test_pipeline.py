"""Laws of sampling under control, and of the folder that holds an MCM."""

import io
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open

from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.control import subsets_of
from mcm_jax.data.pipeline import InMemory, to_float
from mcm_jax.data.scenes import Scenes
from mcm_jax.engine import Engine
from mcm_jax.errors import UserError
from mcm_jax.pipeline import Pipeline
from mcm_jax.trained import Trained, save_mcm

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

# Sampling from noise divides rounding errors by sqrt(abar), about 0.1 here: equal is within 1e-4, different above 1e-2.
N = 3
SUBSETS = [(), ("segmentation",), ("sketch",), ("segmentation", "sketch")]


@pytest.fixture(scope="module")
def pipeline(trained):
    return Pipeline.from_folder(trained.workdir)


@pytest.fixture(scope="module")
def strong(pipeline):
    """The same pipeline under an MCM whose every weight does something."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), pipeline.mcms[0].params)
    return Pipeline(pipeline.base, Trained(pipeline.mcms[0].modulator, params), pipeline.settings)


@pytest.fixture(scope="module")
def untrained(pipeline):
    base, modulator = pipeline.base, pipeline.mcms[0].modulator
    params = jax.jit(lambda key: modulator.init(key, base.latent_shape))(jax.random.key(0))
    return Pipeline(base, Trained(modulator, params), pipeline.settings)


@pytest.fixture(scope="module")
def conditions():
    examples = to_float(InMemory.render(Scenes("test", N, tiny.SIZE, tiny.SIZE, 2)).arrays, ["sketch"])
    return {name: examples[name] for name in ("segmentation", "sketch")}


@pytest.fixture(scope="module")
def keys():
    return sampling.sample_keys(0, N)


@pytest.fixture(scope="module")
def samples(strong, conditions, keys):
    """Samples for every subset of the modalities."""
    return {s: strong({name: conditions[name] for name in s}, keys, batch_size=N) for s in SUBSETS}


def test_samples_are_images(samples):
    for images in samples.values():
        assert images.shape == (N, tiny.SIZE, tiny.SIZE, 3) and images.dtype == np.float32
        assert np.isfinite(images).all() and images.std() > 0.05


def test_every_subset_is_a_sample_of_its_own(samples):
    for i, a in enumerate(SUBSETS):
        for b in SUBSETS[:i]:
            assert np.abs(samples[a] - samples[b]).max() > 1e-2, (a, b)


def test_samples_follow_their_own_condition(strong, conditions, keys, samples):
    """Another map for example 0 changes sample 0 and no other."""
    sketch = conditions["sketch"].copy()
    sketch[0] = 1 - sketch[0]
    changed = strong(conditions | {"sketch": sketch}, keys, batch_size=N)
    both = samples["segmentation", "sketch"]
    assert np.abs(changed[0] - both[0]).max() > 1e-2
    np.testing.assert_allclose(changed[1:], both[1:], atol=1e-4)


def test_what_a_sample_lacks_it_is_not_shown(strong, conditions, keys, samples):
    present = {"sketch": np.array([True, False, True])}
    found = strong(conditions, keys, present=present, batch_size=N)
    both, one = samples["segmentation", "sketch"], samples[("segmentation",)]
    np.testing.assert_array_equal(found, np.where(present["sketch"][:, None, None, None], both, one))


def test_guidance_zero_is_the_base_alone(strong, conditions, keys, samples):
    base = strong.base
    alone = strong(conditions, keys, guidance=0.0, batch_size=N)
    x = sampling.sample(
        lambda x, at: base.predict(base.params, x, at.t, level=(at.alpha, at.sigma)),
        sampling.initial_noise(keys, base.latent_shape),
        keys,
        strong.settings.table(base.schedule),
    )
    np.testing.assert_allclose(alone, x, atol=1e-4)
    np.testing.assert_array_equal(strong({}, keys, guidance=0.0, batch_size=N), alone)
    assert np.abs(samples["segmentation", "sketch"] - alone).max() > 1e-2
    # The scale acts continuously from there.
    near = strong(conditions, keys, guidance=1e-4, batch_size=N)
    assert np.abs(near - alone).max() < 1e-2


class _Counted:
    """An MCM that counts how often it runs."""

    def __init__(self, modulator, calls):
        self.modulator, self.modalities, self.grid, self.calls = modulator, modulator.modalities, modulator.grid, calls
        self.multiple = modulator.multiple

    def __call__(self, *arguments):
        jax.debug.callback(lambda: self.calls.append(1))
        return self.modulator(*arguments)


def _counted(pipeline, calls):
    (mcm,) = pipeline.mcms
    counted = mcm._replace(modulator=_Counted(mcm.modulator, calls))
    return Pipeline(pipeline.base, counted, pipeline.settings)


def test_one_program_serves_every_way_to_sample(strong, conditions, keys, samples):
    """Solver, steps, spacing, noise, strength, window compile nothing, and outside its window the MCM does not run."""
    calls = []
    counted = _counted(strong, calls)

    def run(expected, **how):
        calls.clear()
        images = counted(conditions, keys, batch_size=N, **how)
        jax.effects_barrier()
        assert len(calls) == expected, how
        assert np.isfinite(images).all()
        return images

    np.testing.assert_allclose(run(3), samples["segmentation", "sketch"], atol=1e-4)
    alone = run(0, guidance=0.0)
    np.testing.assert_array_equal(run(0, start=1.0), alone)
    halves = run(2, steps=4, end=0.5), run(2, steps=4, start=0.5)
    assert np.abs(halves[0] - halves[1]).max() > 1e-2
    run(10, sampler="ddpm", steps=10)
    run(7, sampler="heun", steps=4, spacing="karras", guidance=2.0)
    run(4, sampler="heun", steps=4, spacing="karras", end=0.5)
    run(5, sampler="ddim", eta=1.0, timesteps=(900.0, 500.5, 300.0, 200.0, 100.0))
    assert counted.engine.compilations == 1


def test_strengths_are_a_sum_over_subsets():
    """Weights sum to 1, and those of the subsets that show a modality to its strength; what is whole needs one."""
    rng = np.random.default_rng(0)
    strengths = np.concatenate([rng.choice([0, 0.5, 1, 1.5, 2.5], (50, 3)), list(np.ndindex(2, 2, 2))])
    subsets, weights = subsets_of(strengths)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose((weights[..., None] * subsets).sum(1), strengths, atol=1e-6)
    np.testing.assert_array_equal(subsets[-8:, 0], strengths[-8:])
    assert (weights[-8:] == [1, 0, 0, 0]).all()


def test_each_sample_has_its_own_control(strong, conditions, keys, samples):
    """In one batch of one program; strength 0 is absent and a mask of 0 the base alone, bit for bit."""
    calls, alone = [], strong(conditions, keys, guidance=0.0, batch_size=N)
    counted = _counted(strong, calls)

    def run(expected, **how):
        calls.clear()
        images = counted(conditions, keys, batch_size=N, **how)
        jax.effects_barrier()
        assert len(calls) == expected, how
        return images

    both, one = samples["segmentation", "sketch"], samples[("segmentation",)]
    strength = {"sketch": np.array([0, 1, 0.5])}
    found = run(6, strength=strength)  # the third asks twice a step
    whole = run(3, strength={"sketch": np.array([0, 1, 1])})
    np.testing.assert_array_equal(found[:2], whole[:2])
    np.testing.assert_allclose(whole, np.stack([one[0], both[1], both[2]]), atol=1e-4)
    np.testing.assert_array_equal(run(3, strength={"sketch": 0.0}), run(3, present={"sketch": np.zeros(N, bool)}))
    assert min(np.abs(found[2] - other[2]).max() for other in (one, both)) > 1e-2

    mixed = run(2, guidance=[0.0, 1.0, 2.0], start=[0, 0, 0.6], end=[1.0, 0.3, 1.0])
    np.testing.assert_allclose(mixed[0], alone[0], atol=1e-4)
    np.testing.assert_allclose(mixed[1], run(1, end=0.3)[1], atol=1e-4)
    np.testing.assert_allclose(mixed[2], run(1, guidance=2.0, start=0.6)[2], atol=1e-4)

    mask = np.zeros((N, tiny.SIZE, tiny.SIZE))
    np.testing.assert_array_equal(run(0, mask=mask), run(0, guidance=0.0))
    mask[0], mask[1, :8] = 1, 1
    step = {"steps": 1, "timesteps": (500.0,)}
    here, base, free = run(1, mask=mask, **step), run(0, guidance=0.0, **step), run(1, **step)
    expected = np.where(mask[..., None] > 0, free, base)
    np.testing.assert_allclose(here, expected, atol=1e-4)
    assert np.abs(free - base)[1:].max() > 1e-2
    assert counted.engine.compilations == 1


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "+".join(s) or "none")
def test_an_untrained_mcm_leaves_the_base_as_it_is(untrained, conditions, keys, subset):
    alone = untrained(conditions, keys, guidance=0.0, batch_size=N)
    given = {name: conditions[name] for name in subset}
    np.testing.assert_allclose(untrained(given, keys, guidance=2.0, batch_size=N), alone, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_does_not_matter(strong, conditions, keys, samples, batch_size):
    found = strong(conditions, keys, batch_size=batch_size)
    np.testing.assert_allclose(found, samples["segmentation", "sketch"], atol=1e-4)


def test_the_number_of_samples_does_not_matter(strong, conditions, samples):
    two = strong({k: v[:2] for k, v in conditions.items()}, sampling.sample_keys(0, 2), batch_size=N)
    np.testing.assert_allclose(two, samples["segmentation", "sketch"][:2], atol=1e-4)


def test_keys_decide_the_sample(strong, conditions, samples):
    one = np.repeat(conditions["sketch"][:1], N, axis=0)
    found = strong({"sketch": one}, sampling.sample_keys(0, N), batch_size=N)
    assert np.abs(found[0] - found[1]).max() > 1e-2
    other = strong(conditions, sampling.sample_keys(1, N), batch_size=N)
    assert np.abs(other - samples["segmentation", "sketch"]).max() > 1e-2


def test_memory_is_counted_without_the_bases_numbers(trained, pipeline):
    """Parameters and all, more for more images; and what is counted is the program that samples."""
    settings = tiny.settings_of(trained.config)
    shapes = Pipeline(settings.base.outline(), Trained(pipeline.mcms[0].modulator), settings.sampling)
    one, eight = (shapes.sampling_bytes(count) for count in (1, 8))
    assert one > pipeline.base.card.parameter_bytes
    assert 7 * np.prod(pipeline.base.image_shape) * 4 < eight - one < 10**8


def test_a_batch_that_the_memory_does_not_hold_says_the_way_out(pipeline, conditions, keys, monkeypatch):
    huge = jax.jit(lambda: jnp.ones(2**46))  # 256 TiB
    monkeypatch.setattr(Engine, "draw", lambda *args: np.asarray(huge()))
    with pytest.raises(UserError, match="does not hold the base and a batch of 4 samples .RESOURCE_EXH.*--batch_size"):
        pipeline(conditions, keys, batch_size=4)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: {"depth": c["sketch"]}, ["segmentation, sketch", "depth"]),
        (lambda c: {"sketch": c["sketch"][:2]}, ["sketch", "[3, 16, 16]", "[2, 16, 16]"]),
        (lambda c: {"segmentation": c["segmentation"][:, :8]}, ["segmentation", "[3, 16, 16]", "[3, 8, 16]"]),
        (lambda c: {"sketch": c["sketch"][0]}, ["sketch", "[3, 16, 16]", "[16, 16]"]),
        (lambda c: {"sketch": (255 * c["sketch"]).astype(np.uint8)}, ["sketch", "in [0, 1]", "0 to 255"]),
        (lambda c: {"sketch": np.full_like(c["sketch"], np.nan)}, ["sketch", "in [0, 1]", "nan"]),
        (lambda c: {"segmentation": c["segmentation"] + 6}, ["segmentation", "0..5"]),
        (lambda c: {"segmentation": c["segmentation"] + 0.5}, ["segmentation", "integer"]),
    ],
)
def test_wrong_conditions_are_named(pipeline, conditions, keys, change, words):
    with pytest.raises(UserError) as error:
        pipeline(change(conditions), keys)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"guidance": [1.0, 2.0]}, ["3 values", "got 2"]),
        ({"end": [1.0, 0.5, -1.0]}, ["got -1.0"]),
        ({"strength": {"sketch": -1.0}}, ["strength of sketch", "at least 0"]),
        ({"mask": np.ones((3, 8, 8))}, ["[3, 16, 16]", "[3, 8, 8]"]),
        ({"mask": np.full((3, 16, 16), 2)}, ["in [0, 1]", "2..2"]),
        ({"steps": 0}, ["at least 1", "0"]),
        ({"steps": 1001}, ["1..1000", "1001"]),
        ({"batch_size": -1}, []),
    ],
)
def test_wrong_settings_are_named(pipeline, conditions, keys, setting, words):
    with pytest.raises(UserError, match="at least one"):
        pipeline({}, keys[:0])
    with pytest.raises(UserError) as error:
        pipeline({"sketch": conditions["sketch"]}, keys, **setting)
    assert all(word in str(error.value) for word in [*setting, *words]), error.value


def test_a_notebooks_pictures(pipeline, strong, trained, conditions, keys, tmp_path):
    """A file, a picture and an array are the same; labels in the colours of their classes, too; lists are arrays."""
    labels, colors = conditions["segmentation"][0].astype(np.uint8), np.arange(18, dtype=np.uint8).reshape(6, 3) * 9
    classes = {"classes": [{"name": f"n{i}", "color": c.tolist()} for i, c in enumerate(colors)]}
    shutil.copytree(trained.workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run/classes.json").write_text(json.dumps(classes))
    run = Pipeline.from_folder(tmp_path / "run")
    run.update(strong.mcms[0].params)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    indexed = Image.fromarray(labels)
    indexed.putpalette(colors[::-1].tobytes())  # other colours than the classes': of two that fit, colours count
    given = [tmp_path / "labels.png", Image.fromarray(labels), labels, Image.fromarray(colors[labels])]
    given += [jnp.asarray(labels), labels.tolist()]
    drawn = [np.asarray(run.draw({"segmentation": one}, 2, seed=3)[1]) for one in given]
    assert all((picture == drawn[0]).all() for picture in drawn)
    other = np.asarray(run.draw({"segmentation": indexed}, 2, seed=3)[1])
    assert (other == np.asarray(run.draw({"segmentation": 5 - labels}, 2, seed=3)[1])).all()
    assert (other != drawn[0]).any()
    few = Image.fromarray(labels)
    few.putpalette(colors[::-1].tobytes()[:18])  # as few colours as classes: no bit is lost on the way
    assert (np.asarray(run.draw({"segmentation": few}, 2, seed=3)[1]) == other).all()
    with pytest.raises(UserError, match="count must be at least 1, got 0"):
        run.draw({"segmentation": labels}, 0)
    with pytest.raises(UserError, match="found a colour picture .mode F."):
        run.draw({"segmentation": Image.fromarray(labels.astype(np.float32))})
    lossy = io.BytesIO()
    Image.fromarray(labels).save(lossy, "JPEG")
    with pytest.raises(UserError, match="JPEG file, expected PNG"):
        run.draw({"segmentation": Image.open(lossy)})
    with pytest.raises(UserError, match="the classes n0, .* and m, "):
        again = shutil.copytree(tmp_path / "run", tmp_path / "again")
        (again / "classes.json").write_text(json.dumps(classes).replace("n0", "m"))
        Pipeline.from_folder(tmp_path / "run", tmp_path / "again")
    as_lists = {"segmentation": conditions["segmentation"][..., None].tolist()}
    found = strong(as_lists, keys, batch_size=N)
    np.testing.assert_array_equal(found, strong({"segmentation": conditions["segmentation"]}, keys, batch_size=N))


# --- the folder -----------------------------------------------------------------------------------------------------


def test_folder_gives_back_the_averaged_params(trained, pipeline):
    tiny.assert_same_bits(jax.device_get(pipeline.mcms[0].params), jax.device_get(trained.state.ema_params))
    assert pipeline.mcms[0].step == 6
    assert pipeline.base.fingerprint == trained.base.fingerprint
    with safe_open(trained.workdir / "mcm.safetensors", "numpy") as file:
        said = file.metadata()
    assert said.items() >= {"base": "tiny", "fingerprint": trained.base.fingerprint, "step": "6"}.items()
    assert said["latent_shape"] == "16x16x3" and "1000 timesteps" in said["schedule"]


def test_params_survive_the_file(trained, pipeline, strong, tmp_path, conditions, keys, samples):
    """Only config.json and mcm.safetensors are needed, and the params come back bit for bit, whatever their dtype."""
    shutil.copy(trained.workdir / "config.json", tmp_path)
    save_mcm(tmp_path, strong.mcms[0].params, base=pipeline.base, step=7)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "mcm.safetensors"}
    loaded = Pipeline.from_folder(str(tmp_path))
    assert loaded.mcms[0].step == 7
    tiny.assert_same_bits(jax.device_get(loaded.mcms[0].params), jax.device_get(strong.mcms[0].params))
    found = loaded(conditions, keys, batch_size=N)
    np.testing.assert_array_equal(found, samples["segmentation", "sketch"])

    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), strong.mcms[0].params)
    save_mcm(tmp_path, half, base=pipeline.base, step=8)
    loaded = Pipeline.from_folder(tmp_path)
    tiny.assert_same_bits(jax.device_get(loaded.mcms[0].params), jax.tree.map(np.float32, jax.device_get(half)))


def test_a_file_that_cannot_be_written_leaves_the_old_one(trained, pipeline, tmp_path):
    folder = trained.copy(tmp_path / "run")
    before = tiny.contents(folder)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the weights are longer: the system stops them
    try:
        with pytest.raises(OSError, match="File too large"):
            save_mcm(folder, pipeline.mcms[0].params, base=pipeline.base, step=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tiny.contents(folder) == before


def _edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    (folder / "config.json").write_text(json.dumps(content))


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f, _: shutil.rmtree(f), ["neither a folder nor a shipped name"]),
        (lambda f, _: (f / "config.json").unlink(), ["config.json: no such file", "no workdir", "train.py"]),
        (lambda f, _: (f / "config.json").write_text("{"), ["config.json", "not a config that train.py wrote"]),
        (lambda f, _: (f / "config.json").write_text("[1]"), ["config.json", "not a config that train.py wrote"]),
        (lambda f, _: (f / "config.json").write_text("{}"), ["config.json", "lacks", "base.path", "mcm.channels"]),
        (lambda f, _: (f / "config.json").write_bytes(b"\xff\xfe\0"), ["config.json", "not a config"]),
        (
            lambda f, _: _edit_config(f, sampling__steps="six"),
            ["config.json", "config.sampling.steps", "number", "six"],
        ),
        (lambda f, _: _edit_config(f, mcm__inputs=["xt"]), ["config.json", "mcm.inputs", "xt", "x_t"]),
        (lambda f, _: (f / "mcm.safetensors").unlink(), ["mcm.safetensors: no such file", "train.py"]),
        (lambda f, _: _cut(f / "mcm.safetensors", 5000), ["mcm.safetensors", "corrupt or cut short"]),
        (lambda f, _: _cut(f / "mcm.safetensors", 0), ["mcm.safetensors", "corrupt or cut short"]),
        (lambda f, o: _edit_config(f, base__path=str(o)), ["mcm.safetensors", "'tiny'", "'other'", "base.path"]),
        (lambda f, _: _edit_config(f, base__path="nowhere"), ["nowhere", "shipped"]),
        (
            lambda f, _: _edit_config(f, mcm__multipliers=[1, 3]),
            ["another MCM", "unet/", "there (", "expected (", "more"],
        ),
        (
            lambda f, _: _edit_config(f, mcm__multipliers=[1, 2, 2], mcm__attention=[0, 0, 0]),
            ["another MCM", "missing there: unet/down_blocks_2"],
        ),
        (
            lambda f, _: _edit_config(f, mcm__multipliers=[1], mcm__attention=[0]),
            ["another MCM", "only there: unet/down_blocks_1"],
        ),
    ],
)
def test_every_kind_of_damage_is_explained(trained, other_base_path, tmp_path, damage, words):
    folder = trained.copy(tmp_path / "run")
    damage(folder, other_base_path)
    with pytest.raises(UserError) as error:
        Pipeline.from_folder(folder)
    assert all(word in str(error.value) for word in words), error.value


def test_the_other_base_is_told_by_its_weights(trained, other_base_path, tmp_path):
    """Both fingerprints are in the message, and the same base at another place is no other base."""
    folder = trained.copy(tmp_path / "run")
    moved = shutil.copytree(trained.config.base.path, tmp_path / "moved")
    _edit_config(folder, base__path=str(moved))
    assert Pipeline.from_folder(folder).base.fingerprint == trained.base.fingerprint
    _edit_config(folder, base__path=str(other_base_path))
    with pytest.raises(UserError, match=trained.base.fingerprint[:16]) as error:
        Pipeline.from_folder(folder)
    assert load_base(other_base_path).fingerprint[:16] in str(error.value)


def test_mcms_of_different_bases_are_told_apart(trained, pipeline, other_base_path, tmp_path):
    shutil.copy(trained.workdir / "config.json", tmp_path)
    _edit_config(tmp_path, base__path=str(other_base_path))
    save_mcm(tmp_path, pipeline.mcms[0].params, base=load_base(other_base_path), step=1)
    with pytest.raises(UserError) as error:
        Pipeline.from_folder(trained.workdir, tmp_path)
    words = [f"{tmp_path}/mcm.safetensors was trained on the base 'other'", f"the base 'tiny' of {trained.workdir} has"]
    assert all(word in str(error.value) for word in [*words, "one at a time"]), error.value
