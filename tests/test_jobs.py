"""Laws of lists of jobs: pictures do not depend on each other, and one that fails takes none with it."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from mcm_jax import jobs as jobs_lib
from mcm_jax import pictures
from mcm_jax.errors import UserError
from mcm_jax.jobs import Drawer
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import sample_keys
from mcm_jax.trained import save_mcm

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

LINES = [
    {"name": "both", "conditions": {"segmentation": "segmentation/a.png", "sketch": "sketch/a.png"}, "seed": 3},
    {"name": "labels", "conditions": {"segmentation": "segmentation/a.png"}, "seed": 3, "guidance": 2},
    {"name": "lines", "conditions": {"sketch": "sketch/b.png"}, "seed": 4, "end": 0.5},
    {"name": "part", "conditions": {"sketch": "sketch/b.png"}, "seed": 4, "strength": {"sketch": 0.5}},
    {"name": "here", "conditions": {"sketch": "sketch/a.png"}, "mask": "mask.png", "sample": 2},
    {"seed": 3},  # no conditions: the MCM sees none
    {"name": "alone", "seed": 2**32 - 1, "guidance": 0},
]
NAMES = ["both", "labels", "lines", "part", "here", "000006", "alone"]


@pytest.fixture(scope="module")
def mcm(trained, tmp_path_factory):
    """A folder with an MCM whose every weight does something."""
    folder = tmp_path_factory.mktemp("mcm")
    shutil.copy(trained.workdir / "config.json", folder)
    rng = np.random.default_rng(0)
    params = Pipeline.from_folder(trained.workdir).mcms[0].params
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    save_mcm(folder, params, base=trained.base, step=6)
    return str(folder)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Conditions laid out as a split, one name without a segmentation, and a list of jobs beside them."""
    folder, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(1)
    for name, shape in (("a", (23, 37)), ("b", (16, 16))):
        pictures.save_png(folder / f"sketch/{name}.png", np.where(rng.random(shape) < 0.8, 255, 0).astype(np.uint8))
    pictures.save_png(folder / "segmentation/a.png", rng.integers(0, 6, (23, 37)).astype(np.uint8))
    pictures.save_png(folder / "mask.png", np.where(np.arange(16) < 8, 255, 0).astype(np.uint8)[None].repeat(16, 0))
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return folder


@pytest.fixture(scope="module")
def drawer(mcm):
    return Drawer(mcm, batch_size=4)


@pytest.fixture(scope="module")
def whole(drawer, maps, tmp_path_factory):
    """The list, drawn without a break."""
    out = tmp_path_factory.mktemp("whole")
    jobs, problems = jobs_lib.read_jobs(maps / "jobs.jsonl", drawer)
    assert [j.name for j in jobs] == NAMES and not problems
    assert drawer.draw(jobs, out) == len(jobs)
    return jobs, out


def _pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def _assert_same(a, b):
    """Samples agree within 1e-4, so pictures within one of 256 levels."""
    assert np.abs(a - b).max() <= 1


def test_jobs_of_every_kind_share_one_program(drawer, whole):
    """And each is what it is alone, in a batch of another size."""
    jobs, out = whole
    assert drawer.pipeline.engine.compilations == 1  # of two batches, one half filled
    found = [_pixels(out / f"{job.name}.png") for job in jobs]
    for job, picture in zip(jobs, found, strict=True):
        _assert_same(pictures.to_uint8(drawer.sample([job], 2)[0]).astype(int), picture)
    _assert_same(pictures.to_uint8(drawer.sample(jobs[::-1], 4)).astype(int), np.stack(found[::-1]))
    assert all(np.abs(a - b).max() > 4 for i, a in enumerate(found) for b in found[:i])


def test_seeds_and_samples_are_those_of_sample_py(drawer, whole):
    jobs, _ = whole
    one = jobs_lib.dataclasses.replace(jobs[-1], sample=1)
    images = drawer.sample([jobs[-1], one])
    alone = drawer.pipeline({}, sample_keys(2**32 - 1, 2), guidance=0.0, batch_size=4)
    np.testing.assert_allclose(images, alone, atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_leaves_whole_pictures_and_the_same_call_goes_on(drawer, whole, tmp_path, monkeypatch, error):
    jobs, out = whole
    save, left = pictures.save_png, [3]

    def stops(*arguments):
        if not left[0]:
            raise error
        left[0] -= 1
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_png", stops)
        with pytest.raises((KeyboardInterrupt, UserError)):
            drawer.draw(jobs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    other = jobs_lib.dataclasses.replace(jobs[-1], seed=1)
    drawer.draw([other], tmp_path)  # a picture of other settings is drawn anew
    assert drawer.draw(jobs, tmp_path) == len(jobs) - 3 + (tmp_path / "alone.png" in times)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.stem != "alone")
    assert drawer.draw(jobs, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.png" for n in NAMES)
    for name in NAMES:
        _assert_same(_pixels(tmp_path / f"{name}.png"), _pixels(out / f"{name}.png"))


def test_a_picture_is_drawn_again_from_what_it_says(script, whole, maps, tmp_path):
    _, out = whole
    for name in ("both", "here"):
        outcome = script("sample.py", f"--replay={out / name}.png", f"--out={tmp_path}")
        assert outcome.status == 0, outcome.err
        _assert_same(_pixels(tmp_path / f"{name}.png"), _pixels(out / f"{name}.png"))
        before, now = (jobs_lib.read_record(folder / f"{name}.png") for folder in (out, tmp_path))
        assert before == now
    plain, other, moved = (tmp_path / f"{name}.png" for name in ("plain", "other", "moved"))
    pictures.save_png(plain, np.zeros((4, 4), np.uint8))
    pictures.save_png(other, np.zeros((4, 4), np.uint8), {"mcm_jax": json.dumps(before | {"mcm_sha256": "0" * 64})})
    said = json.dumps(before | {"conditions": {"sketch": {"file": str(maps / "sketch/b.png"), "sha256": "1"}}})
    pictures.save_png(moved, np.zeros((4, 4), np.uint8), {"mcm_jax": said})
    for path, words in ((plain, "carries no settings"), (other, "another MCM"), (moved, "another .*b.png")):
        with pytest.raises(UserError, match=words):
            jobs_lib.replay(path, tmp_path)


def test_bad_jobs_are_named_by_line_and_the_others_drawn(script, mcm, maps, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    sketch = {"sketch": str(maps / "sketch/a.png")}
    bad = {
        "{": "no JSON",
        "[1]": "must be an object",
        json.dumps({"conditions": sketch, "guidence": 2}): "unknown guidence",
        json.dumps({"conditions": {"depth": "a.png"}}): "the MCM knows segmentation, sketch, not depth",
        json.dumps({"conditions": {"sketch": "absent.png"}}): "no such file",
        json.dumps({"conditions": {"sketch": "text.png"}}): "not a picture",
        json.dumps({"conditions": sketch, "strength": {"sketch": -1}}): "strength.sketch must be at least 0",
        json.dumps({"conditions": sketch, "guidance": "2"}): "guidance must be a number",
        json.dumps({"conditions": sketch, "start": 0.6, "end": 0.5}): "end must be",
        json.dumps({"conditions": sketch, "prompt": "a lake"}): "unconditional",
        json.dumps({"conditions": sketch, "seed": -1}): "seed must be",
        json.dumps({"conditions": sketch, "name": "../a"}): "name must be",
        json.dumps({"conditions": sketch, "name": "good"}): "give each its own",
        json.dumps(
            {"conditions": sketch, "name": "nan", "seed": 9, "guidance": 3e38}
        ): "(nan, seed 9): came out as NaN",
    }
    good = json.dumps({"conditions": sketch, "name": "good"})
    (tmp_path / "jobs.jsonl").write_text("\n".join([good, "", *bad]))
    outcome = script("sample.py", f"--workdir={mcm}", f"--jobs={tmp_path}/jobs.jsonl", f"--out={tmp_path / 'out'}")
    assert outcome.status == 1 and "Traceback" not in outcome.err
    assert f"{len(bad)} jobs failed" in outcome.err
    lines = outcome.err.splitlines()
    for number, words in enumerate(bad.values(), start=3):
        assert any(f"jobs.jsonl:{number}" in line and words in line for line in lines), (number, words, outcome.err)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]


def test_a_folder_of_conditions_has_a_job_for_each_name(script, drawer, mcm, maps, tmp_path):
    jobs = jobs_lib.jobs_of_folder(maps, drawer, seed=1)
    assert [(j.name, sorted(j.conditions)) for j in jobs] == [("a", ["segmentation", "sketch"]), ("b", ["sketch"])]
    command = ["sample.py", f"--workdir={mcm}", f"--conditions={maps}", f"--out={tmp_path}", "--seed=1"]
    outcome = script(*command)
    assert outcome.status == 0, outcome.err
    for job in jobs:
        _assert_same(_pixels(tmp_path / f"{job.name}.png"), pictures.to_uint8(drawer.sample([job])[0]).astype(int))
    assert script(*command, "--num_samples=2").explains("--conditions", "--num_samples")
    with pytest.raises(UserError, match="holds no conditions"):
        jobs_lib.jobs_of_folder(tmp_path, drawer)
