"""Laws of lists of jobs: pictures do not depend on each other, and one that fails takes none with it."""

import dataclasses
import json
import shutil
import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from mcm_jax import jobs as jobs_lib
from mcm_jax import pictures
from mcm_jax.data.classes import Classes
from mcm_jax.errors import UserError
from mcm_jax.jobs import Drawer, lists
from mcm_jax.jobs.intermediates import Intermediates
from mcm_jax.jobs.record import Recorder, is_drawn
from mcm_jax.jobs.watch import Watch
from mcm_jax.modalities import Modality, read_png
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import SamplingSettings, initial_noise, sample_keys, slerp
from mcm_jax.trained import save_mcm

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

BOTH = {"segmentation": "segmentation/a.png", "sketch": "sketch/a.png"}
LINES = [
    {"name": "both", "conditions": BOTH, "seed": 3},
    {"name": "labels", "conditions": {"segmentation": "segmentation/a.png"}, "seed": 3, "guidance": 2},
    {"name": "lines", "conditions": {"sketch": "sketch/b.png"}, "seed": 4, "end": 0.5},
    {"name": "part", "conditions": {"sketch": "sketch/b.png"}, "seed": 4, "strength": {"sketch": 0.5}},
    {"name": "here", "conditions": {"sketch": "sketch/a.png"}, "mask": "mask.png", "sample": 2},
    {"seed": 3},  # no conditions: the MCM sees none
    {"name": "alone", "seed": 2**32 - 1, "guidance": 0},
    {"name": "turns", "conditions": BOTH, "seed": 3, "window": {"sketch": [0.5, 1], "segmentation": [0, 0.5]}},
    {"name": "falling", "conditions": BOTH, "seed": 3, "guidance_schedule": [2, 0], "weights": [1.5]},
    {"name": "moved", "conditions": BOTH, "seed": 3, "variation_seed": 0, "variation": 0.4},
    {"name": "begun", "conditions": BOTH, "seed": 3, "image": "image.png", "image_strength": 0.7},
    {
        "name": "filled",
        "conditions": BOTH,
        "seed": 5,
        "image": "image.png",
        "image_strength": 0.7,
        "inpaint": "hole.png",
    },
    {"name": "other", "conditions": BOTH, "seed": 3, "sampler": "dpm++2m", "steps": 4, "spacing": "trailing"},
    {"name": "wide", "conditions": BOTH, "seed": 3, "width": 24, "image": "image.png", "mask": "mask.png"},
]
NAMES = [line.get("name", "000006") for line in LINES]


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
    pictures.save_png(folder / "mask.png", np.where(np.arange(18) < 9, 255, 0).astype(np.uint8)[None].repeat(10, 0))
    pictures.save_png(folder / "hole.png", np.where(np.arange(40) < 25, 0, 255).astype(np.uint8)[:, None].repeat(72, 1))
    pictures.save_png(folder / "image.png", rng.integers(0, 256, (20, 36, 3)).astype(np.uint8))
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


def _alone(pipeline, line, folder):
    """What the pipeline gives for a line's own arguments, by itself: uint8."""
    base = pipeline.sized(line.get("height", 0), line.get("width", 0))
    size, grid = base.image_shape[:2], base.latent_shape[:2]
    how = {f.name: line[f.name] for f in dataclasses.fields(SamplingSettings) if f.name in line}
    by_name = {m.name: m for m in pipeline.modalities}
    maps = {
        n: by_name[n].fit(read_png(folder / path, by_name[n]), *grid)[None] for n, path in line["conditions"].items()
    }
    how |= {k: line[k] for k in ("strength", "window", "weights") if k in line}
    mask = Modality("mask", "map", 1)
    if "mask" in line:
        how["mask"] = mask.fit(read_png(folder / line["mask"], mask), *grid)[None]
    if "image" in line:
        picture = ImageOps.fit(Image.open(folder / line["image"]), size[::-1], Image.Resampling.LANCZOS)
        how["image"] = np.asarray(picture, np.float32)[None] / 127.5 - 1
    if "inpaint" in line:
        how["inpaint"] = mask.fit(read_png(folder / line["inpaint"], mask), *size)[None] >= 0.5
    keys = sample_keys(line["seed"], line.get("sample", 0) + 1)[-1:]
    if "variation" in line:
        noises = (initial_noise(k, base.latent_shape) for k in (keys, sample_keys(line["variation_seed"], 1)))
        how["latents"] = slerp(*noises, np.array([line["variation"]], np.float32))
    return pictures.to_uint8(pipeline(maps, keys, batch_size=4, **how)[0]).astype(int)


def test_jobs_of_every_kind_are_what_the_pipeline_gives_and_a_size_has_one_program(drawer, whole, maps):
    """And each is what it is alone; what an inpainted picture keeps is the given one's."""
    jobs, out = whole
    assert drawer.pipeline.engine.compilations == 2  # the last job is of another size
    found = [_pixels(out / f"{job.name}.png") for job in jobs]
    for job, line, picture in zip(jobs, LINES, found, strict=True):
        line = {"conditions": {}, "seed": job.seed} | line
        _assert_same(_alone(drawer.pipeline, line, maps), picture)
    assert drawer.pipeline.engine.compilations == 2
    for job, picture in zip(jobs[:4], found, strict=False):
        _assert_same(pictures.to_uint8(drawer.sample([job], 2)[0]).astype(int), picture)
    _assert_same(pictures.to_uint8(drawer.sample(jobs[9::-1], 4)).astype(int), np.stack(found[9::-1]))
    same = [
        (NAMES[i], NAMES[k])
        for i, a in enumerate(found)
        for k, b in enumerate(found[:i])
        if a.shape == b.shape and np.abs(a - b).max() <= 4
    ]
    assert not same
    given = ImageOps.fit(Image.open(maps / "image.png"), (16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found[NAMES.index("filled")][:10], np.asarray(given)[:10])


def test_seeds_and_samples_are_those_of_sample_py(drawer, whole):
    jobs, _ = whole
    last = jobs[NAMES.index("alone")]
    one = dataclasses.replace(last, sample=1)
    images = drawer.sample([last, one])
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
    other = dataclasses.replace(jobs[NAMES.index("alone")], seed=1)
    drawer.draw([other], tmp_path)  # a picture of other settings is drawn anew
    assert drawer.draw(jobs, tmp_path) == len(jobs) - 3 + (tmp_path / "alone.png" in times)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p.stem != "alone")
    assert drawer.draw(jobs, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.png" for n in NAMES)
    for name in NAMES:
        _assert_same(_pixels(tmp_path / f"{name}.png"), _pixels(out / f"{name}.png"))


def test_a_picture_is_drawn_again_from_what_it_says(script, drawer, whole, maps, tmp_path, monkeypatch):
    """Whatever decided it; by the script, and all of them by one pipeline that is compiled already."""
    _, out = whole
    outcome = script("sample.py", f"--replay={out / 'here'}.png", f"--out={tmp_path}")
    assert outcome.status == 0, outcome.err
    with monkeypatch.context() as patch:
        patch.setattr(lists, "Drawer", lambda *_, **__: drawer)
        for name in NAMES:
            if name != "here":
                jobs_lib.replay(out / f"{name}.png", tmp_path)
        jobs_lib.replay(out / "turns.png", tmp_path / "half", window={"sketch": (0, 1)})
        jobs_lib.replay(out / "turns.png", tmp_path / "whole", window={"sketch": (0, 1), "segmentation": (0, 1)})
        for idle, words in (
            ({"strength": {"segmentation": 1}}, "strength: given of segmentation"),
            ({"image_strength": 0.5}, "image_strength: does nothing without an image"),
        ):
            with pytest.raises(UserError, match=words):
                jobs_lib.replay(out / "lines.png", tmp_path / "idle", **idle)
    for name in NAMES:
        _assert_same(_pixels(tmp_path / f"{name}.png"), _pixels(out / f"{name}.png"))
        before, now = (jobs_lib.read_record(folder / f"{name}.png") for folder in (out, tmp_path))
        assert before == now
    assert jobs_lib.read_record(tmp_path / "half/turns.png")["window"] == {"segmentation": [0, 0.5]}
    _assert_same(_pixels(tmp_path / "whole/turns.png"), _pixels(out / "both.png"))
    before = jobs_lib.read_record(out / "here.png")
    plain, other, moved = (tmp_path / f"{name}.png" for name in ("plain", "other", "moved"))
    pictures.save_png(plain, np.zeros((4, 4), np.uint8))
    pictures.save_png(other, np.zeros((4, 4), np.uint8), {"mcm_jax": json.dumps(before | {"mcm_sha256": "0" * 64})})
    said = json.dumps(before | {"conditions": {"sketch": {"file": str(maps / "sketch/b.png"), "sha256": "1"}}})
    pictures.save_png(moved, np.zeros((4, 4), np.uint8), {"mcm_jax": said})
    for path, words in ((plain, "carries no settings"), (other, "another MCM"), (moved, "another .*b.png")):
        with pytest.raises(UserError, match=words):
            jobs_lib.replay(path, tmp_path)


def test_plain_pictures_say_what_those_of_the_first_version_said(drawer, whole, tmp_path):
    """And how the base's file draws. Pictures that do not say it stay, too, those of another file do not."""
    jobs, out = whole
    of_job = {"conditions", "strength", "mask", "seed", "sample"}
    how = {"sampler", "steps", "spacing", "timesteps", "eta", "modulate", "guidance", "start", "end"}
    by_what = {"workdir", "mcm_sha256", "mcm_step", "base", "fingerprint", "device", "versions"}
    for name in NAMES[:7]:
        assert jobs_lib.read_record(out / f"{name}.png").keys() == of_job | how | by_what | {"schedule"}
    assert "window" in jobs_lib.read_record(out / "turns.png")
    record, picture = drawer.record(jobs[0]), tmp_path / "both.png"
    other = record["schedule"] | {"timestep_spacing": "linspace"}
    assert record["schedule"] != other
    first = {k: v for k, v in record.items() if k != "schedule"} | {"base": "elsewhere"}
    for said, stays in ((first, True), (record, True), (record | {"schedule": other}, False)):
        pictures.save_png(picture, np.zeros((4, 4), np.uint8), {"mcm_jax": json.dumps(said)})
        assert is_drawn(picture, record) == stays
    with pytest.raises(UserError, match=r"scheduler_config.json of .* \(timestep_spacing: linspace then"):
        jobs_lib.replay(picture, tmp_path)


def test_the_colours_by_which_labels_are_read_decide_a_picture(drawer, whole, tmp_path, monkeypatch):
    """Pictures that do not say them, as those of before, stay."""
    (m,) = (m for m in drawer.pipeline.modalities if m.kind == "labels")
    colours, records = np.arange(3 * m.channels, dtype=np.uint8).reshape(-1, 3), []
    for colors in (None, colours, colours[::-1]):
        described = Classes(tuple(map(str, range(m.channels))), colors)
        monkeypatch.setattr(Pipeline, "classes", lambda self, name, found=described: found)
        records.append(Recorder(drawer.workdirs, drawer.pipeline).record(whole[0][0]))
    assert [list(r.get("colors", ())) for r in records] == [[], [m.name], [m.name]]
    for was, now, stays in ((0, 0, True), (0, 1, True), (1, 1, True), (1, 2, False)):
        pictures.save_png(tmp_path / "x.png", np.zeros((4, 4), np.uint8), {"mcm_jax": json.dumps(records[was])})
        assert is_drawn(tmp_path / "x.png", records[now]) == stays


def test_no_file_is_lost_but_earlier_pictures(drawer, whole, maps, tmp_path):
    """Not one of the user's of the same name, and none that the picture is drawn from."""
    jobs, out = whole
    same = dataclasses.replace(jobs[0], name="a", conditions={"sketch": str(maps / "sketch/a.png")})
    before = (maps / "sketch/a.png").read_bytes()
    with pytest.raises(UserError, match=r"sketch/a.png: is what is drawn from \(conditions.sketch\)"):
        drawer.draw([same], maps / "sketch")
    assert (maps / "sketch/a.png").read_bytes() == before
    pictures.save_png(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="a.png: was not written by sample.py"):
        drawer.draw([same, jobs[5]], tmp_path)
    assert Image.open(tmp_path / "a.png").size == (4, 4) and (tmp_path / f"{jobs[5].name}.png").exists()
    before = (out / "labels.png").read_bytes()
    with pytest.raises(UserError, match=r"labels.png: is what is drawn from \(--replay\)"):
        jobs_lib.replay(out / "labels.png", out, guidance=1.0)
    jobs_lib.replay(out / "labels.png", out)  # which is there
    assert (out / "labels.png").read_bytes() == before


def test_what_is_typed_for_a_replay_goes_with_the_picture(whole, mcm, tmp_path):
    """Not with the run's settings, whose sampler has no eta."""
    shutil.copytree(mcm, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["sampling"]["sampler"] == "ddim"
    config["sampling"]["sampler"] = "euler"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    jobs_lib.replay(whole[1] / "both.png", tmp_path, workdir=str(tmp_path / "run"), eta=0.5)
    found = jobs_lib.read_record(tmp_path / "both.png")
    assert (found["sampler"], found["eta"]) == ("ddim", 0.5)


def test_prompts_are_found_wherever_a_split_has_them(tmp_path):
    lines = [{"file": "a.png", "caption": "a  lake"}, {"file": "c.png", "text": "a hill"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert lists._captions(tmp_path, {"a", "b"}) == ({"a": "a lake"}, [])  # c has no conditions, b no line
    (tmp_path / "captions.jsonl").write_text('{"file": "e\u0301.png", "caption": "a hill"}')
    assert lists._captions(tmp_path, {"\u00e9"}) == ({"\u00e9": "a hill"}, [])
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png", "label": 3}\n{"file_name": "b.png", "label": 4}')
    assert lists._captions(tmp_path, {"a", "b"}) == ({}, [])  # metadata of another kind
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "a lake"}\n{')
    with pytest.raises(UserError, match="captions.jsonl: line 2: no JSON"):
        lists._captions(tmp_path, {"a"})
    (tmp_path / "caption").mkdir()
    (tmp_path / "caption/a.txt").write_text("a lake\n")
    with pytest.raises(UserError, match="prompts are in .*caption and in .*captions.jsonl"):
        lists._captions(tmp_path, {"a"})
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "caption/b.txt").write_text("a hill\nby day\n")
    prompts, (problem,) = lists._captions(tmp_path, {"a", "b", "c"})
    assert prompts == {"a": "a lake"} and "b.txt: expected one line, the prompt, found 2" in str(problem)


def test_what_goes_by_modality_is_put_together(drawer, maps, tmp_path):
    """A line's over the command's. What is typed for all and does nothing for any is refused."""
    (maps / "by_name.jsonl").write_text(
        json.dumps({"conditions": BOTH, "strength": {"segmentation": 0.8}, "window": {"sketch": [0.5, 1]}}) + "\n{}"
    )
    typed = {"strength": {"sketch": 0.5, "segmentation": 2.0}, "window": {"segmentation": (0.0, 0.5)}}
    (job, plain), problems = jobs_lib.read_jobs(maps / "by_name.jsonl", drawer, **typed)
    assert job.strength == {"sketch": 0.5, "segmentation": 0.8} and plain.strength == typed["strength"]
    assert job.window == {"sketch": (0.5, 1), "segmentation": (0, 0.5)} and not problems
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"conditions": {"sketch": str(maps / "sketch/a.png")}}))
    shutil.copytree(maps / "sketch", tmp_path / "sketch")
    for idle, words in (
        ({"strength": {"segmentation": 0.5}}, "strength: given of segmentation"),
        ({"window": {"segmentation": (0, 0.5)}}, "window: given of segmentation"),
        ({"image_strength": 0.5}, "image_strength: does nothing without an image"),
    ):
        for read, path in ((jobs_lib.read_jobs, tmp_path / "jobs.jsonl"), (jobs_lib.jobs_of_folder, tmp_path)):
            with pytest.raises(UserError, match=words):
                read(path, drawer, **idle)


def test_masks_are_white_strokes_of_their_picture(drawer, whole, maps, tmp_path, monkeypatch):
    """What is transparent is black; a mask of another aspect ratio would move. Pictures with such a one replay."""
    jobs, _ = whole
    alpha = np.asarray(Image.open(maps / "mask.png"))
    strokes = Image.fromarray(np.stack([np.full_like(alpha, 255)] * 3 + [alpha], -1))
    strokes.save(tmp_path / "strokes.png")
    plain, found = (drawer.files.mask(str(path), (16, 16)) for path in (maps / "mask.png", tmp_path / "strokes.png"))
    np.testing.assert_array_equal(found, plain)

    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for name, size, orientation in (
        ("turned", (20, 36), exif),
        ("rounded", (37, 20), None),
        ("square", (20, 20), None),
    ):
        Image.new("RGB", size).save(tmp_path / f"{name}.jpg", **({"exif": orientation} if orientation else {}))
        how = {"image": str(tmp_path / f"{name}.jpg"), "mask": str(maps / "mask.png")}
        if name != "square":
            assert len(jobs_lib.jobs_of_folder(maps, drawer, **how)[0]) == 2
            continue
        with pytest.raises(UserError, match=r"mask.png: is 18x10 pixels, which is another shape than .*: 20x20 pixels"):
            jobs_lib.jobs_of_folder(maps, drawer, **how)

    hole = str(maps / "sketch/b.png")
    job = dataclasses.replace(jobs[NAMES.index("filled")], inpaint=hole)
    drawer.draw([job], tmp_path / "out")
    monkeypatch.setattr(lists, "Drawer", lambda *_, **__: drawer)
    jobs_lib.replay(tmp_path / "out/filled.png", tmp_path / "again")
    _assert_same(_pixels(tmp_path / "again/filled.png"), _pixels(tmp_path / "out/filled.png"))
    with pytest.raises(UserError, match="b.png: is 16x16 pixels, which is another shape"):
        jobs_lib.replay(tmp_path / "out/filled.png", tmp_path / "again", inpaint=hole)


def test_mcms_act_together_and_their_pictures_name_them_all(mcm, trained, whole, maps, tmp_path, monkeypatch):
    """Where one weighs nothing the picture is the other's alone."""
    _, out = whole
    drawer = Drawer([mcm, str(trained.workdir)], batch_size=2)
    line = {"conditions": BOTH, "seed": 3}
    lines = [
        {"name": "both", "weights": [1, 0], **line},
        {"name": "more", "weights": [0.5, 2], "num_samples": 2, **line},
    ]
    (maps / "together.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs, problems = jobs_lib.read_jobs(maps / "together.jsonl", drawer)
    assert [job.name for job in jobs] == ["both", "more_000", "more_001"] and not problems
    assert drawer.draw(jobs, tmp_path) == 3 and drawer.draw(jobs, tmp_path) == 0
    _assert_same(_pixels(tmp_path / "both.png"), _pixels(out / "both.png"))
    found, first, second = (_pixels(tmp_path / f"{job.name}.png") for job in jobs)
    assert min(np.abs(a - b).max() for a, b in ((found, first), (first, second))) > 4
    assert jobs_lib.read_record(tmp_path / "both.png")["workdir"] == [mcm, str(trained.workdir)]
    monkeypatch.setattr(lists, "Drawer", lambda *_, **__: drawer)
    jobs_lib.replay(tmp_path / "more_001.png", tmp_path / "again")
    _assert_same(_pixels(tmp_path / "again/more_001.png"), second)
    with pytest.raises(UserError, match="another MCM"):
        jobs_lib.replay(out / "both.png", tmp_path / "again")


def test_a_contact_sheet_shows_what_was_given_and_drawn(drawer, whole, maps, tmp_path):
    """Columns of 132 pixels: what any of the jobs shows, the base alone, the picture."""
    jobs, out = whole
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    first = [jobs[NAMES.index(name)] for name in ("lines", "both", "alone", "wide")]
    broken = dataclasses.replace(jobs[0], name="broken", conditions={"sketch": str(maps / "jobs.jsonl")})
    with pytest.raises(UserError, match=r"jobs.jsonl: not a picture"):
        drawer.draw([broken, *first], tmp_path, sheet=3)
    sheet = _pixels(tmp_path / "sheet.png")
    assert sheet.shape == (20 + 3 * 132, 150 + 4 * 132, 3)
    cells = {(i, j): sheet[20 + 132 * i :, 150 + 132 * j :][:128, :128] for i in range(3) for j in range(4)}
    for row, name in enumerate(("lines", "both", "alone")):
        np.testing.assert_array_equal(cells[row, 3][::8, ::8], _pixels(out / f"{name}.png"))
    assert (cells[0, 0] == 160).all() and (cells[0, 1] != 160).any() and (cells[2, 1] == 160).all()
    _assert_same(cells[2, 2], cells[2, 3])  # it had no guidance
    assert np.abs(cells[1, 2] - cells[1, 3]).max() > 4
    assert drawer.draw(first[3:], tmp_path, sheet=1) == 0  # "wide": 24 pixels of 16
    assert (_pixels(tmp_path / "sheet.png")[-47:, -132:-4] == 255).all()


def test_nothing_is_drawn_from_less_than_a_folder_has(drawer, maps, tmp_path):
    """A file of another kind beside a good one takes nothing away; one in its place does, and a broken folder all."""
    for name in ("segmentation", "sketch"):
        shutil.copytree(maps / name, tmp_path / name)
    (tmp_path / "sketch/a.json").write_text("{}")
    (tmp_path / "segmentation/b.jpg").write_bytes(b"")
    jobs, problems = jobs_lib.jobs_of_folder(tmp_path, drawer)
    assert [(j.name, sorted(j.conditions)) for j in jobs] == [("a", ["segmentation", "sketch"])]
    assert len(problems) == 2 and "a.json" in problems[1] and "b.jpg" in problems[0]
    shutil.rmtree(tmp_path / "segmentation")
    (tmp_path / "segmentation").write_text("no folder")
    with pytest.raises(UserError, match="segmentation: cannot be read as a folder"):
        jobs_lib.jobs_of_folder(tmp_path, drawer)


def test_a_sheet_replaces_no_picture_of_another_list(drawer, whole, tmp_path):
    jobs, out = whole
    shutil.copy(out / "both.png", tmp_path / "sheet.png")
    with pytest.raises(UserError, match="sheet.png is a picture of another list"):
        drawer.draw(jobs[1:2], tmp_path, sheet=1)
    assert (tmp_path / "sheet.png").read_bytes() == (out / "both.png").read_bytes()


def test_a_transparent_mask_is_another_one_than_it_was(drawer, whole, tmp_path):
    jobs, _ = whole
    job = jobs[NAMES.index("here")]
    pixels = np.full((16, 16, 4), 255, np.uint8)
    pixels[:, 8:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    said = [
        drawer.record(dataclasses.replace(job, mask=str(path)))["mask"] for path in (tmp_path / "mask.png", job.mask)
    ]
    assert [set(each) for each in said] == [{"file", "sha256", "alpha"}, {"file", "sha256"}]


def test_what_was_trained_in_one_dtype_draws_in_another(drawer, whole, mcm, tmp_path):
    """It is the same base, and pictures say so."""
    jobs, out = whole
    half = Drawer(mcm, batch_size=4, dtype="bfloat16")
    assert half.pipeline.base.fingerprint == drawer.pipeline.base.fingerprint and half.pipeline.base.dtype == "bfloat16"
    assert {p.dtype.name for p in jax.tree.leaves(half.pipeline.base.params)} == {"bfloat16"}
    assert half.draw(jobs[:1], tmp_path) == 1 and half.draw(jobs[:1], tmp_path) == 0
    difference = np.abs(_pixels(tmp_path / "both.png") - _pixels(out / "both.png"))
    assert difference.max() > 1 and difference.mean() < 4
    jobs_lib.replay(tmp_path / "both.png", tmp_path / "again")
    np.testing.assert_array_equal(_pixels(tmp_path / "again/both.png"), _pixels(tmp_path / "both.png"))
    assert drawer.draw(jobs[:1], tmp_path) == 1  # another picture
    assert Drawer(mcm, batch_size=4, dtype="float32").draw(jobs[:1], tmp_path) == 0  # as it was trained
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16"):
        Drawer(mcm, dtype="int8")


def test_a_person_sees_how_far_it_is(drawer, whole, tmp_path, monkeypatch):
    """The bar's steps are all that are taken; the sheet is there while pictures are drawn."""
    jobs, _ = whole
    seen, call = [], Watch.__call__

    def told(self, now):
        call(self, now)
        seen.append((self.bar.n, self.bar.total, self.path.exists() and Image.open(self.path).size))

    monkeypatch.setattr(Watch, "__call__", told)
    drawer.draw(jobs[:5], tmp_path, preview_every=2)
    assert [s[:2] for s in seen] == [(i + 1, 6) for i in range(6)]  # of two batches
    assert [bool(s[2]) for s in seen] == [False, True, True, True, True, True] and seen[1][2] == (6 * 35, 6 * 35)
    assert not (tmp_path / "preview.png").exists() and len(list(tmp_path.iterdir())) == 5
    odd = dataclasses.replace(jobs[0], name="preview")
    with pytest.raises(UserError, match="preview.png"):
        drawer.draw([odd], tmp_path, preview_every=2)


def test_where_and_when_an_mcm_acts_is_shown(script, drawer, whole, mcm, maps, tmp_path):
    """With a window it is one step; below the samples are those of the base alone."""
    jobs, _ = whole
    look = Intermediates(5, 4)
    drawer.sample([dataclasses.replace(jobs[0], settings=drawer.settings.but(steps=4, end=0.5))], 4, look)
    assert [step for step, view in look.views.items() if view.maps[0][0].any()] == [1] and list(look.views) == [1, 2, 3]
    sheet = look.picture([mcm])
    assert sheet.shape == (20 + 4 * 98, 150 + 3 * 98, 3)
    gamma = sheet[20 + 2 * 98 :][:96, 150:]
    assert gamma[:, :96].min() < 100 and (gamma[:, 98:] == 255).all()
    np.testing.assert_array_equal(sheet[20:116, 248:], sheet[118:214, 248:])  # both estimates

    command = ["sample.py", f"--workdir={mcm}", f"--sketch={maps / 'sketch/a.png'}", "--num_samples=2", "--seed=3"]
    outcome = script(*command, f"--out={tmp_path / 'with'}", "--show_base", "--intermediates=2")
    assert outcome.status == 0 and (tmp_path / "with/intermediates.png").exists(), outcome.err
    outcome = script(*command, f"--out={tmp_path / 'alone'}", "--guidance=0", "--window=sketch=0:0.5")
    assert outcome.status == 0, outcome.err
    upper, lower = np.split(_pixels(tmp_path / "with/grid.png")[: 6 * 34], 2)
    alone = _pixels(tmp_path / "alone/grid.png")[: 6 * 17]
    _assert_same(lower[:, 6 * 18 :], alone[:, 6 * 18 :])
    assert (lower[:, : 6 * 18] == 255).all() and np.abs(upper - alone)[:, 6 * 18 :].max() > 4


def test_bad_jobs_are_named_by_line_and_the_others_drawn(script, drawer, mcm, maps, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (8, 8)).save(tmp_path / "huge.png")
    head = bytearray((tmp_path / "huge.png").read_bytes())
    head[16:24] = struct.pack(">II", 20_000, 20_000)
    head[29:33] = struct.pack(">I", zlib.crc32(head[12:29]))
    (tmp_path / "huge.png").write_bytes(head)
    sketch = {"sketch": str(maps / "sketch/a.png")}
    bad = {
        "{": "no JSON",
        "[1]": "must be an object",
        json.dumps({"conditions": sketch, "guidence": 2}): "unknown guidence",
        json.dumps({"conditions": {"depth": "a.png"}}): "the MCM knows segmentation, sketch, not depth",
        json.dumps({"conditions": {"sketch": "absent.png"}}): "no such file",
        json.dumps({"conditions": {"sketch": "text.png"}}): "not a picture",
        json.dumps({"conditions": sketch, "strength": {"sketch": -1}}): "strength.sketch must be at least 0",
        json.dumps({"conditions": sketch, "strength": {"segmentation": 1}}): "of which there is no condition",
        json.dumps({"conditions": sketch, "num_samples": 10**9}): "num_samples must be a whole number in 1..100000",
        json.dumps({"conditions": sketch, "guidance": "2"}): "guidance must be a number",
        json.dumps({"conditions": sketch, "start": 0.6, "end": 0.5}): "end must be",
        json.dumps({"conditions": sketch, "prompt": "a lake"}): "unconditional",
        json.dumps({"conditions": sketch, "seed": -1}): "seed must be",
        json.dumps({"conditions": sketch, "name": "../a"}): "name must be",
        json.dumps({"conditions": sketch, "name": "good"}): "give each its own",
        json.dumps({"image": "text.png"}): "text.png: not a picture",
        json.dumps({"mask": "text.png"}): "text.png: not a picture",
        json.dumps({"mask": "huge.png"}): "huge.png: not a picture that can be read (Image size (400000000 pixels)",
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

    odd = {
        json.dumps({"window": {"depth": [0, 1]}}): "window: the MCM knows segmentation, sketch, not depth",
        json.dumps({"window": {"sketch": [0.5, 0.2]}}): "window.sketch must be two shares of the steps",
        json.dumps({"window": {"sketch": [0, 2]}}): "window.sketch must be two shares of the steps",
        json.dumps({"weights": [1, 2]}): "weights must be 1, one an MCM",
        json.dumps({"inpaint": str(maps / "mask.png")}): "inpaint must be given with an image",
        json.dumps({"image": "absent.png"}): "image: ",
        json.dumps({"height": 15}): "height must be a multiple of 2",
        '{"height": 1%s}' % (321 * "0"): "height must be pixels, at most 65536",
        '{"guidance": 1%s}' % (321 * "0"): "guidance must be finite",
        json.dumps(
            {"image": str(maps / "image.png"), "inpaint": str(maps / "sketch/b.png")}
        ): f"{maps / 'sketch/b.png'}: is 16x16 pixels, which is another shape than {maps / 'image.png'}: 36x20",
        json.dumps({"image_strength": 0.5}): "image_strength: does nothing without an image",
        json.dumps({"modulate": "after_cfg"}): "modulate: the base",
        json.dumps({"variation": 0.5}): "variation must be given with a variation_seed",
        json.dumps({"variation_seed": 5}): "variation_seed goes with a variation",
        json.dumps({"sampler": "euler_a"}): "sampler must be one of",
        json.dumps({"steps": 1001}): "steps must be in 1..1000",
        json.dumps({"num_samples": 0}): "num_samples must be a whole number",
        json.dumps({"num_samples": 2, "sample": 5}): "sample must be left out beside num_samples",
        json.dumps({"name": "\ud800"}): "name must be a file name",
        json.dumps({"name": "\u00e9" * 121}): "name must be of at most 240 bytes",
        json.dumps({"prompt": "\ud800"}): "prompt: the base",
        json.dumps({"conditions": {"sketch": "\ud800.png"}}): "conditions.sketch: ",
        "[" * 100_000: "no JSON",
    }
    (tmp_path / "odd.jsonl").write_text("\n".join(odd))
    _, problems = jobs_lib.read_jobs(tmp_path / "odd.jsonl", drawer)
    for number, (words, problem) in enumerate(zip(odd.values(), problems, strict=True), start=1):
        assert f"odd.jsonl:{number}: {words}" in problem, (words, problem)


def test_a_folder_of_conditions_has_a_job_for_each_name(script, drawer, mcm, maps, tmp_path):
    jobs, problems = jobs_lib.jobs_of_folder(maps, drawer, seed=1)
    assert not problems
    assert [(j.name, sorted(j.conditions)) for j in jobs] == [("a", ["segmentation", "sketch"]), ("b", ["sketch"])]
    command = ["sample.py", f"--workdir={mcm}", f"--conditions={maps}", f"--out={tmp_path}", "--seed=1"]
    outcome = script(*command)
    assert outcome.status == 0, outcome.err
    for job in jobs:
        _assert_same(_pixels(tmp_path / f"{job.name}.png"), pictures.to_uint8(drawer.sample([job])[0]).astype(int))
    assert script(*command, "--num_samples=2").explains("--conditions", "--num_samples")
    with pytest.raises(UserError, match="holds no conditions"):
        jobs_lib.jobs_of_folder(tmp_path, drawer)


def test_a_folder_of_conditions_with_an_image_and_a_mask(drawer, maps, tmp_path):
    files = {key: str(maps / f"{key}.png") for key in ("image", "mask")}
    jobs, problems = jobs_lib.jobs_of_folder(maps, drawer, image_strength=0.7, **files)
    assert drawer.draw(jobs, tmp_path, problems) == 2
    for job in jobs:
        line = {"conditions": job.conditions, "image_strength": 0.7, "seed": job.seed, **files}
        _assert_same(_alone(drawer.pipeline, line, maps), _pixels(tmp_path / f"{job.name}.png"))


def test_what_a_folder_of_conditions_has_wrong_is_named_and_the_others_drawn(script, drawer, mcm, maps, tmp_path):
    """A name is not drawn from less than it has; it pairs as in data folders, whichever way accents are written."""
    folder, long = tmp_path / "maps", "x" * 245
    sketch, labels = maps / "sketch/a.png", maps / "segmentation/a.png"
    (folder / "sketch").mkdir(parents=True)
    (folder / "segmentation").mkdir()
    for name in ("a", "b", "e\u0301", long):
        shutil.copy(sketch, folder / f"sketch/{name}.png")
    shutil.copy(labels, folder / "segmentation/\u00e9.png")
    Image.open(labels).save(folder / "segmentation/a.jpg")
    Image.open(sketch).save(folder / "sketch/b.webp")
    (folder / "sketch/c").mkdir()
    (folder / "sketch/.hidden").write_text("")
    wrong = ("a.jpg: expected .png files only. Labels are PNGs", "b.webp: has the same name as b.png", "c: a folder")
    jobs, problems = jobs_lib.jobs_of_folder(folder, drawer)
    assert [(job.name, sorted(job.conditions)) for job in jobs] == [("\u00e9", ["segmentation", "sketch"])]
    assert len(problems) == 4
    assert all(any(words in p for p in problems) for words in (*wrong, f"{long}: name must be of at most")), problems
    command = ["sample.py", f"--workdir={mcm}", f"--conditions={folder}", f"--out={tmp_path / 'out'}"]
    outcome = script(*command)
    assert outcome.status == 1 and all(words in outcome.err for words in ("4 jobs failed", *wrong)), outcome.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["\u00e9.png"]
