"""Laws of examples that cannot be read: fatal by name, or passed over alike by everyone, counted and named."""

import concurrent.futures
import dataclasses
import json

import numpy as np
import pytest
import tiny
from PIL import Image
from test_cache import feeds_of

from mcm_jax import config as config_lib
from mcm_jax.cache import store
from mcm_jax.data.unreadable import Skipping
from mcm_jax.data.views import Views
from mcm_jax.errors import UserError
from mcm_jax.training import caching, precompute, train_and_evaluate

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

COUNT, BAD = 40, ("07", "39")  # each followed by one that is whole: the last one by the first


class Files(list):
    """Examples of which some raise, as a folder's do."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        if example is None:
            raise UserError(f"image/{index}.png: damaged")
        return example


def test_the_next_one_takes_its_place_whoever_asks():
    rng = np.random.default_rng(0)
    examples = [{"image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)} for _ in range(60)]
    views = Views(Files([None if i in (7, 8, 59) else e for i, e in enumerate(examples)]), (), views=3, crop=0.6)
    whole = Views(examples, (), views=3, crop=0.6)
    instead = {7: 9, 8: 9, 59: 0}
    one, two = Skipping(views, 3), Skipping(views, 3)
    wanted = [whole[3 * instead.get(i // 3, i // 3) + i % 3]["image"] for i in range(180)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one.__getitem__, rng.permutation(180).tolist() + list(range(180))))[180:]
    assert all(np.array_equal(f["image"], w) for f, w in zip(found, wanted, strict=True))
    assert sorted(one.skipped) == [7, 8, 59] and "image/8.png: damaged" in one.skipped[8]
    assert np.array_equal(two[-1]["image"], wanted[-1]) and sorted(two.skipped) == [59]
    with pytest.raises(IndexError):
        two[180]


def test_too_many_are_fatal():
    source = Skipping(Files([None] * 4 + [{}] * 56), names=[f"n{i}" for i in range(60)])
    with pytest.raises(
        UserError, match=r"^4 of 60 examples cannot be read.*: n0, n1, n2, n3. More than 5%.*image/3.png"
    ):
        source[0]


def test_too_many_of_several_builds_and_processes_are_fatal(base_path, tmp_path):
    """Shards that were kept count, and those of other processes: no one of them has passed over too many."""
    config = tiny.make_config(base_path, {"data.size": 40, "cache.shard_draws": 16})
    precompute(config, tmp_path)
    folder = tmp_path / "cache"
    manifest = store.Manifest.find(folder)
    (folder / store.MANIFEST).unlink()
    entries = [{"shard": name, **entry} for name, entry in manifest.shards.items()]
    for i, entry in enumerate(entries[:3]):
        entry["skipped"] = [manifest.rows(i)[0]]
    (folder / store.JOURNAL.format(1)).write_text("".join(json.dumps(entry) + "\n" for entry in entries[1:]))
    dataclasses.replace(manifest, shards={}).write(folder / store.BUILDING)
    entries[0]["skipped"] = []
    (folder / store.JOURNAL.format(0)).write_text(json.dumps(entries[0]) + "\n")
    precompute(config, tmp_path)  # 2 of 40
    (folder / store.MANIFEST).unlink()
    dataclasses.replace(manifest, shards={}).write(folder / store.BUILDING)
    entries[0]["skipped"] = [0]
    (folder / store.JOURNAL.format(0)).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(UserError, match="3 of 40 examples cannot be read.*More than 5% are not passed over"):
        precompute(config, tmp_path)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("image", "segmentation", "sketch"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for i in range(COUNT):
            values = rng.integers(0, 6, (8, 8, 3) if name == "image" else (8, 8)).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / f"data/train/{name}/{i:02d}.png")
    for stem, name in zip(BAD, ("image", "segmentation"), strict=True):
        file = tmp_path / f"data/train/{name}/{stem}.png"
        file.write_bytes(file.read_bytes()[:40])
    return tmp_path / "data"


def test_training_and_cache_pass_over_what_they_are_told_to(small_path, data, tmp_path, capsys):
    changes = {"data.name": "folder", "data.path": str(data), "data.held_out_share": 0.0, "data.unreadable": "fail"}
    changes |= {
        "draws.count": 2,
        "data.views": 2,
        "data.flip": True,
        "cache.dtype": "float32",
        "train.validate_every": 1,  # its pictures are of training examples, too
    }
    config = tiny.make_config(small_path, tiny.SMALL | changes | {"cache.shard_draws": 8})
    with pytest.raises(UserError, match="image/07.png: not a picture that can be read"):
        precompute(config, tmp_path / "run")
    config.data.unreadable = "skip"
    online, cached = feeds_of(config, tmp_path / "run")  # the build goes on with the shards that it has
    printed = capsys.readouterr().out
    said = "2 of 40 examples cannot be read, others are in their places: 07, 39"
    assert "9 shard(s) built now" in printed and said in printed and "passed over" in printed
    for a, b in zip(online, cached, strict=True):
        np.testing.assert_allclose(a.pop("eps"), b.pop("eps"), atol=1e-5)
        tiny.assert_same_bits(a, b)
    cache = caching.open_cache(tiny.settings_of(config), tmp_path / "run")
    record = cache.read(np.array([7, 8, 39, 0], np.int32), np.array([1, 1, 0, 0], np.int32))["image"]
    np.testing.assert_array_equal(record[[0, 2]], record[[1, 3]])
    assert cache.manifest.skipped == [7, 39]
    for mode in ("off", "on"):
        config.cache.mode, config.cache.path = mode, str(tmp_path / "run/cache")
        train_and_evaluate(config, tmp_path / mode)
        assert said in capsys.readouterr().out
        assert {line["unreadable"] for line in tiny.metrics_of(tmp_path / mode)} == {2}
    # What was begun with another word goes on.
    config.data.unreadable = "fail"
    assert config_lib.load(type(tiny.settings_of(config)), tmp_path / "on").data.unreadable == "skip"
    train_and_evaluate(config, tmp_path / "on")
