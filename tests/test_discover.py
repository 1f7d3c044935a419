"""What a folder holds is found and said; the config counts before that, and a workdir's own config before both."""

import json
import shutil

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image, ImageDraw

from configs import folder as folder_config
from mcm_jax import config as config_lib
from mcm_jax.data.discover import discover
from mcm_jax.errors import UserError
from mcm_jax.training import read_run
from mcm_jax.training.settings import RunSettings

N, SIZE = 5, 32
COLORS = np.array([[135, 206, 235], [0, 60, 200], [20, 120, 40]], np.uint8)


def _labels(i, most=3, void=None):
    found = np.random.default_rng(i).integers(0, most, (4, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    found[0, 0] = most - 1  # of each class there is one
    if void is not None:
        found[:4] = void
    return Image.fromarray(found)


def _colored(i):
    return Image.fromarray(COLORS[np.asarray(_labels(i))])


def _palette(i):
    picture = _labels(i).convert("P")
    picture.putpalette(COLORS.tobytes())
    return picture


def _smooth(i, channels=1):
    rows, columns = np.mgrid[:SIZE, :SIZE]
    planes = [(rows * (k + 2) + columns * 5 + i * 9) % 256 for k in range(channels)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8).squeeze())


def _lines(i, ink=0):
    large = Image.new("L", (4 * SIZE, 4 * SIZE), 255 - ink)
    ImageDraw.Draw(large).line([(10 + i, 5), (100, 70 + i), (20, 110)], fill=ink, width=5)
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)  # anti-aliased: many greys


def _strokes(i):
    picture = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    ImageDraw.Draw(picture).line([(2, 3 + i), (20, 25)], fill=(200, 30, 60, 255), width=3)
    return picture


@pytest.fixture
def data(tmp_path):
    """A function that writes folders of pictures, each made by a function of the number, and returns DATA."""

    def write(split="train", count=N, **folders):
        for name, make in {"image": lambda i: _smooth(i, 3), **folders}.items():
            (tmp_path / "DATA" / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                make(i).save(tmp_path / "DATA" / split / name / f"{i}.png")
        return tmp_path / "DATA"

    return write


def _config(data):
    config = folder_config.get_config()
    config.data.path = str(data)
    return config


def _facts(found):
    return {f.modality.name: (f.modality.kind, f.modality.channels, f.modality.ignore) for f in found.findings}


def test_kinds_are_told_by_usual_names_and_else_by_the_files(data):
    path = data(
        segmentation=lambda i: _labels(i, 4, void=255),
        sketch=_lines,
        normals=lambda i: _smooth(i, 3),
        strokes=_strokes,
        depth=lambda i: _smooth(i, 3),
        my_areas=lambda i: _labels(i, 7),
        my_parts=_palette,
        my_drawings=_lines,
        my_heights=_smooth,
        my_paint=lambda i: _smooth(i, 3),
        my_dabs=_strokes,
    )
    found = discover(path, held_out_share=0.3)
    assert _facts(found) == {
        "segmentation": ("labels", 4, 255),
        "sketch": ("lines", 1, -1),
        "normals": ("normals", 3, -1),
        "strokes": ("sparse", 3, -1),
        "depth": ("map", 1, -1),
        "my_areas": ("labels", 7, -1),
        "my_parts": ("labels", 3, -1),
        "my_drawings": ("lines", 1, -1),
        "my_heights": ("map", 1, -1),
        "my_paint": ("map", 3, -1),
        "my_dabs": ("sparse", 3, -1),
    }
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{path}: {N} pictures, ") and "held out by a hash of the names" in lines[0]
    assert "  segmentation: labels, 4 classes, 255 unknown (a usual name, the largest value is 3; " in str(found)
    assert sum(line.startswith("  my_") for line in lines) == 6
    settings = read_run(_config(path))
    assert _facts(found) == {m.name: (m.kind, m.channels, m.ignore) for m in settings.modalities.shown}


def test_every_file_counts_for_the_number_of_classes(data):
    path = data(count=40, areas=_labels)
    Image.fromarray(np.full((SIZE, SIZE), 5, np.uint8)).save(path / "train" / "areas" / "37.png")
    assert _facts(discover(path)) == {"areas": ("labels", 6, -1)}


def test_classes_are_those_of_the_description(data):
    path = data(areas=_colored, segmentation=_colored)
    doubt = "only 3 colours: if they are classes, give their names and colours in classes.json"
    with pytest.raises(UserError, match=r"segmentation.*0\.png: found labels in colour \(mode RGB, 3 colours"):
        discover(path)
    assert doubt in str(discover(path, {"segmentation": {"kind": "map"}}))
    entries = [{"name": name, "color": color} for name, color in zip("abc", COLORS.tolist(), strict=True)]
    (path / "classes.json").write_text(json.dumps({"classes": entries, "ignore": 200}))
    assert _facts(discover(path)) == {"areas": ("labels", 3, 200), "segmentation": ("labels", 3, 200)}
    (path / "areas.classes.json").write_text(json.dumps({"classes": [*entries, {"name": "d", "color": [9, 9, 9]}]}))
    assert _facts(discover(path))["areas"] == ("labels", 4, -1)


def test_what_the_config_says_counts_before_what_is_found(data):
    path = data(areas=_labels, heights=_smooth, sketch=_lines)
    config = _config(path).lock()
    config.modalities.areas.channels = 9
    config.modalities.heights.kind = "lines"
    config.modalities.sketch.kind = "none"
    shown = {m.name: (m.kind, m.channels) for m in read_run(config).modalities.shown}
    assert shown == {"areas": ("labels", 9), "heights": ("lines", 1)}
    config.modalities.misspelt.channels = 1
    with pytest.raises(
        UserError, match=r"^config\.modalities\.misspelt: .*no folder of this name; it has areas, heigh"
    ):
        read_run(config)


def test_a_command_line_says_it_too(data, tmp_path):
    """By flags of names that the config does not know beforehand; a key that no modality has is still refused."""
    path = data(areas=_labels, sketch=_lines)

    def parsed(*arguments):
        values, file = flags.FlagValues(), folder_config.__file__
        argv = ["train.py", f"--config={file}", f"--config.data.path={path}", *arguments]
        holder = config_flags.DEFINE_config_file("config", None, "", values, lock_config=True, sys_argv=argv)
        values(argv)
        return holder.value

    config = parsed("--config.modalities.areas.ignore=2", "--config.modalities.drop_rate=0.1")
    settings = read_run(config, tmp_path / "run")
    assert settings.modalities.drop_rate == 0.1 and not settings.data.discover
    assert [(m.name, m.channels, m.ignore) for m in settings.modalities.shown] == [("areas", 2, 2), ("sketch", 1, -1)]
    with pytest.raises((AttributeError, KeyError)):
        parsed("--config.modalities.areas.colour=2")

    # A workdir's config is what a run goes on with, wherever its folder is now.
    (tmp_path / "run").mkdir()
    config_lib.save(settings, tmp_path / "run")
    assert config_lib.load(RunSettings, tmp_path / "run") == settings
    path.rename(tmp_path / "moved")
    again = read_run(
        parsed("--config.modalities.areas.ignore=2", "--config.modalities.drop_rate=0.1"), tmp_path / "run"
    )
    assert again == settings


def test_doubts_are_said(data):
    path = data(areas=lambda i: _labels(i, 3, void=255), night=lambda i: _lines(i, ink=255), sketch=_lines)
    (path / "train" / "sketch" / "2.png").unlink()
    (path / "train" / "notes").mkdir()
    (path / "train" / "a.b").mkdir()
    found = str(discover(path))
    assert "255 is taken for unknown: it is far beyond the classes" in found
    assert "night: map, 1 channel(s) (grey pictures; please check: mostly black: if they are lines" in found
    assert "sketch: lines, 1 channel(s) (a usual name; 80.0% of the pictures have it)" in found
    assert "left out: notes (holds no picture by the name of one in image/)" in found and "left out: a.b (" in found


def test_what_cannot_be_told_is_an_error(data, tmp_path):
    path = data(segmentation=lambda i: Image.fromarray(np.asarray(_labels(i, 2)) * np.uint8(255)))
    with pytest.raises(UserError, match=r"segmentation: the label maps hold the values \[0, 255\] only"):
        discover(path)
    (path / "train" / "drop_rate").mkdir()
    shutil.copy(path / "train/image/3.png", path / "train/drop_rate/3.png")
    with pytest.raises(UserError, match="train/drop_rate: this name is taken, .* Rename the folder"):
        discover(path)
    shutil.rmtree(path / "train/drop_rate")
    broken = path / "train" / "segmentation" / "3.png"
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=r"3\.png: not a picture that can be read"):
        discover(path)
    with pytest.raises(
        UserError, match="config.modalities.segmentation.kind must be one of labels, .* or none, got 'maps'"
    ):
        discover(path, {"segmentation": {"kind": "maps"}})
    with pytest.raises(UserError, match="there are pictures, but no conditions.*segmentation .as the config says"):
        discover(path, {"segmentation": {"kind": "none"}})
    bare = tmp_path / "bare"
    (path / "train" / "image").rename(bare)
    with pytest.raises(UserError, match=r"no pairs in .*python -m mcm_jax\.data make .*bare --extract="):
        discover(bare)
    with pytest.raises(UserError, match="no such folder"):
        discover(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.data\.path must be a folder of pairs"):
        read_run(folder_config.get_config())


def test_links_in_circles_are_no_modality(data):
    path = data(sketch=_lines)
    for name in ("loop", "here"):
        try:
            (path / "train" / name).symlink_to(path / "train" / ("loop" if name == "loop" else ""))
        except OSError:
            pytest.skip("symbolic links cannot be made here, as on Windows without developer mode")
    assert set(_facts(discover(path))) == {"sketch"}
