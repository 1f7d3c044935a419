"""Pictures alone become pairs: what extractors give, what `make` leaves behind, and pairs from the base itself."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_judge_readers import _onnx

from mcm_jax import sampling
from mcm_jax.base import load_base
from mcm_jax.data.__main__ import main
from mcm_jax.data.discover import discover
from mcm_jax.data.extract import EXTRACTORS, open_extractors
from mcm_jax.data.folder import Folder
from mcm_jax.data.scenes import Scenes
from mcm_jax.data.synthesise import synthesise
from mcm_jax.errors import UserError
from mcm_jax.evaluation.judges.readers import of_net
from mcm_jax.modalities import Modality, known
from mcm_jax.pictures import to_uint8
from mcm_jax.pipeline import Pipeline
from mcm_jax.trained import Trained

H, W = 40, 56
NAMES = ("a", "b", "turned", "é")
OF_SCENES = "segmentation=mcm_jax.evaluation.extractors:scenes"


@pytest.fixture(scope="module")
def scenes():
    return [to_uint8(scene["image"]) for scene in Scenes("train", len(NAMES), H, W, 7)]


@pytest.fixture(scope="module")
def flat(tmp_path_factory, scenes):
    """Pictures in a flat folder, one of them lying on its side, and prompts."""
    folder = tmp_path_factory.mktemp("flat")
    for name, picture in zip(NAMES, scenes, strict=True):
        sideways = name == "turned"
        exif = Image.Exif()
        exif[0x0112] = 6 if sideways else 1
        Image.fromarray(np.rot90(picture) if sideways else picture).save(folder / f"{name}.png", exif=exif)
        (folder / f"{name}.txt").write_text(f"a scene, {name}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, flat):
    folder = shutil.copytree(flat, tmp_path_factory.mktemp("made") / "data")
    assert _run("make", folder, f"--extract={','.join(EXTRACTORS)},{OF_SCENES}") == 0
    return folder


def _run(*arguments):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in arguments])
    return e.value.code or 0


def _extract(text, picture, name="x"):
    return np.asarray(open_extractors(text)[0](Image.fromarray(picture), name))


def test_a_flat_folder_becomes_pairs_that_training_reads(made, flat, scenes):
    assert all((made / path.name).read_bytes() == path.read_bytes() for path in flat.iterdir())
    modalities = [Modality(name, known(name).kind, known(name).channels or 6) for name in (*EXTRACTORS, "segmentation")]
    folder = Folder(made, "train", modalities, H, W, captions=True)
    assert folder.names == NAMES
    for i, (name, scene) in enumerate(zip(NAMES, scenes, strict=True)):
        example = folder[i]
        assert example["caption"] == f"a scene, {name}"
        np.testing.assert_array_equal(example["image"], scene)  # upright
        np.testing.assert_allclose(example["grey"], scene @ [0.299, 0.587, 0.114], atol=1)  # as is its condition
        assert (example["segmentation"][0] <= 1).mean() > 0.8  # sky, sun


def test_lines_are_black_on_white_where_the_picture_changes():
    step = np.full((128, 128, 3), (40, 60, 80), np.uint8)
    step[:, 64:] = (200, 180, 160)
    for name in ("canny", "soft_edges", "sketch"):
        assert (_extract(name, step[:, :64]) == 255).all(), name  # of one colour: no line
        columns = _extract(name, step).mean(0)
        assert columns[60:68].min() < 100 and (np.delete(columns, np.s_[48:80]) == 255).all(), name
    large = np.repeat(np.repeat(step, 5, 0), 6, 1)
    assert _extract("canny", large).shape == (512, 614)
    assert _extract("canny:size=64", step).shape == (128, 128) and _extract("grey:size=64", step).shape == (64, 64)


@pytest.mark.parametrize("name", ["strokes", "inpainting"])
def test_what_is_known_has_the_pictures_colours(name, scenes):
    shares = []
    for i in range(8):
        found = _extract(name, scenes[0], f"{i}")
        seen = found[..., 3] == 255
        assert found.shape == (H, W, 4) and (seen | (found[..., 3] == 0)).all()
        shares.append(seen.mean())
        assert (found[~seen] == 0).all()  # nothing is left below what is transparent
        off = np.abs(found[seen][:, :3].astype(int) - scenes[0][seen]).mean()
        assert off == 0 if name == "inpainting" else off < 20
    low, high = (0.12, 0.25) if name == "strokes" else (0.4, 0.95)
    assert low < min(shares) and max(shares) < high and np.ptp(shares) > 0
    np.testing.assert_array_equal(_extract(name, scenes[0]), _extract(name, scenes[0]))
    assert (_extract(name, scenes[0]) != _extract(f"{name}:seed=1", scenes[0])).any()


def test_a_folder_laid_out_as_a_split_becomes_train(flat, tmp_path):
    """Pictures in DATA/image, conditions and prompts beside them; what was there stays."""
    data = tmp_path / "my data"
    shutil.copytree(flat, data / "image")
    for name in ("other", "caption"):
        (data / name).mkdir()
        shutil.copy(flat / "a.txt", data / name / "stranger.txt")
    shutil.copy(flat / "a.png", data / "other")
    (data / "caption" / "a.txt").write_text("another prompt")
    with pytest.raises(UserError, match=r"pictures in .*image, .* make '.*my data' --extract=.*; or, .* into .*train"):
        discover(data)
    before = tiny.contents(data)
    assert _run("make", data, "--extract=grey") == 0
    after = tiny.contents(data)
    assert before.items() <= after.items()
    assert {p.name for p in (data / "train").iterdir()} == {"image", "caption", "other", "grey"}
    assert [p.name for p in (data / "train" / "other").iterdir()] == ["a.png"]
    prompts = {p.stem: p.read_text() for p in (data / "train" / "caption").iterdir()}
    assert prompts.pop("a") == "another prompt" and all(text == f"a scene, {name}\n" for name, text in prompts.items())
    assert len(Folder(data, "train", [Modality("grey", "map", 1)], H, W, captions=True)) == len(NAMES)


def test_what_is_done_is_kept_and_the_rest_done(made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "data")
    canny = folder / "train" / "canny"
    (canny / "b.png").unlink()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "b.png")  # another picture than that of train
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    (folder / "train" / "image" / "broken.jpg").write_bytes(b"no picture")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "late.png")
    status = _run("make", folder, "--extract=canny,wide=canny:sigma=2", "--workers=2")
    assert "1 picture(s) have no conditions" in status and "broken.jpg: not a picture that can be read" in status
    assert "left out 2 new or changed picture(s)" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (canny / "b.png").read_bytes() == (made / "train/canny/b.png").read_bytes()
    assert sorted(p.stem for p in (folder / "train" / "wide").iterdir()) == sorted(NAMES)

    before = (canny / "a.png").read_bytes()
    other = tmp_path / "other.png"
    Image.fromarray(np.asarray(Image.open(folder / "train/image/b.png"))[:, ::-1]).save(other, compress_level=0)
    os.utime(other, (0, 0))  # older than all conditions, as a file that is moved there keeps its time
    other.replace(folder / "train/image/a.png")
    assert "1 picture(s) have no" in _run("make", folder, "--extract=canny")
    assert (canny / "a.png").read_bytes() != before
    assert (canny / "b.png").read_bytes() == (made / "train/canny/b.png").read_bytes()
    Image.new("L", (W, H)).save(canny / "a.png")  # drawn anew by hand
    _run("make", folder, "--extract=canny")
    assert not np.asarray(Image.open(canny / "a.png")).any()

    status = _run("make", folder, "--extract=canny:sigma=2")
    assert "made by canny (sigma=1.0, " in status and "--extract=canny_2=" in status
    (folder / "train" / "sketch").rename(folder / "train" / "mine")
    assert "were not made by this command" in _run("make", folder, "--extract=mine=sketch")


def test_what_fails_for_one_picture_names_it(scenes, tmp_path, monkeypatch):
    (tmp_path / "plugged_nan.py").write_text(
        "import numpy as np\n"
        "def nan(x): return np.where((x[..., 0] - x[..., 1]).min() > 1.8, np.nan, x[..., 0] / 2 + 0.5)\n"
        "def dies(x): return x[..., 0] / 2 + (0.5 if (x[..., 0] - x[..., 1]).min() < 1.8 else undefined)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(os.fsencode(data) + b"/caf\xe9.png")
    Image.fromarray(scenes[0]).save(data / "a.png")
    status = _run("make", data, "--extract=depth=plugged_nan:nan,strokes")
    assert "1 picture(s) have no conditions" in status and "caf" in status and "gave values from nan" in status
    assert (data / "train/depth/a.png").exists() and (data / "train/strokes/a.png").exists()
    with pytest.raises(NameError) as e:
        main(["make", str(data), "--extract=other=plugged_nan:dies"])
    assert ".png" in e.value.__notes__[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no extractor; expected canny, "),
        ("depth", "there is no extractor 'depth'; expected canny, .*NAME=module:function"),
        ("canny,canny", "two extractors write into the folder canny; .*canny_2=canny:"),
        ("canny:sgma=2", r"found the setting 'sgma=2'; expected of sigma=1\.0 \(float\)"),
        ("canny:sigma=0", "sigma must be above 0, got 0"),
        ("image=canny", "this name is taken"),
        ("base=canny", "this name is taken"),
        ("drop_rate=canny", "this name is taken"),
        ("my-lines=canny", "'my-lines' is no name"),
        ("depth=net.onnx", "extractor net.onnx: no such file"),
        ("depth=plugged:nothing", "cannot be imported"),
        ("depth=plugged:cut", r"gave float32\[1, 63, 64\] .*expected labels, integers \[1, 64, 64\], or maps"),
        ("depth=plugged:signed", r"gave values from -1\.0 to -1\.0; expected maps of values in \[0, 1\]"),
    ],
)
def test_bad_extractors_are_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text("cut = lambda x: x[:, 1:, :, 0]\nsigned = lambda x: x[..., 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        open_extractors(text)


def test_nets_of_others_extract(tmp_path, scenes):
    """Logits of a net of a fixed size, which sees the picture squeezed, and labels of one that takes any."""
    any_size = _extract(f"segmentation={_onnx(tmp_path / 'a.onnx', labels=True)}", scenes[0])
    fixed = _extract(f"parts={_onnx(tmp_path / 'b.onnx', shape=[1, 3, H // 2, W // 2])}", scenes[0])
    assert any_size.shape == fixed.shape == (H, W) and any_size.max() < 6
    assert (any_size == fixed).mean() > 0.8 > (any_size == 0).mean()
    small = Scenes("train", 1, 32, 32, 7)[0]["image"]
    shipped = _extract(OF_SCENES, to_uint8(small))
    assert (shipped == of_net("scenes")(small[None])[0]).mean() > 0.99  # but for the rounding to 8 bits


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("prompts", [None, ("a mountain lake", "a meadow at night", "a lake by day")])
def test_the_base_makes_its_own_pairs(prompts, small_path, sd_path, tmp_path, capsys, monkeypatch):
    """Samples are those of the base without an MCM; an interrupted run ends as one that was not."""
    path = sd_path if prompts else small_path
    arguments = [f"--base={path}", "--count=5", "--batch_size=4", "--steps=2", "--extract=canny"]
    if prompts:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        arguments.append(f"--prompts={tmp_path / 'prompts.txt'}")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # what ends before the first picture leaves the folder to other settings
        patch.setattr(Pipeline, "__call__", lambda self, given, keys, **how: np.full((len(keys), 8, 8, 3), np.nan))
        assert "came out as NaN" in _run("synthesise", f"--out={out}", *arguments, "--seed=3")
    assert _run("synthesise", f"--out={out}", *arguments) == 0
    assert f"python -m mcm_jax.data check {out}" in capsys.readouterr().out
    whole = tiny.contents(out)
    images = sorted((out / "train" / "image").iterdir())
    assert [p.name for p in images] == [f"{i:06d}.png" for i in range(5)]
    assert len(whole) == 5 * (3 if prompts else 2) + 2

    base = load_base(path)
    modulator = tiny.modulator_of(tiny.make_config(path, tiny.SMALL), base)
    alone = Pipeline(base, Trained(modulator, modulator.init(jax.random.key(0), base.latent_shape)))
    texts = [prompts[i % 3] for i in range(5)] if prompts else None
    found = alone({}, sampling.sample_keys(0, 5), prompts=texts, guidance=0, steps=2, batch_size=4)
    for path, image in zip(images, to_uint8(found), strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - image).max() <= 1 < image.std()

    for i in (1, 4):
        images[i].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "__call__", lambda self, given, keys, **how: np.full((len(keys), 8, 8, 3), np.nan))
        assert "pictures 0, 1, 2, 3 came out as NaN" in _run("synthesise", f"--out={out}", *arguments)
    assert not images[1].exists()
    assert _run("synthesise", f"--out={out}", *arguments) == 0
    assert tiny.contents(out) == whole
    assert json.loads((out / "synthesised.json").read_text())["fingerprint"] == base.fingerprint
    refused = _run("synthesise", f"--out={out}", *arguments, "--seed=1")
    assert "seed: there 0, now 1" in refused and tiny.contents(out) == whole
    with pytest.raises(UserError, match="takes prompts" if prompts else "is unconditional"):
        synthesise(base, out, 5, prompts=None if prompts else ["a lake"])
    if prompts:  # without text guidance there is no negative prompt
        assert _run("synthesise", f"--out={tmp_path / 'plain'}", *arguments, "--text_guidance=1") == 0
