"""The evaluation of any run: its rows, its judges, what it writes, what it refuses, and that it goes on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from mcm_jax.base import BaseCard
from mcm_jax.data import DataSettings
from mcm_jax.data.colours import to_lab
from mcm_jax.data.scenes import CLASSES, PALETTE, Scenes
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.evaluation import evaluate as module
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.evaluate import evaluate, interval
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import Judge, Judgement, edges, flatten, judges_of
from mcm_jax.evaluation.judges.readers import open_reader, resize_images
from mcm_jax.evaluation.parts import Parts
from mcm_jax.evaluation.rows import rows_of, subsets
from mcm_jax.modalities import Modality
from mcm_jax.sampling import SamplingSettings

OLD = tiny.ROOT / "tests/fixtures/v0_1"
OF_SCENES = {"channels": len(CLASSES), "palette": PALETTE, "names": tuple(CLASSES)}


def blocky(images):
    """A judge of a user's own: the class of the nearest colour of the palette, by plain RGB."""
    return ((((images[..., None, :] + 1) * 127.5) - PALETTE) ** 2).sum(-1).argmin(-1)


def test_rows_are_every_subset():
    assert list(subsets(["a", "b"])) == ["both", "a", "b"]
    assert list(subsets(["a", "b", "c"])) == ["all", "a+b", "a+c", "b+c", "a", "b", "c"]
    assert list(subsets(["a"])) == ["a"]
    assert len(subsets("abcd")) == 15 and list(subsets("abcde")) == ["all", *"abcde"]
    rows = rows_of(["a", "b"], 1.5, [1.5, 2.0], is_text_conditional=True)
    assert [r.name for r in rows] == ["unprompted", "base", "both", "a", "b", "both@2", "a@2", "b@2"]
    assert [r.guidance for r in rows] == [0, 0, 1.5, 1.5, 1.5, 2, 2, 2]
    assert not rows[0].told and rows[1].told


def test_lab_is_cielab():
    """Values of the standard's own primaries and greys, as published with two digits."""
    found = to_lab(np.array([[255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [119] * 3, [0] * 3], np.uint8))
    wanted = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [50.03, 0, 0],
        [0] * 3,
    ]
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_pictures_are_resized():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(resize_images(images, 6, 4), images.reshape(2, 6, 2, 4, 2, 3).mean((2, 4)))
    assert resize_images(images, 5, 7).shape == (2, 5, 7, 3)
    np.testing.assert_allclose(resize_images(np.full((1, 8, 8, 3), 0.25, np.float32), 12, 20), 0.25, atol=1e-6)


def test_readers_read(tmp_path):
    labels = np.arange(6).reshape(1, 2, 3).repeat(2, 0)
    images = (PALETTE[labels] / 127.5 - 1).astype(np.float32)
    colours = tmp_path / "colours.json"
    colours.write_text(json.dumps(dict(zip("abcdef", PALETTE.tolist(), strict=True))))
    for spec in ("palette", f"palette:{colours}", "test_evaluation:blocky"):
        np.testing.assert_array_equal(open_reader(spec, **OF_SCENES)(images), labels, err_msg=spec)
    assert open_reader(f"palette:{colours}", **OF_SCENES).classes == tuple("abcdef")
    scenes = Scenes("test", 4, seed=9)
    pictures, truth = (np.stack([s[key] for s in scenes]) for key in ("image", "segmentation"))
    folder = shutil.copytree(tiny.ROOT / "mcm_jax/assets/scenes-segmenter", tmp_path / "net")
    for spec in ("scenes", str(folder)):
        reader = open_reader(spec, **OF_SCENES)
        assert reader.size == (32, 32) and (reader(pictures) == truth).mean() > 0.95


def _floats(images):
    return np.zeros(images.shape[:3])


def _too_many(images):
    return np.full(images.shape[:3], 6)


def _ragged(images):
    return [[0], [0, 1]]


NO_FUNCTION = 3


@pytest.mark.parametrize(
    ("spec", "how", "message"),
    [
        ("sceens", {}, r"judge 'sceens': there is no such judge of labels; expected scenes .*palette.*module:function"),
        ("palette", {"palette": None}, "no colours of its classes; give them"),
        ("palette", {"channels": 4}, "found 6 colours, expected one for each of 4"),
        ("palette:nowhere.json", {}, "judge palette:nowhere.json: no palette .*expected JSON"),
        ("scenes", {"channels": 8}, "the net knows 6 classes, the labels here have 8"),
        ("no_such_module:read", {}, "cannot be imported"),
        ("test_evaluation:nothing", {}, "cannot be imported"),
        ("test_evaluation:NO_FUNCTION", {}, "is a int, expected a function"),
        ("test_evaluation:_floats", {}, r"gave float64\[1, 4, 4\] .*expected a class of each pixel"),
        ("test_evaluation:_too_many", {}, r"found classes 6 to 6, but the labels here have 0..5"),
        ("numpy:squeeze", {}, r"gave float32\[4, 4, 3\]"),
        ("test_evaluation:_ragged", {}, "_ragged: it gave a list that is no array"),
        ("./judges/mine:read", {}, r"cannot be imported \(TypeError: .*expected module:function"),
    ],
)
def test_bad_readers_are_refused(spec, how, message):
    with pytest.raises(UserError, match=message):
        open_reader(spec, **{**OF_SCENES, **how})(np.zeros((1, 4, 4, 3), np.float32))


def test_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


def test_sections_are_flattened():
    assert flatten({"a": 1.0, "b": {"c": 2.0, "d": "why"}}) == {"a": 1.0, "b.c": 2.0, "b.d": "why"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A user's folder: twelve scenes as files, half of them held out."""
    folder = tmp_path_factory.mktemp("pairs")
    for i, scene in enumerate(Scenes("test", 12, seed=9)):
        split = folder / ("test" if i % 2 else "train")
        for name, array in (
            ("image", (scene["image"] + 1) * 127.5),
            ("segmentation", scene["segmentation"]),
            ("sketch", scene["sketch"] * 255),
        ):
            (split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(array).astype(np.uint8)).save(split / name / f"{i:02d}.png")
        (split / "caption").mkdir(exist_ok=True)
        (split / "caption" / f"{i:02d}.txt").write_text(scene["caption"])
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, pairs):
    """The MCM of an older version, as if it had been trained on that folder."""
    folder = shutil.copytree(OLD / "mcm", tmp_path_factory.mktemp("run") / "mcm")
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"name": "folder", "path": str(pairs)}
    config["evaluation"] |= {"diversity_conditions": 2, "diversity_seeds": 2, "seeds": 2}
    config["sampling"] |= {
        "batch_size": 6,
        "height": 64,
    }  # of sample.py's pictures; those that are judged are the base's
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_folder_of_ones_own_is_evaluated(workdir, tmp_path, monkeypatch):
    """Killed after some rows, the same command goes on; its end is that of an evaluation without a pause."""
    tiny.save_clip(tmp_path / "clip")
    judges = {"segmentation": "scenes", "caption": f"clip:{tmp_path / 'clip'}"}
    whole = evaluate(workdir, tmp_path / "whole" / "metrics.json", judges=judges, maps=6, references=6)
    assert whole["maps"] == 6 and whole["seeds"] == 2
    # All that decides the samples is said: what is kept of an evaluation that stopped is that of the same.
    decides = {field.name for field in dataclasses.fields(SamplingSettings)}
    assert decides - {"batch_size", "image_strength", "height", "width"} <= whole.keys()
    rows = ["real", "base", "shuffled", "both", "segmentation", "sketch"]
    assert list(whole["miou"]) == list(whole["edge_f1"]) == list(whole["clip_score"]) == rows
    assert all(0 <= score <= 100 for score in whole["clip_score"].values()) and any(whole["clip_score"].values())
    assert whole["miou"]["real"] > 0.9 > 0.5 > whole["miou"]["both"]
    assert 0 < whole["interval"]["miou"]["both"] < 0.5 and "real" not in whole["interval"]["miou"]
    assert set(whole["diversity"]) == {"base", "both", "segmentation", "sketch"}
    assert "shuffled" not in whole["kid"]  # no condition enters
    assert whole["fid"]["both"] is None and "at least 129 pictures" in whole["undefined"]["fid.both"]
    assert whole["kid"]["both"] > whole["kid"]["real"] and whole["nearest"]["both"] > whole["nearest"]["real"] > 0
    assert whole["interval"]["kid"]["both"] > 0
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match="config.json: is there and no evaluation's metrics"):
        evaluate(workdir, workdir / "config.json", judges=judges, maps=6, references=6)
    assert (workdir / "config.json").read_bytes() == before
    written = sorted(path.name for path in (tmp_path / "whole").iterdir())
    sheets = ["cases_caption.png", "cases_segmentation.png", "cases_sketch.png", "samples.png"]
    assert written == sorted([*sheets, "metrics.json", "report.html", "report.md"])
    report = (tmp_path / "whole" / "report.md").read_text()
    assert f"| both | {whole['miou']['both']:.3f} ± {whole['interval']['miou']['both']:.3f} |" in report
    assert (tmp_path / "whole" / "report.html").read_text().count("data:image/png;base64,") == len(sheets)

    drawn, sample = [], module.Sampler.__call__

    def stopping(self, row, *arguments):
        drawn.append(row.name)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return sample(self, row, *arguments)

    monkeypatch.setattr(module.Sampler, "__call__", stopping)
    out = tmp_path / "stopped" / "metrics.json"
    with pytest.raises(Interrupted, match="same command goes on"):
        evaluate(workdir, out, judges=judges, maps=6, references=6)
    assert not out.exists()
    goes_on = evaluate(workdir, out, judges=judges, maps=6, references=6)
    assert drawn == ["base"] * 3 + ["both"] * 2 + ["both"] * 2 + ["segmentation"] * 3 + ["sketch"] * 3
    with pytest.raises(UserError, match="samples of 'both' came out as NaN; take less guidance"):
        evaluate(workdir, tmp_path / "nan" / "metrics.json", judges=judges, maps=6, references=6, guidance=3e38)
    assert not (tmp_path / "nan" / "metrics.json").exists()
    times = ("seconds",)
    assert {k: v for k, v in goes_on.items() if k not in times} == {k: v for k, v in whole.items() if k not in times}
    assert not out.with_name("metrics.json.parts").exists()


def test_interiors_leave_borders_out():
    """Of emoji a pixel that a border runs through has the mean colour of two areas, which is neither's."""

    def judged(spec: str, size: int = 32) -> tuple[Judge, Judgement]:
        held_out = HeldOut(
            DataSettings(name="emoji"), BaseCard("", "", None, (size, size, 3), (size, size, 3), False, 1, 1), (), 1_000
        )
        judge = judges_of(held_out, {"segmentation": spec, "sketch": "none"})[0]
        return judge, judge(held_out.images, np.arange(len(held_out)))

    (plain, everywhere), (judge, inside) = judged("palette"), judged("")
    assert "over the 85% of the pixels that no border runs through" in judge.how and "border" not in plain.how
    assert everywhere.numbers["miou"] < 0.8 and inside.numbers["miou"] > 0.95
    assert min(inside.numbers["class_iou"].values()) > 0.9
    held_out = HeldOut(
        DataSettings(name="emoji"), BaseCard("", "", None, (32, 32, 3), (32, 32, 3), False, 1, 1), (), 40
    )
    of_sets = judges_of(held_out, {}, references=150)[-1]
    assert of_sets.name == "fidelity" and "128 features of the judge emoji" in of_sets.how
    assert abs(of_sets(held_out.images, np.arange(40)).numbers["kid"]) < 0.3
    with pytest.raises(UserError, match=r"twice its resolution, 128x128, .*--judge=segmentation=palette"):
        judged("", 64)


def test_a_net_judges_pictures_of_another_shape(tmp_path):
    """They are squeezed to its grid, and so are their labels; a folder's own would be cut there."""
    for i, scene in enumerate(Scenes("test", 6, 32, 64, seed=9)):
        for name, array in (("image", (scene["image"] + 1) * 127.5), ("segmentation", scene["segmentation"])):
            path = tmp_path / "test" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(array).astype(np.uint8)).save(path)
    card = BaseCard("", "", None, (32, 64, 3), (32, 64, 3), False, 1, 1)
    held_out = HeldOut(DataSettings("folder", str(tmp_path)), card, (Modality("segmentation", "labels", 6),), 6)
    (judge,) = judges_of(held_out, {"segmentation": "scenes"})
    assert judge(held_out.images, np.arange(6)).numbers["miou"] > 0.85
    assert judge.how.endswith("read by scenes at 32x32 (32x64 resized)")


def test_what_a_sample_has_where_labels_are_unknown_does_not_count(tmp_path):
    rng, unknown = np.random.default_rng(0), []
    for i, scene in enumerate(Scenes("test", 4, 32, 32, 3)):
        unknown.append(rng.random((32, 32)) < 0.1 if i else np.ones((32, 32), bool))  # of the first all is
        labels = np.where(unknown[-1], 255, scene["segmentation"])
        for name, array in {"image": (scene["image"] + 1) * 127.5, "segmentation": labels}.items():
            (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(array).astype(np.uint8)).save(tmp_path / "test" / name / f"{i}.png")
    modalities = (Modality("segmentation", "labels", 6, ignore=255),)
    card = BaseCard("", "", None, (32, 32, 3), (32, 32, 3), False, 1, 1)
    held_out = HeldOut(DataSettings("folder", str(tmp_path)), card, modalities, 4)
    judge = judges_of(held_out, {"segmentation": f"{__name__}:blocky"})[0]
    share = 1 - np.mean(unknown)
    assert f"over the {share:.0%} of the pixels that have a label" in judge.how

    images = held_out.images + rng.normal(0, 0.1, held_out.images.shape).astype(np.float32)  # so that some are wrong
    plain = judge(images, np.arange(4))
    known = ~np.array(unknown)
    truth = np.array([scene["segmentation"] for scene in Scenes("test", 4, 32, 32, 3)])
    by_hand = metrics.mean_iou(metrics.confusion_matrix(blocky(images)[known], truth[known], 6))
    assert 0.2 < plain.numbers["miou"] < 0.9 and plain.numbers["miou"] == pytest.approx(by_hand)
    assert np.isnan(plain.scores[0]) and np.isfinite(plain.scores[1:]).all()
    for colour in PALETTE:
        painted = np.where(np.array(unknown)[..., None], (colour / 127.5 - 1).astype(np.float32), images)
        other = judge(painted, np.arange(4))
        assert other.numbers == plain.numbers
        np.testing.assert_array_equal(other.scores, plain.scores)


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        ({}, r"no judge of the labels 'segmentation'. Give one, --judge=segmentation=HOW .*scenes .*=none to leave"),
        ({"depth": "none"}, "depth is no modality here; expected one of segmentation, sketch"),
        ({"segmentation": "none", "sketch": "edges:width=3"}, "found 'width=3', expected size"),
        ({"segmentation": "none", "sketch": "palette"}, "sketch=palette: no judge of"),
    ],
)
def test_what_cannot_be_judged_is_refused(workdir, tmp_path, judges, message):
    with pytest.raises(UserError, match=message):
        evaluate(workdir, tmp_path / "metrics.json", judges=judges)
    assert not (tmp_path / "metrics.json").exists()


def test_text_for_an_unconditional_base_is_refused(workdir, tmp_path):
    with pytest.raises(UserError, match="--text_guidance: the base .* is unconditional"):
        evaluate(workdir, tmp_path / "metrics.json", text_guidance=3.0)


def test_edges_of_no_lines_are_refused():
    card = BaseCard("", "", None, (32, 32, 3), (32, 32, 3), False, 1, 1)
    held_out = HeldOut(DataSettings(), card, (), 2)
    for of, spec, message in (
        ("segmentation", "edges", "judge 'edges': there is no such judge of labels"),
        ("sketch", "edges:tolerance=-1", "tolerance=-1: expected size"),
        ("sketch", "edges:size=-8", "size=-8: expected size"),
        ("sketch", "edges:threshold=nan", "threshold=nan: expected size"),
    ):
        with pytest.raises(UserError, match=message):
            judges_of(held_out, dict.fromkeys(("segmentation", "sketch"), "none") | {of: spec})
    with pytest.raises(UserError, match="lines have one channel, tint 3"):
        edges(Modality("tint", "map", 3), "edges", held_out)


def test_parts_are_kept_of_the_same_evaluation_alone(tmp_path, capsys):
    folder, numbers, arrays = tmp_path / "m.json.parts", {"miou": 0.5, "fid": "too few"}, {"shown": np.arange(3)}

    def at_hand(of: str, real: dict) -> bool:
        parts = Parts(folder, {"of": of})
        parts.check(real)
        found = parts.get("base, seed 0")
        parts.put("base, seed 0", numbers, arrays)
        return found is not None and found[0] == numbers and np.array_equal(found[1]["shown"], arrays["shown"])

    assert not at_hand("a", {"miou": 0.9, "fid": "too few"})
    assert at_hand("a", {"miou": 0.90001, "fid": "too few"})
    for change in ({"miou": 0.8, "fid": "too few"}, {"miou": 0.8, "fid": 3.0}, {"miou": 0.8}):  # a judge was mended
        assert not at_hand("a", change)
        assert "judged otherwise: it begins anew" in capsys.readouterr().out
    assert not at_hand("b", {"miou": 0.8}) and at_hand("b", {"miou": 0.8})
    (folder / "of.json").unlink()
    with pytest.raises(UserError, match="expected a new folder"):  # nothing of a user's is removed
        Parts(folder, {"of": "b"})


def test_undefined_numbers_are_null_with_the_reason():
    judgement = Judgement({"miou": 0.5, "class_iou": {"sky": 0.5, "sun": "in no map and in no picture"}})
    found = module._summed_up({"base": module._Measured([flatten(judgement.numbers)] * 2)})
    assert found["class_iou"] == {"base": {"sky": 0.5, "sun": None}}
    assert found["undefined"] == {"class_iou.sun.base": "in no map and in no picture"}
    assert found["interval"] == {"miou": {"base": 0.0}, "class_iou": {"base": {"sky": 0.0}}}
