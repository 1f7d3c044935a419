"""Every fault that is planted is named by ``check``; training refuses what it calls fatal, and only that."""

import csv
import html
import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mcm_jax.base import BaseSettings
from mcm_jax.data.__main__ import main
from mcm_jax.data.check import check
from mcm_jax.data.folder import Folder
from mcm_jax.data.problems import Problem, printable, refuse, table
from mcm_jax.data.render import CLASSES, PALETTE, render
from mcm_jax.data.scene import draw_scene
from mcm_jax.errors import UserError

SIZE = 64  # of the base that is checked against
COUNT = 40
LONG = "a lake with " + " and ".join(["three trees"] * 40)


@pytest.fixture(scope="module")
def base():
    return BaseSettings("scenes-sd").outline()


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Forty scenes to train and eight to test, a prompt each."""
    root = tmp_path_factory.mktemp("clean") / "scenes"
    for split, first, count in (("train", 0, COUNT), ("test", COUNT, 8)):
        for folder in ("image", "segmentation", "sketch", "caption"):
            (root / split / folder).mkdir(parents=True)
        for i in range(count):
            drawn = render(draw_scene(np.random.default_rng(first + i)), SIZE, SIZE)
            image = np.round((drawn["image"] + 1) * 127.5).astype(np.uint8)
            Image.fromarray(image).save(root / split / f"image/{i:02}.png")
            Image.fromarray(drawn["segmentation"]).save(root / split / f"segmentation/{i:02}.png")
            Image.fromarray(np.round(drawn["sketch"] * 255).astype(np.uint8)).save(root / split / f"sketch/{i:02}.png")
            (root / split / f"caption/{i:02}.txt").write_text("a lake by day")
    return root


@pytest.fixture
def scenes(clean, tmp_path):
    return pathlib.Path(shutil.copytree(clean, tmp_path / "scenes"))


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _bomb(path, side=20_000):
    """A PNG of a few bytes that says it has 400 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def _deep_colours(path):
    """A colour PNG of 16 bits a channel, which Pillow cannot write."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (SIZE, SIZE, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def _rename(train, old, new):
    for folder, ending in (("image", "png"), ("segmentation", "png"), ("sketch", "png"), ("caption", "txt")):
        (train / folder / f"{old}.{ending}").rename(train / folder / f"{new}.{ending}")


def plant_fatal(root):
    """Faults that training refuses, and of each its file below the root and what is said of it."""
    train = root / "train"
    image, labels, sketch = train / "image", train / "segmentation", train / "sketch"
    classes = [{"name": n, "color": c} for n, c in zip(CLASSES, PALETTE.tolist(), strict=True)]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    (sketch / "00.png").rename(sketch / "0.png")
    Image.open(labels / "01.png").resize((SIZE, SIZE // 2)).save(labels / "01.png")
    Image.open(labels / "02.png").convert("RGB").save(labels / "02.png")
    odd = np.array(Image.open(labels / "03.png"))
    odd[0, 0] = 77
    Image.fromarray(odd).save(labels / "03.png")
    Image.open(labels / "04.png").save(labels / "04.jpg")
    (labels / "04.png").unlink()
    Image.open(labels / "05.png").convert("L").save(labels / "05.png", "JPEG")
    (image / "06.png").write_bytes((image / "06.png").read_bytes()[:500])
    (sketch / "07.png").write_bytes(b"")
    _bomb(image / "08.png")
    _bomb(sketch / "09.png")
    (image / "loop.png").symlink_to(image / "loop.png")
    (image / "gone.png").symlink_to(root / "nowhere.png")
    (image / "more").mkdir()
    (sketch / "10.webp").write_bytes((sketch / "10.png").read_bytes())
    (train / "caption" / "11.txt").unlink()
    (train / "caption" / "12.txt").write_bytes(b"caf\xe9")
    (train / "caption" / "13.txt").write_text("one\ntwo")
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 64, 3)).astype(np.uint8))
    wide.save(image / "14.png", exif=_exif(6))  # upright it is high, its conditions are square
    return {
        "train/sketch/00.png": "missing",
        "train/sketch/0.png": "no picture of its name",
        "train/segmentation/01.png": "another shape",
        "train/segmentation/02.png": "a colour that is no class's",
        "train/segmentation/03.png": "77",
        "train/segmentation/04.jpg": "expected .png files only",
        "train/segmentation/05.png": "found a JPEG file",
        "train/image/06.png": "not a picture that can be read",
        "train/sketch/07.png": "not a picture that can be read",
        "train/image/08.png": "exceeds limit",
        "train/sketch/09.png": "exceeds limit",
        "train/image/loop.png": "a link that leads nowhere",
        "train/image/gone.png": "a link that leads nowhere",
        "train/image/more": "a folder",
        "train/sketch/10.webp": "has the same name as 10.png",
        "train/caption/11.txt": "missing",
        "train/caption/12.txt": "not a text file in UTF-8",
        "train/caption/13.txt": "found 2",
        "train/segmentation/14.png": "as its EXIF data turns it",
        "train/sketch/14.png": "as its EXIF data turns it",
    }


def plant_doubtful(root):
    """Faults that training takes, likewise."""
    train, test = root / "train", root / "test"
    image, labels, sketch = train / "image", train / "segmentation", train / "sketch"
    shutil.copy(image / "20.png", image / "21.png")
    Image.open(image / "22.png").save(test / "image" / "03.png", optimize=True)  # other bytes, the same picture
    Image.new("L", (SIZE, SIZE), 2).save(labels / "23.png")
    Image.new("L", (SIZE, SIZE), 255).save(sketch / "24.png")
    Image.new("RGB", (SIZE, SIZE), "navy").save(image / "25.png")
    Image.fromarray(255 - np.array(Image.open(sketch / "26.png"))).save(sketch / "26.png")
    Image.open(image / "27.png").convert("CMYK").save(image / "27.jpg")
    (image / "27.png").unlink()
    _deep_colours(image / "28.png")
    Image.open(image / "29.png").save(image / "29.png", exif=_exif(6))
    Image.open(image / "30.png").save(image / "30.png", exif=_exif(3))
    Image.open(sketch / "31.png").save(sketch / "31.png", exif=_exif(6))
    (train / "caption" / "32.txt").write_text(LONG)
    Image.open(image / "33.png").resize((SIZE // 2, SIZE // 2)).save(image / "33.png")
    for path in (image, labels, sketch):
        Image.open(path / "34.png").resize((4 * SIZE, SIZE), Image.Resampling.NEAREST).save(path / "34.png")
    _rename(train, "36", "caf\u00e9")
    _rename(train, "37", "x" * 230)
    _rename(train, "38", "<b>\x1b[2J")
    return {
        "train/image/21.png": "the same picture as train/image/20.png",
        "test/image/03.png": "a leak: the training picture train/image/22.png",
        "train/segmentation/23.png": "empty: every pixel is of class 2",
        "train/sketch/24.png": "empty: every value is 1",
        "train/image/25.png": "one colour",
        "train/sketch/26.png": "mostly dark",
        "train/image/27.jpg": "CMYK",
        "train/image/28.png": "16 bits",
        "train/image/29.png": "turned by its EXIF data, which the size of a square does not show",
        "train/image/30.png": "turned by its EXIF data",
        "train/sketch/31.png": "EXIF data would turn it",
        "train/caption/32.txt": "its prompt has",
        "train/image/33.png": "smaller than the base's",
        "train/image/34.png": "its centre alone is seen, 25%",
        "train/image/caf\u00e9.png": "not ASCII",
        f"train/image/{'x' * 230}.png": "its name has 234 bytes",
        "train/image/<b>\x1b[2J.png": "its name has control characters",
    }


def _rows(report):
    rows = {}
    for p in report.problems:
        path, found = (text.replace(f"{report.path}/", "") for text in (p.path, p.found))
        rows.setdefault(path, []).append((p.fatal, found))
    return rows


def _open(root, report, base, split="train"):
    """The source that training reads."""
    height, width, _ = base.image_shape
    return Folder(root, split, report.modalities, height, width, base.is_text_conditional)


def test_a_clean_folder_has_no_problems(clean, base):
    report = check(clean, base)
    assert not report.problems and not report.is_refused
    assert report.splits["train"].files == {"image": COUNT, "segmentation": COUNT, "sketch": COUNT, "caption": COUNT}
    assert {m.name: (m.kind, m.channels) for m in report.modalities} == {
        "segmentation": ("labels", 6),
        "sketch": ("lines", 1),
    }
    labels = np.stack([example["segmentation"] for example in (_open(clean, report, base)[i] for i in range(COUNT))])
    split = report.splits["train"]
    np.testing.assert_allclose(
        (split.sums["segmentation"] / COUNT)[:6], np.bincount(labels.reshape(-1), minlength=6) / labels.size
    )
    assert split.maps["segmentation"][:6].tolist() == [(labels == c).any((1, 2)).sum() for c in range(6)]


def test_every_fatal_fault_is_named_and_refused_by_training_in_the_same_words(scenes, base):
    planted = plant_fatal(scenes)
    report = check(scenes, base)
    rows = _rows(report)
    assert {path for path, found in rows.items() if any(fatal for fatal, _ in found)} == set(planted)
    for path, expected in planted.items():
        assert any(fatal and expected in found for fatal, found in rows[path]), (path, rows[path])

    # Training refuses the tree at once; with that mended, each of the other files, when it is read.
    with pytest.raises(UserError) as caught:
        _open(scenes, report, base)
    said = str(caught.value)
    fatal = [p for p in report.problems if p.fatal]
    of_the_tree = [p for p in fatal if str(p.found) in said]
    for p in of_the_tree:
        assert pathlib.Path(p.path).name in said
    for stem in {pathlib.Path(p.path).stem for p in of_the_tree} | {"00"}:
        for path in [*scenes.glob(f"train/*/{stem}"), *scenes.glob(f"train/*/{stem}.*")]:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    source = _open(scenes, report, base)
    refused = {}
    for i, name in enumerate(source.names):
        try:
            source[i]
        except UserError as e:
            refused[name] = str(e)
    others = [p for p in fatal if p not in of_the_tree]
    assert refused.keys() == {pathlib.Path(p.path).stem for p in others}
    for message in refused.values():
        assert message in {str(p) for p in others}


def test_every_doubtful_fault_is_named_and_taken_by_training(scenes, base):
    planted = plant_doubtful(scenes)
    report = check(scenes, base)
    rows = _rows(report)
    assert not report.is_refused
    assert set(rows) == set(planted)
    for path, expected in planted.items():
        assert any(expected in found for _, found in rows[path]), (path, rows[path])
    for split in ("train", "test"):
        source = _open(scenes, report, base, split)
        assert all(source[i]["image"].shape == (SIZE, SIZE, 3) for i in range(len(source)))


@pytest.mark.parametrize("plant", [plant_fatal, plant_doubtful])
def test_the_command_shows_all_and_writes_what_it_is_told_to_alone(plant, scenes, tmp_path, capsys):
    planted = plant(scenes)
    before = {path: path.lstat().st_mtime_ns for path in scenes.rglob("*")}
    with pytest.raises(SystemExit) as caught:
        main(["check", str(scenes), "--base=scenes-sd", f"--out={tmp_path / 'out'}", "--examples=2"])
    assert caught.value.code == (1 if plant is plant_fatal else 0)
    assert {path: path.lstat().st_mtime_ns for path in scenes.rglob("*")} == before
    out = capsys.readouterr().out
    command = f"python train.py --config=configs/folder.py --workdir=runs/scenes --config.data.path={scenes}"
    assert (f"{command} --config.base.path=scenes-sd" in out) == (plant is plant_doubtful)
    page = (tmp_path / "out" / "check.html").read_text()
    with (tmp_path / "out" / "problems.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for path in planted:
        assert printable(path) in rows and html.escape(printable(path)) in page
        assert len(path) > 100 or printable(path) in out
    assert "\x1b" not in out + page and "<b>" not in page and "http" not in page
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_gaps_and_prompts_in_lines(scenes, base):
    shutil.rmtree(scenes / "train" / "caption")
    shutil.rmtree(scenes / "test")
    (scenes / "train" / "sketch" / "05.png").unlink()
    entries = [{"file": f"{i:02}.png", "caption": LONG if i == 7 else "a lake"} for i in range(COUNT - 1)]
    lines = [*map(json.dumps, entries), '{"file": "../../../etc/passwd", "caption": "a secret"}']
    (scenes / "train" / "captions.jsonl").write_text("\n".join(lines))
    report = check(scenes, base)
    rows = _rows(report)
    assert [found for fatal, found in rows["train/sketch/05.png"] if fatal]
    said = " ".join(found for _, found in rows["train/captions.jsonl"])
    assert "line 40: '../../../etc/passwd' is no name of a picture" in said and "no line for 1 of 40" in said
    assert rows["train/image/07.png"] == [(False, rows["train/image/07.png"][0][1])]
    assert report.is_borrowed and sum(split.count for split in report.splits.values()) == COUNT

    lines[-1] = json.dumps({"file": f"{COUNT - 1}.png", "caption": "a lake"})
    (scenes / "train" / "captions.jsonl").write_text("\n".join(lines))
    assert check(scenes, base).is_refused and not check(scenes, base, partial=True).is_refused
    unprompted = check(scenes, BaseSettings("scenes-ddpm").outline(), partial=True)
    assert [p.path for p in unprompted.problems] == [str(scenes / "train" / "segmentation")]  # it cuts no prompts


def test_bad_prompts_are_doubts_where_the_base_sees_none(scenes):
    (scenes / "train" / "caption" / "03.txt").write_text("\n")
    (scenes / "train" / "caption" / "04.txt").write_bytes(b"\xff\xfe")
    (scenes / "train" / "caption" / "05.txt").unlink()
    shutil.rmtree(scenes / "test" / "caption")
    (scenes / "train" / "sketch" / "06.png").unlink()
    report, alone = check(scenes, BaseSettings("scenes-ddpm").outline()), check(scenes)
    assert alone.problems == report.problems  # as configs/folder.py trains without a base that is named
    fatal = {path: [p[0] for p in rows] for path, rows in _rows(report).items()}
    doubts = [f"train/caption/{i:02}.txt" for i in (3, 4, 5)] + ["test/caption"]
    assert fatal == dict.fromkeys(doubts, [False]) | {"train/sketch/06.png": [True]}
    assert report.splits["train"].files["caption"] == COUNT - 1


def test_mistakes_that_are_alike_are_one_row_and_none_is_hidden_by_many():
    many = [Problem(f"D/image/{i}.png", f"{i}x{i} pixels, too small", "Enlarge it", False) for i in range(500)]
    shown = table([*many, Problem("D/image/7.png", "damaged", "Replace it")], "D", width=100)
    assert len(shown.splitlines()) < 20 and "... 492 more" in shown
    assert shown.splitlines()[2].split()[:3] == ["FATAL", "image/7.png", "damaged"]
    with pytest.raises(UserError, match=r"^D/image/7.png: damaged. Replace it$"):
        refuse([*many, Problem("D/image/7.png", "damaged", "Replace it")])
