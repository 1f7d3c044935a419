"""Laws of the cache: it trains as the base does; whatever happens to its files, no wrong value is read."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file
from test_own_data import _write

from mcm_jax import sharding
from mcm_jax.base import load_base, loading
from mcm_jax.cache import Cache, build, store
from mcm_jax.cache.__main__ import main as cache_main
from mcm_jax.data import Folder, inputs
from mcm_jax.data.inputs import prepare
from mcm_jax.data.views import Views
from mcm_jax.draws import Draws
from mcm_jax.errors import Interrupted, OutOfMemory, UserError
from mcm_jax.modalities import Modality
from mcm_jax.training import caching, feed, loop, precompute, step, train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

SMALL = tiny.SMALL | {"data.size": 10, "draws.count": 2, "cache.shard_draws": 8, "train.validate_every": 0}
SHARDS = 3  # 10 examples x 2 draws, 4 examples a shard


@pytest.fixture(scope="module")
def config(base_path):
    return tiny.make_config(base_path, SMALL)


@pytest.fixture(scope="module")
def built(config, tmp_path_factory):
    """A workdir with a cache, never to be changed."""
    workdir = tmp_path_factory.mktemp("cache") / "run"
    precompute(config, workdir)
    return workdir


@pytest.fixture
def workdir(built, tmp_path):
    """A copy of it, to be changed; times and all, as the stamps have them."""
    return shutil.copytree(built, tmp_path / "run")


def changed(config, **changes):
    out = config.copy_and_resolve_references()
    out.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return out


def open_cache(config, workdir):
    return caching.open_cache(tiny.settings_of(config), workdir)


# --- the same training ----------------------------------------------------------------------------------------------

TOLERANCES = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7, "int8": None}


def feeds_of(config, workdir):
    """(online, cached) records of the first K epochs."""
    mesh = sharding.make_mesh()
    base = load_base(config.base.path)
    base = dataclasses.replace(base, params=sharding.replicate(base.params, mesh))
    settings = tiny.settings_of(config)
    modalities, draws = settings.modalities.shown, settings.draws_for(base.card)
    source = settings.data.open("train", modalities, base.card)
    modulator = tiny.modulator_of(config, base)
    inputs = prepare(base, source, modalities, mesh, modulator.grid(base))
    noise_step = step.make_noise_step(modulator, draws, seed=config.seed, drop_rate=0.3)
    size = config.train.batch_size
    steps = range(draws.count * len(source) // config.data.views // size)
    sources = (
        feed.online(base, inputs, draws, config.data.views, {}, mesh),
        feed.cached(precompute(config, workdir)),
    )
    return [
        [jax.device_get(r) for r in s.records(noise_step, batch_size=size, seed=config.seed, steps=steps, mesh=mesh)]
        for s in sources
    ]


@pytest.mark.parametrize(
    "kind, dtype, changes",
    [
        ("base_path", "float32", {}),
        ("base_path", "int8", {}),
        ("base_path", "float16", {"data.views": 2, "data.flip": True, "data.crop": 0.8, "draws.density": (1, 2, 0.5)}),
        ("ldm_path", "float16", {"data.views": 2, "data.flip": True, "draws.offset": 0.5, "mcm.conditions": "encoder"}),
        ("sd_path", "float32", {"data.prompt_drop_rate": 0.5}),
        ("sd2_path", "bfloat16", {}),
    ],
)
def test_cached_and_online_give_the_same_batches(kind, dtype, changes, request, tmp_path):
    """All but the prediction bit for bit, the prediction to the rounding of what it is stored in."""
    config = tiny.make_config(request.getfixturevalue(kind), SMALL | {"cache.dtype": dtype} | changes)
    online, cached = feeds_of(config, tmp_path)
    assert len(online) == len(cached) == 5
    for a, b in zip(online, cached, strict=True):
        eps, stored = a.pop("eps"), b.pop("eps")
        tiny.assert_same_bits(a, b)
        assert stored.dtype == np.float32
        error, size = np.abs(stored - eps), np.abs(eps)
        if dtype == "int8":
            assert (error <= size.max(axis=(1, 2), keepdims=True) / 254 + 1e-5).all()
        else:
            assert (error <= TOLERANCES[dtype] * size + 1e-5).all()
        assert size.max() > 0.1
        if dtype != "float32":
            assert error.max() > 0  # it was rounded indeed


def test_with_float32_the_losses_are_those_of_online_training(small_path, tmp_path):
    changes = {"data.size": 16, "draws.count": 13, "train.steps": 50, "train.log_every": 1, "train.validate_every": 0}
    changes |= {"cache.dtype": "float32", "train.checkpoint_every": 50}
    config = tiny.make_config(small_path, tiny.SMALL | changes)
    lines = []
    for mode in ("off", "build"):
        train_and_evaluate(changed(config, cache__mode=mode), tmp_path / mode)
        lines.append(tiny.metrics_of(tmp_path / mode))
    assert len(lines[0]) == len(lines[1]) == 50
    for key in ("loss", "mse", "mse_of_base"):
        found = np.array([[line[key] for line in run] for run in lines])
        np.testing.assert_allclose(found[1], found[0], atol=1e-5)
        assert np.ptp(found[0]) > 1e-3


def test_the_base_is_not_needed(base_path, tmp_path, capsys, monkeypatch):
    """Neither the base nor the data is there any more; resumed or not, the run is the one that they gave."""
    bases, data = tmp_path / "bases", tmp_path / "data"
    shutil.copytree(base_path, bases / "tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("image", "segmentation", "sketch"):
            (data / split / name).mkdir(parents=True)
        for i in range(count):
            _write(data / split, f"{i}", rng)
    mine = {"data.name": "folder", "data.path": str(data), "cache.path": str(tmp_path / "cache")}
    mine |= {"train.evaluate_every": 2, "train.held_out": 2, "train.best": "held_out_loss"}
    config = tiny.make_config(bases / "tiny", SMALL | mine | {"cache.mode": "on"})
    precompute(config, tmp_path / "unused")
    whole = train_and_evaluate(config, tmp_path / "whole")
    fingerprint = load_base(base_path).fingerprint
    shutil.rmtree(bases)
    shutil.rmtree(data)
    capsys.readouterr()

    class Killed(BaseException):
        pass

    class Bar(loop.tqdm):
        def update(self, n=1):
            super().update(n)
            if self.n == 4:
                raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tqdm", Bar)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path / "run")
    end = train_and_evaluate(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "going on from step 3" in said and "is not at hand" in said and "are not at hand" in said
    tiny.assert_same_bits(jax.device_get(end), jax.device_get(whole))
    assert tiny.metrics_of(tmp_path / "run") == tiny.metrics_of(tmp_path / "whole")
    with safe_open(tmp_path / "run/mcm.safetensors", "numpy") as file:
        assert file.metadata()["fingerprint"] == fingerprint and file.metadata()["base"] == "tiny"
    assert {p.name for p in (tmp_path / "run/best").iterdir()} >= {"mcm.safetensors", "config.json"}
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed: to finish is all that wants it
    train_and_evaluate(changed(config, train__wandb="mine"), tmp_path / "run")
    assert "is finished" in capsys.readouterr().out
    assert not (tmp_path / "unused/config.json").exists()


def test_build_makes_what_on_reads(config, built, tmp_path, capsys, monkeypatch):
    building = changed(config, cache__mode="build")
    seen, make = [], feed.cached

    def look(cache):
        seen.append([a.shape for a in jax.live_arrays() if a.ndim == 4 and 20 in a.shape])  # widths of the base alone
        return make(cache)

    others = [a.shape for a in jax.live_arrays() if a.ndim == 4 and 20 in a.shape]
    monkeypatch.setattr(feed, "cached", look)
    train_and_evaluate(building, tmp_path / "run")
    monkeypatch.undo()
    assert len(seen[0]) <= len(others)  # the base that built the cache is gone
    assert "3 shard(s) built now" in capsys.readouterr().out
    found, expected = tiny.contents(tmp_path / "run/cache"), tiny.contents(built / "cache")
    assert found == expected
    other = changed(building, seed=5, cache__path=str(built / "cache"), train__learning_rate=1e-4)
    monkeypatch.setattr(loading, "load_base", None)  # nobody may call it
    train_and_evaluate(other, tmp_path / "other")  # a sweep has one cache
    assert "the cache is complete" in capsys.readouterr().out
    assert tiny.contents(built / "cache") == expected


@pytest.mark.parametrize("free, pictures", [(None, True), (10**12, True), (1000, False)])
def test_validation_pictures_load_the_base_if_asked_and_if_it_fits(
    config, built, tmp_path, monkeypatch, capsys, free, pictures
):
    asking = changed(config, cache__mode="on", cache__path=str(built / "cache"), cache__load_base=True, train__steps=2)
    asking.train.validate_every, asking.sampling.height = 2, 64  # of sample.py's: these have the base's size
    monkeypatch.setattr(sharding, "free_memory", lambda: free)
    train_and_evaluate(asking, tmp_path / "run")
    assert (tmp_path / "run/validation").exists() == pictures
    said = capsys.readouterr().out
    assert ("GiB are free" in said) != pictures
    assert -1 < said.find("compiling the training step") < said.find("a step takes")  # before the silence


def test_without_being_asked_validation_is_left_to_sample(config, built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_base", None)
    on = changed(config, cache__mode="on", cache__path=str(built / "cache"), train__steps=2, train__validate_every=1)
    train_and_evaluate(on, tmp_path / "run")
    said = capsys.readouterr().out
    assert "left to sample.py" in said and "overfit" not in said and not (tmp_path / "run/validation").exists()


def test_few_draws_for_many_steps_are_told(config, built, tmp_path, capsys, monkeypatch):
    """Its first step ends the run: what counts is what is said before."""

    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(feed.Feed, "records", killed)
    on = changed(config, cache__mode="on", cache__path=str(built / "cache"), train__validate_every=0)
    draws = on.data.size * on.draws.count
    for times, told in ((24, False), (25, True)):
        on.train.steps = times * draws // on.train.batch_size
        with pytest.raises(Killed):
            train_and_evaluate(on, tmp_path / f"{times}")
        assert (f"each cached draw {times} times" in capsys.readouterr().out) == told


# --- the format -----------------------------------------------------------------------------------------------------


def test_a_record_is_what_any_reader_of_safetensors_finds(config, built):
    cache = Cache(built / "cache")
    index, draw = np.array([9, 0, 3, 4, 9], np.int32), np.array([1, 0, 3, 1, 0], np.int32)
    found = cache.read(index, draw)
    assert set(found) == {"image", "segmentation", "sketch", "eps"}
    for i, (example, d) in enumerate(zip(index, draw, strict=True)):
        shard = load_file(built / "cache" / store.shard_name(example // 4))
        row = list(shard["index"]).index(example)
        np.testing.assert_array_equal(found["eps"][i], shard["eps"][row, d % 2])
        for name in ("image", "segmentation", "sketch"):
            np.testing.assert_array_equal(found[name][i], shard[name][row, 0])
        draws = tiny.settings_of(config).draws_for(cache.card)
        t = draws.timesteps(jnp.array([example]), jnp.array([d % 2], jnp.int32))
        assert shard["t"][row, d % 2] == t[0] and shard["t"].dtype == np.int32


def test_reading_in_threads_leaves_nothing_open(built):
    cache, rng = Cache(built / "cache"), np.random.default_rng(0)
    asked = [(rng.integers(0, 10, 7).astype(np.int32), rng.integers(0, 9, 7).astype(np.int32)) for _ in range(40)]
    expected, found = [cache.read(*a) for a in asked], [None] * 40
    before = len(os.listdir("/proc/self/fd"))

    def read(part):
        for i in range(part, 40, 4):
            found[i] = cache.read(*asked[i])

    threads = [threading.Thread(target=read, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", build.DTYPES)
def test_quantised_predictions_come_back(dtype):
    rng = np.random.default_rng(0)
    eps = (rng.standard_normal((3, 5, 4, 2)) * [0.01, 30]).astype(np.float32)
    eps[1, :, :, 0] = 0  # a channel without a scale
    stored = jax.jit(build.quantise, static_argnums=1)(eps, dtype)
    back = np.asarray(build.dequantise(stored))
    assert stored["eps"].dtype == dtype and back.dtype == np.float32
    step_size = np.abs(eps).max(axis=(1, 2), keepdims=True) / 127
    bound = step_size / 2 if dtype == "int8" else TOLERANCES[dtype] * np.abs(eps)
    assert (np.abs(back - eps) <= bound + 1e-7).all() and not back[1, :, :, 0].any()


def test_int8_is_half_of_float16(config, built, tmp_path):
    small = precompute(changed(config, cache__dtype="int8"), tmp_path)
    sizes = [
        sum(np.prod(shape) * dtype.itemsize for name, (dtype, shape) in c.fields.items() if name.startswith("eps"))
        for c in (small, Cache(built / "cache"))
    ]
    assert sizes[0] == sizes[1] / 2 + 3 * 4  # and a scale for each channel


@pytest.mark.parametrize("grid, promised", [(None, 352), ((512, 512), 844)])
def test_a_cache_of_stable_diffusion_is_as_small_as_promised(grid, promised):
    """1,000 images x 10 draws at 64x64x4, two conditions, without building it: every byte is arithmetic."""
    from benchmarks import common
    from mcm_jax.base import BaseCard
    from mcm_jax.schedules import Schedule

    shape = (64, 64, 4)
    card = BaseCard("", "", Schedule.from_config({"_class_name": "DDIMScheduler"}), shape, (512, 512, 3), True, 1, 1)
    plan = store.Manifest({}, card.to_json(), {}, 1000, 1, 10, 100, {})
    base = dataclasses.replace(common.make_base("tiny", "float32"), latent_shape=shape, image_shape=(512, 512, 3))
    recipe = build.Recipe(base, common.Noise(1, (512, 512, 3)), common.MODALITIES, None, "float16", 64, grid=grid)
    assert round(1000 * build.bytes_of_an_example(plan, recipe) / 2**20) == promised
    assert f"{promised:,} MiB" in (tiny.ROOT / "README.md").read_text()


def test_the_size_is_known_beforehand(config, built, base):
    settings = tiny.settings_of(config)
    source = settings.data.open("train", settings.modalities.shown, base.card)
    recipe = build.Recipe(base, source, settings.modalities.shown, settings.draws_for(base.card), "float16", 4)
    manifest = store.Manifest.read(built / "cache")
    each = build.bytes_of_an_example(manifest, recipe)
    for number in range(SHARDS):
        tensors = load_file(built / "cache" / store.shard_name(number))
        assert sum(t.nbytes for t in tensors.values()) == each * len(manifest.rows(number))


def test_inspect_tells_what_is_in_it(built, capsys):
    cache_main(["inspect", str(built / "cache")])
    said = capsys.readouterr().out
    m = store.Manifest.read(built / "cache")
    for word in (
        "10 examples x 2 draws",
        m.fingerprint,
        m.made_of["base"],
        "float16[16, 16, 3]",
        "in 3 shards",
        "'tiny'",
    ):
        assert word in said, said
    cache_main(["verify", str(built / "cache")])
    assert "3 shards" in capsys.readouterr().out


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data.size": 11}, ["data.scenes", "10 of 16x16", "11 of 16x16"]),
        ({"data.seed": 7}, ["data.scenes", "seed 2", "seed 7"]),
        ({"draws.seed": 1}, ["draws.seed: there 0, wanted 1"]),
        ({"draws.count": 3}, ["draws.count: there 2, wanted 3"]),
        ({"draws.density": (1, 2)}, ["draws.density: there [1.0], wanted [0.333", "0.666"]),
        ({"draws.offset": 0.5}, ["draws.offset: ", "0.5"]),
        ({"cache.dtype": "int8"}, ["cache.dtype: there float16, wanted int8"]),
        ({"data.views": 2, "data.flip": True}, ["views: there 1, wanted 2, flip True"]),
        ({"modalities.sketch.kind": "map"}, ["modalities.sketch: there lines, channels=1, wanted map, channels=1"]),
        ({"base.dtype": "bfloat16"}, ["base.dtype: there float32, wanted bfloat16", "base: there"]),
    ],
)
def test_a_cache_of_something_else_is_refused(config, workdir, changes, words):
    other = config.copy_and_resolve_references()
    if "modalities.sketch.kind" in changes:
        other.data.name, other.data.path = "folder", str(workdir / "nowhere")  # scenes' sketches are lines
    other.update_from_flattened_dict(changes)
    before, m = tiny.contents(workdir), store.Manifest.read(workdir / "cache")
    for attempt in (lambda: precompute(other, workdir), lambda: open_cache(other, workdir)):
        with pytest.raises(UserError) as error:
            attempt()
        message = str(error.value)
        assert m.fingerprint[:16] in message and "this config wants" in message and "cache.path" in message
        assert not [word for word in words if word not in message], message
    assert tiny.contents(workdir) == before


def test_another_base_or_schedule_is_refused_and_a_copy_is_not(config, workdir, base_path, other_base_path, tmp_path):
    other = changed(config, base__path=str(other_base_path))
    fingerprints = [load_base(path).fingerprint[:16] for path in (base_path, other_base_path)]
    with pytest.raises(UserError, match=f"base: there {fingerprints[0]}, wanted {fingerprints[1]}"):
        open_cache(other, workdir)
    copy = shutil.copytree(base_path, tmp_path / "copy", copy_function=shutil.copy)  # of other times
    moved = changed(config, base__path=str(copy))
    assert len(open_cache(moved, workdir)) == 10
    file = copy / "scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace('"beta_end": 0.02', '"beta_end": 0.021'))
    with pytest.raises(UserError, match="schedule: there"):
        open_cache(moved, workdir)


def test_other_pictures_are_refused(base_path, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("image", "segmentation", "sketch"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
    for i in range(4):
        _write(tmp_path / "data/train", f"{i}", rng)
    mine = {"data.name": "folder", "data.path": str(tmp_path / "data"), "data.held_out_share": 0.0}
    config = tiny.make_config(base_path, SMALL | mine)
    precompute(config, tmp_path)
    os.utime(tmp_path / "data/train/sketch/0.png")
    assert len(open_cache(config, tmp_path)) == 4  # looked at again, and the same
    _write(tmp_path / "data/train", "2", rng)
    with pytest.raises(UserError) as error:
        open_cache(config, tmp_path)
    assert all(f"data.{name}: there" in str(error.value) for name in ("image", "segmentation", "sketch"))


def test_no_cache_and_an_unfinished_one(config, workdir, script, base_path, tmp_path):
    arguments = [*tiny.config_flags(base_path, SMALL | {"cache.mode": "on"}), f"--workdir={tmp_path / 'other'}"]
    assert script("train.py", *arguments).explains("there is no cache", "precompute.py", "cache.mode")
    assert not (tmp_path / "other").exists()
    m = store.Manifest.read(workdir / "cache")
    dataclasses.replace(m, shards={}).write(workdir / "cache" / store.BUILDING)
    (workdir / "cache" / store.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"not complete \(0 of 3 shards\)"):
        open_cache(config, workdir)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.txt").write_text("precious")
    (tmp_path / "cache/draft.tmp").write_text("precious, too")
    with pytest.raises(UserError, match="no part of a cache: draft.tmp, thesis.txt"):
        precompute(config, tmp_path)
    assert tiny.contents(tmp_path) == {"cache/draft.tmp": b"precious, too", "cache/thesis.txt": b"precious"}


def _edit_manifest(folder, change):
    """As a stranger could write one: with a checksum that fits."""
    path = folder / store.MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content | {"sha256": store._digest(content)}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda f: (f / store.MANIFEST).write_bytes((f / store.MANIFEST).read_bytes()[:-40]),
            ["manifest.json: damaged"],
        ),
        (lambda f: _flip(f / store.MANIFEST, 500), ["manifest.json: damaged"]),
        (lambda f: _edit_manifest(f, lambda c: c.update(format=2)), ["format 2", "reads format 1"]),
        (lambda f: _edit_manifest(f, lambda c: c["shards"].update({"../x": {}})), ["no shard", "../x"]),
        (lambda f: _edit_manifest(f, lambda c: c["shards"].popitem()), ["names 2 shards, expected 3"]),
        (lambda f: _edit_manifest(f, lambda c: c["base"].pop("schedule")), ["manifest.json: damaged", "schedule"]),
        (lambda f: _edit_manifest(f, lambda c: c.update(shards=[])), ["manifest.json"]),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(config, workdir, damage, words):
    damage(workdir / "cache")
    with pytest.raises(UserError) as error:
        open_cache(config, workdir)
    assert not [word for word in words if word not in str(error.value)], error.value


# --- damage ---------------------------------------------------------------------------------------------------------


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit of the header": lambda p: _flip(p, 30),
    "a bit of a prediction": lambda p: _flip(p, p.stat().st_size // 2),
    "the last bit": lambda p: _flip(p, p.stat().st_size - 1),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "another shard": lambda p: shutil.copy(p.with_name(store.shard_name(1)), p),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_rebuilt_alone(config, workdir, damage, capsys):
    before = tiny.contents(workdir)
    path = workdir / "cache" / store.shard_name(2)
    DAMAGES[damage](path)
    others = {
        p.name: p.stat().st_mtime_ns for p in path.parent.iterdir() if p not in (path, path.parent / store.MANIFEST)
    }
    on = changed(config, cache__mode="on")
    with pytest.raises(UserError, match=r"1 of 3 shards are damaged:\n  shard-00002") as error:
        train_and_evaluate(on, workdir)
    assert "precompute.py" in str(error.value) and not (workdir / "config.json").exists()
    with pytest.raises(SystemExit, match="shard-00002"):
        cache_main(["verify", str(workdir / "cache")])
    precompute(config, workdir)
    assert "shard-00002" in capsys.readouterr().out
    assert tiny.contents(workdir) == before
    assert {name: (path.parent / name).stat().st_mtime_ns for name in others} == others


def test_a_shard_cut_off_while_it_is_read_is_named(workdir):
    cache = Cache(workdir / "cache")
    path = workdir / "cache" / store.shard_name(0)
    path.write_bytes(path.read_bytes()[:1000])
    for damage in (lambda: None, path.unlink):
        damage()
        with pytest.raises(UserError, match="shard-00000.*cannot be read any more.*precompute.py"):
            cache.read(np.arange(4), np.ones(4, int))
    with pytest.raises(UserError, match="shard-00000"):
        Cache(workdir / "cache", verify=False)


def test_a_shard_lost_in_the_middle_of_a_run_ends_it_by_name(config, workdir, monkeypatch):
    """Not as a traceback, and not as a disk that is full; the steps so far are safe."""
    path, update = workdir / "cache" / store.shard_name(1), loop.tqdm.update

    class Bar(loop.tqdm):
        def update(self, n=1):
            path.unlink(missing_ok=True)
            return update(self, n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    long = changed(config, cache__mode="on", train__steps=100, train__checkpoint_every=1)
    with pytest.raises(UserError, match="shard-00001.*cannot be read any more"):
        train_and_evaluate(long, workdir)
    assert any((workdir / "checkpoints").iterdir())


# --- interrupted builds ---------------------------------------------------------------------------------------------


def _command(config_changes, base_path, workdir, *more):
    flags = tiny.config_flags(base_path, SMALL | config_changes)
    return [sys.executable, "precompute.py", *flags, f"--workdir={workdir}", *more]


def _start(command):
    out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), **out)


def test_killed_at_ten_moments_a_build_ends_with_the_same_bytes(base_path, tmp_path):
    """Real processes, real SIGKILL: after a random number of new files, and a random moment more."""
    changes, rng = {"data.size": 48, "cache.shard_draws": 4}, random.Random(0)
    run = lambda workdir: _command(changes, base_path, workdir)  # noqa: E731
    whole = tiny.run_process(run(tmp_path / "whole"), env=tiny.environment())
    assert whole.status == 0, whole.err
    kills, folder, half_written = 0, tmp_path / "killed/cache", 0
    while kills < 10:
        # Counted by the folder's files: interpreter and compiler take seconds, a shard takes milliseconds.
        there = len(list(folder.glob("shard-*"))) if folder.exists() else 0
        process, until = _start(run(tmp_path / "killed")), there + rng.randint(0, 2)
        while process.poll() is None and (len(list(folder.glob("shard-*"))) if folder.exists() else -1) < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is not None:
            assert process.returncode == 0 and (folder / store.MANIFEST).exists()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        half_written += bool(list(folder.glob("*.tmp"))) if folder.exists() else 0
    assert kills == 10, kills
    print(f"{kills} kills, {half_written} with a file half written")
    done = tiny.run_process(run(tmp_path / "killed"), env=tiny.environment())
    assert done.status == 0, done.err
    assert tiny.contents(folder) == tiny.contents(tmp_path / "whole/cache")


def test_ctrl_c_keeps_what_is_complete(config, built, tmp_path, monkeypatch):
    write = store.write_shard

    def write_and_stop(path, tensors):
        entry = write(path, tensors)
        if path.name == store.shard_name(1):
            os.kill(os.getpid(), signal.SIGINT)
        return entry

    monkeypatch.setattr(store, "write_shard", write_and_stop)
    # A shell's background job ignores SIGINT, and so would Python.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="same command goes on"):
            precompute(config, tmp_path)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    kept = {p.name for p in (tmp_path / "cache").glob("shard-*")}
    assert {store.shard_name(0), store.shard_name(1)} <= kept and not (tmp_path / "cache" / store.MANIFEST).exists()
    precompute(config, tmp_path)
    assert tiny.contents(tmp_path / "cache") == tiny.contents(built / "cache")


def test_a_torn_journal_costs_one_shard(config, built, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(built / "cache", folder)
    m = store.Manifest.read(folder)
    (folder / store.MANIFEST).unlink()
    dataclasses.replace(m, shards={}).write(folder / store.BUILDING)
    lines = [json.dumps({"shard": name, **entry}) for name, entry in m.shards.items()]
    (folder / store.JOURNAL.format(0)).write_text("\n".join(lines)[:-30])
    times = {name: (folder / name).stat().st_mtime_ns for name in m.shards}
    precompute(config, tmp_path)
    assert [name for name in m.shards if (folder / name).stat().st_mtime_ns != times[name]] == [store.shard_name(2)]
    assert tiny.contents(folder) == tiny.contents(built / "cache")


def test_a_journal_of_an_earlier_build_is_not_believed(config, built, tmp_path):
    """Two processes had begun; what one of them says of a shard that is built again now must not count."""
    folder = tmp_path / "cache"
    shutil.copytree(built / "cache", folder)
    m = store.Manifest.read(folder)
    (folder / store.MANIFEST).unlink()
    dataclasses.replace(m, shards={}).write(folder / store.BUILDING)
    stale = {"shard": store.shard_name(1), "bytes": 77, "sha256": "0" * 64}
    (folder / store.JOURNAL.format(1)).write_text(json.dumps(stale) + "\n")
    precompute(config, tmp_path)
    assert tiny.contents(folder) == tiny.contents(built / "cache")


def test_a_complete_cache_is_shared_even_while_its_folder_is_held_and_cannot_be_written(
    config, built, monkeypatch, capsys
):
    monkeypatch.setattr(caching, "check_writable", None)
    with store.lock(built / "cache"):
        precompute(config, built)
        assert "the cache is complete" in capsys.readouterr().out
        monkeypatch.setattr(store, "verify", lambda folder, shards: {"x": "read"} if shards else {})
        precompute(config, built, verify=False)


def test_a_run_goes_on_with_its_cache_elsewhere(config, built, tmp_path, capsys):
    shutil.copytree(built / "cache", tmp_path / "moved")
    run = changed(config, cache__mode="build", cache__path=str(built / "cache"), train__steps=4)
    run.train.checkpoint_every = 2
    train_and_evaluate(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    other = changed(run, cache__mode="on", cache__path=str(tmp_path / "moved"), cache__verify=False)
    other.cache.batch_size = 2
    capsys.readouterr()
    train_and_evaluate(other, tmp_path / "run")
    assert "going on from step 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="cache.mode: there 'on', now 'off'"):
        train_and_evaluate(changed(run, cache__mode="off"), tmp_path / "run")


def test_examples_that_are_not_there(built):
    cache = Cache(built / "cache")
    for index in (-1, 10):
        with pytest.raises(IndexError, match="0 to 9"):
            cache.read(np.array([0, index]), np.array([0, 0]))


def test_other_random_numbers_are_refused(config, workdir):
    """Noise is not stored: where the same seed gives other noise, predictions are of something else."""
    make = changed(config, cache__mode="build", train__steps=1)
    flag = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", not flag)
    try:
        for attempt in (precompute, open_cache):
            with pytest.raises(UserError, match="other random numbers"):
                attempt(make, workdir)
    finally:
        jax.config.update("jax_threefry_partitionable", flag)


def test_views_that_change_nothing_are_refused_with_a_cache_too(config, workdir):
    with pytest.raises(UserError, match="config.data.views=1 .*data.flip, data.crop and data.jitter change nothing"):
        precompute(changed(config, data__flip=True), workdir)


def test_preprocessing_is_what_its_version_says(tmp_path):
    """If this fails, caches of before hold other values: raise PREPROCESSING, then write the new digest here."""
    rng = np.random.default_rng(0)
    for name in ("image", "segmentation", "sketch"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for i in range(2):
        _write(tmp_path / "train", f"{i}", rng)
    modalities = (Modality("segmentation", "labels", 6), Modality("sketch", "lines", 1))
    folder = Folder(tmp_path, "train", modalities, 16, 24, False)
    views = Views(folder, modalities, views=3, flip=True, crop=0.6, seed=3)
    base = types.SimpleNamespace(latent_shape=(8, 12, 4), is_text_conditional=False)
    digest = hashlib.sha256()
    for i in range(6):
        for _, value in sorted(inputs.load_example(base, views, modalities, i).items()):
            digest.update(value.tobytes())
    draws = Draws(5, 4, (1.0, 2.0), 1000)
    digest.update(np.asarray(draws.timesteps(jnp.arange(8), jnp.arange(8)), np.int32).tobytes())
    assert (inputs.PREPROCESSING, digest.hexdigest()[:16]) == (1, "97bc23ebba8c8f7f")


def test_a_full_disk_is_known_beforehand(config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    with pytest.raises(UserError, match=r"needs 0\.0 MiB more there, but 0\.0 MiB are free"):
        precompute(config, tmp_path)
    monkeypatch.undo()
    assert len(precompute(config, tmp_path)) == 10


def test_a_disk_that_fills_up_stops_the_build_cleanly(config, built, tmp_path, monkeypatch):
    """The real error of the system, by a limit on the size of files that the second shard is over."""
    resource = pytest.importorskip("resource")
    write, before = store.write_shard, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path, tensors):
        if path.name == store.shard_name(1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return write(path, tensors)

    monkeypatch.setattr(store, "write_shard", limited)
    try:
        with pytest.raises(UserError, match="the disk is full.*more are needed there") as error:
            precompute(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert "same command" in str(error.value)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    kept = (tmp_path / "cache" / store.shard_name(0)).stat().st_mtime_ns
    precompute(config, tmp_path)
    assert (tmp_path / "cache" / store.shard_name(0)).stat().st_mtime_ns == kept
    assert tiny.contents(tmp_path / "cache") == tiny.contents(built / "cache")


def test_a_disk_that_is_full_at_the_last_file_stops_the_build_with_one_message(config, built, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    write, before = store.Manifest.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(manifest, path):
        if path.name == store.MANIFEST:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        return write(manifest, path)

    monkeypatch.setattr(store.Manifest, "write", limited)
    try:
        with pytest.raises(UserError, match="the cache could not be written .File too large.*same command again"):
            precompute(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    precompute(config, tmp_path)
    assert tiny.contents(tmp_path / "cache") == tiny.contents(built / "cache")


def test_a_build_that_no_device_holds_says_the_way_out(config, tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(build._Predictor, "__call__", full)
    with pytest.raises(OutOfMemory, match=r"the base and \d+ predictions at a time .*config.cache.batch_size"):
        precompute(config, tmp_path)
    assert not list((tmp_path / "cache").glob("shard-*"))

    @dataclasses.dataclass
    class Full:
        params: dict

        encode = full

    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(OutOfMemory, match="its autoencoder's work on .* pictures .*config.base.dtype=bfloat16"):
        inputs.make_encode(Full({}), sharding.local_mesh())(pictures)


@pytest.mark.parametrize("dtype, factor", [("float16", 1e9), ("int8", np.nan), ("float32", np.inf)])
def test_a_prediction_that_is_not_finite_ends_the_build(config, tmp_path, monkeypatch, dtype, factor):
    """Of a base that overflows: nothing of that shard is written, and the message says where it happened."""
    real = loading.load_base
    config = changed(config, cache__dtype=dtype)

    def broken(*args):
        base = real(*args)
        conv_out = base.params["unet"]["conv_out"]
        params = base.params | {
            "unet": base.params["unet"] | {"conv_out": jax.tree.map(lambda p: p * factor, conv_out)}
        }
        return dataclasses.replace(base, params=params)

    monkeypatch.setattr(loading, "load_base", broken)
    with pytest.raises(
        UserError, match=rf"for example 0, draw 0 \(timestep \d+\) is not finite in {dtype}.*cache.dtype"
    ):
        precompute(config, tmp_path)
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_second_build_in_the_same_folder_is_refused(base_path, config, built, tmp_path, script):
    (tmp_path / "cache").mkdir()
    flags = [*tiny.config_flags(base_path, SMALL), f"--workdir={tmp_path}"]
    code = (
        "import pathlib, time\nfrom mcm_jax.cache import store\n"
        f"with store.lock(pathlib.Path({str(tmp_path / 'cache')!r})): print(1, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tiny.ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        assert script("precompute.py", *flags).explains("another process is building this cache", "cache.path")
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    outcome = script("precompute.py", *flags)  # whoever is killed lets go
    assert outcome.status == 0, outcome.err
    assert tiny.contents(tmp_path / "cache") == tiny.contents(built / "cache")


def test_two_processes_build_one_cache(base_path, built, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    more = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            _command({}, base_path, tmp_path, *more, f"--process_id={i}"),
            cwd=tiny.ROOT,
            env=tiny.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [p.communicate(timeout=240)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert tiny.contents(tmp_path / "cache") == tiny.contents(built / "cache")
