"""Judges of maps: their metrics by hand and by others' implementations, their readers, and a run judged by them."""

import json

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import ndimage

from mcm_jax.base import BaseCard
from mcm_jax.config import save as save_config
from mcm_jax.data import DataSettings
from mcm_jax.data.colours import to_lab
from mcm_jax.data.scenes import Scenes
from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.evaluate import _chosen, evaluate
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges import flatten, judges_of
from mcm_jax.modalities import Modality, known
from mcm_jax.pictures import to_uint8
from mcm_jax.trained import save_mcm

COUNT = 5
DEPTH, PALETTE = Modality("depth", "map", 1), Modality("palette", "map", 3)
BY_NAME = tuple(
    Modality(name, known(name).kind, known(name).channels)
    for name in ("strokes", "inpainting", "grey", "low_resolution", "soft_edges", "canny", "normals")
)


def _pair(seed, shape):
    """Smooth maps, and these paler and noisy."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.uniform(size=shape), (0, 3, 3, 0))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return smooth, np.clip(0.8 * smooth + 0.1 + 0.1 * rng.normal(size=shape), 0, 1)


@pytest.mark.parametrize(
    ("seed", "shape", "wanted"),
    [
        (0, (2, 176, 208, 1), [0.847507718150363, 0.8397076160908531]),
        (0, (2, 192, 176, 3), [0.8561061459271114, 0.8468084282967104]),
        # Two scales by its _ssim and avg_pool2d, to the power of weights that add up to 1; one scale: its ssim.
        (1, (2, 32, 40, 1), [0.7922543741288747, 0.7689839133160762]),
        (1, (2, 12, 14, 1), [0.5145264779875249, 0.5044393696746967]),
    ],
)
def test_ms_ssim_is_that_of_pytorch_msssim(seed, shape, wanted):
    """pytorch-msssim 1.0.0 on the same maps, whose sides halve evenly; the published weights add up to 1.0001."""
    maps, changed = _pair(seed, shape)
    np.testing.assert_allclose(metrics.ms_ssim(maps, changed), wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics.ms_ssim(maps, maps), 1)
    assert (metrics.ms_ssim(maps, 1 - maps) < 0.05).all()


def test_ms_ssim_has_as_many_scales_as_fit():
    sizes = [(10, 99), (11, 11), (32, 32), (160, 200), (161, 161), (512, 512)]
    assert [metrics.ms_ssim_scales(*size) for size in sizes] == [0, 1, 2, 4, 5, 5]
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 10x12"):
        metrics.ms_ssim(np.zeros((1, 10, 12)), np.zeros((1, 10, 12)))
    with pytest.raises(ValueError, match=r"found must lie in \[0, 1\]"):
        metrics.ms_ssim(np.full((1, 12, 12), 2.0), np.zeros((1, 12, 12)))
    with pytest.raises(ValueError, match=r"both be \[N, H, W\]"):
        metrics.ms_ssim(np.zeros((1, 12, 12)), np.zeros((2, 12, 12)))


def test_depth_errors_by_hand():
    target = np.array([[[0.5, 0.25], [0.0, 1.0]], [[0.0, 0.01], [0.0, 0.0]]])
    found = np.array([[[0.6, 0.25], [0.2, 0.8]], [[0.0, 0.01], [0.0, 0.2]]])
    errors = metrics.depth_errors(found, target)
    np.testing.assert_allclose(errors["rmse"], [np.sqrt((0.01 + 0.04 + 0.04) / 4), 0.1])
    np.testing.assert_allclose(errors["abs_rel"], [(0.1 / 0.5 + 0 + 0.2 / 1) / 3, np.nan])


def test_alignment_is_least_squares_of_each_map():
    rng = np.random.default_rng(0)
    target, found = rng.uniform(size=(3, 5, 7)), rng.normal(size=(3, 5, 7))
    np.testing.assert_allclose(metrics.depth_errors(40 * target - 3, target, align=True)["rmse"], 0, atol=1e-12)
    wanted = []
    for x, y in zip(found.reshape(3, -1), target.reshape(3, -1), strict=True):
        _, squares, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
        wanted.append(np.sqrt(squares[0] / 35))
    np.testing.assert_allclose(metrics.depth_errors(found, target, align=True)["rmse"], wanted)
    flat = metrics.depth_errors(np.full((3, 5, 7), 9.0), target, align=True)["rmse"]
    np.testing.assert_allclose(flat, target.std((1, 2)))  # a flat map tells nothing: the mean is the best fit


def test_colour_distance_by_hand():
    """Published CIELAB of the primaries: red (53.24, 80.09, 67.20), green (87.73, -86.18, 83.18)."""
    colours = np.array([[255] * 3, [255, 0, 0]], np.uint8).reshape(1, 1, 2, 3).repeat(2, 0)
    others = np.array([[0] * 3, [0, 255, 0]], np.uint8).reshape(1, 1, 2, 3).repeat(2, 0)
    green = np.sqrt((53.24 - 87.73) ** 2 + (80.09 + 86.18) ** 2 + (67.20 - 83.18) ** 2)
    np.testing.assert_allclose(metrics.colour_distance(colours, others), (100 + green) / 2, atol=0.05)
    only = np.array([[[False, True]], [[False, False]]])
    np.testing.assert_allclose(metrics.colour_distance(colours, others, only), [green, np.nan], atol=0.05)
    assert (metrics.colour_distance(colours, colours) == 0).all()
    with pytest.raises(ValueError, match="must be uint8, got float64"):
        metrics.colour_distance(colours / 255, others)


def test_correct_keypoints_by_hand():
    """A box of 20 x 10 pixels: at alpha 0.1 two pixels are near enough, the longer side's tenth."""
    target = np.array([[[0, 0, 1], [20, 10, 1], [10, 5, 0.5], [99, 99, 0.4]]], np.float64)
    assert metrics.correct_keypoints(target, target) == (3, 3)  # what is not seen does not count, nor stretch the box
    moved = target + np.array([[2, 0, 0], [1.5, 1.5, 0], [0, 0, -0.1], [0, 0, 0]])
    assert metrics.correct_keypoints(moved, target) == (1, 3)  # the second is 2.12 away, the third is not seen
    assert metrics.correct_keypoints(moved, target, 0.11) == (2, 3)
    none, one = target * [1, 1, 0], np.concatenate([target[:, :1], target[:, 1:] * [1, 1, 0]], 1)
    right, of = metrics.correct_keypoints(*[np.concatenate([none, one, target])] * 2)
    assert right.tolist() == of.tolist() == [0, 0, 3]
    with pytest.raises(ValueError, match="confidence of found must lie in"):
        metrics.correct_keypoints(target * 2, target)


def test_angular_error_by_hand():
    x, z, black = np.array([1, 0.5, 0.5]), np.array([0.5, 0.5, 1]), np.zeros(3)
    target = np.array([[[x, z, z]], [[x, x, x]]])
    found = np.array([[[x, x, (x + z) / 2]], [[1 - x, [0.5, 0.5, 0.5], black]]])
    wanted = [(0 + 90 + 45) / 3, (180 + 90 + np.degrees(np.arccos(-1 / np.sqrt(3)))) / 3]
    np.testing.assert_allclose(metrics.angular_error(found, target), wanted)
    only = np.array([[[False, True, False]], [[False, False, False]]])
    np.testing.assert_allclose(metrics.angular_error(found, target, only), [90, np.nan])
    with pytest.raises(ValueError, match="three channels, got 1"):
        metrics.angular_error(found[..., :1], target[..., :1])


def directions(images):
    """Normals as these tests have them: the colours, brought to unit length; of grey, none."""
    length = np.linalg.norm(images, axis=-1, keepdims=True)
    return np.where(length > 0.1, images / np.maximum(length, 0.1), 0) / 2 + 0.5


def red(images):
    """Depth as these tests have it: the red channel."""
    return (images[..., 0] + 1) / 2


def far(images):
    """The same by a net that knows it but for scale and shift."""
    return 7 - 3 * red(images)


def corners(images):
    """Two points for each picture: in a dark one none is seen."""
    n, h, w, _ = images.shape
    points = np.tile([[0.0, 0, 1], [h - 1, w - 1, 1]], (n, 1, 1))
    points[..., 2] *= (images.mean((1, 2, 3)) > -0.9)[:, None]
    return points


def _wide(images):
    return np.zeros((len(images), 4, 4))


def _counts(images):
    return np.zeros(images.shape[:3], np.int64)


def _nan(images):
    return np.full(images.shape[:3], np.nan)


def _unsure(images):
    return np.full((len(images), 2, 3), 1.5)


def _write(folder, stem, split, **arrays):
    for name, array in arrays.items():
        path = folder / split / name / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder of scenes; their depth is the red channel, their palette the mean colours of four fields.

    The others are what their names say; where nothing is known, files hold any colour.
    """
    folder = tmp_path_factory.mktemp("pairs")
    for i, scene in enumerate(Scenes("test", 2 * COUNT, tiny.SIZE, tiny.SIZE, seed=9)):
        image = np.round((scene["image"] + 1) * 127.5).astype(np.uint8)
        fields = image.reshape(2, 8, 2, 8, 3).mean((1, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        rng = np.random.default_rng(i)
        strokes = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
        strokes[rng.random(image.shape[:2]) < 0.5] = *rng.integers(0, 256, 3), 0
        hole = np.dstack([image, np.where(np.hypot(*np.indices(image.shape[:2]) - 7.5) < 5, 0, 255).astype(np.uint8)])
        edges = np.where(metrics.edge_map(scene["image"][None])[0], 0, 255).astype(np.uint8)
        by_name = {
            "strokes": strokes,
            "inpainting": np.where(hole[..., 3:] > 0, hole, 0),
            "grey": np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8),
            "low_resolution": np.round(image.reshape(4, 4, 4, 4, 3).mean((1, 3))).astype(np.uint8),
            "soft_edges": np.round(255 * (1 - 0.8 * (edges == 0))).astype(np.uint8),
            "canny": edges,
            "normals": np.round(255 * directions(image / 127.5 - 1)).astype(np.uint8),
        }
        split = "test" if i % 2 else "train"
        _write(folder, f"{i:02d}", split, image=image, depth=image[..., 0], palette=fields, **by_name)
    return folder


def _held_out(folder, modalities=(DEPTH, PALETTE)):
    shape = (tiny.SIZE, tiny.SIZE, 3)
    card = BaseCard("", "", None, shape, shape, False, 1, 1)
    return HeldOut(DataSettings("folder", str(folder)), card, modalities, COUNT)


@pytest.fixture(scope="module")
def held_out(pairs):
    return _held_out(pairs, (DEPTH, PALETTE, *BY_NAME))


def _judge(held_out, name, spec):
    judges = judges_of(held_out, {m.name: "none" for m in held_out.judged} | {name: spec})
    assert [judge.name for judge in judges] == [name]
    return judges[0]


EVERY = np.arange(COUNT)


def _numbers(held_out, name, spec, images=None):
    """Of the real pictures, or others; and the scores, which are worse where the examples are mixed up."""
    judge = _judge(held_out, name, spec)
    found = judge(held_out.images if images is None else images, EVERY)
    assert found.scores.shape == (COUNT,) and set(judge.headline) <= set(flatten(found.numbers))
    assert set(judge.watch(held_out.images, EVERY)) == set(judge.watched)
    return flatten(found.numbers), found.scores, judge(held_out.images, np.roll(EVERY, 1)).scores


def test_what_is_read_in_real_pictures_fits_their_maps(held_out):
    """Exactly, where the map is made of the picture; and better than that of another picture."""
    numbers, scores, mixed = _numbers(held_out, "depth", f"depth:reader={__name__}:red")
    assert numbers == {"depth.rmse": pytest.approx(0, abs=1e-6), "depth.abs_rel": pytest.approx(0, abs=1e-5)}
    assert (scores > mixed + 0.05).all()
    numbers, scores, mixed = _numbers(held_out, "depth", f"depth:align=1,reader={__name__}:far")
    assert numbers["depth.rmse"] == pytest.approx(0, abs=1e-6) and (scores > mixed + 0.05).all()
    numbers, scores, mixed = _numbers(held_out, "depth", f"ms_ssim:reader={__name__}:red")
    assert numbers == {"ms_ssim": pytest.approx(1)} and (scores > mixed + 0.1).all()
    numbers, scores, mixed = _numbers(held_out, "depth", "ms_ssim")  # the picture in grey
    assert 0.5 < numbers["ms_ssim"] < 1 and scores.mean() > mixed.mean() + 0.1
    numbers, scores, mixed = _numbers(held_out, "palette", "colour")
    assert 1 < numbers["delta_e"] < 30 and scores.mean() < 0 and scores.mean() > mixed.mean() + 5
    numbers, scores, _ = _numbers(held_out, "palette", f"pck:reader={__name__}:corners")
    assert numbers == {"pck": 1.0} and (scores == 1).all()


@pytest.mark.parametrize(
    ("name", "number", "real"),
    [
        ("strokes", "delta_e", 0),
        ("inpainting", "delta_e", 0),
        ("grey", "ms_ssim", 1),
        ("low_resolution", "delta_e", 0),
        ("soft_edges", "edge_f1.f1", 1),
        ("canny", "edge_f1.f1", 1),
    ],
)
def test_what_needs_no_net_is_judged_by_itself(held_out, name, number, real):
    """Real pictures fit, but for the rounding of files; what is drawn where nothing is known does not matter."""
    numbers, scores, mixed = _numbers(held_out, name, "")
    assert numbers[number] == pytest.approx(real, abs=0.5 if number == "delta_e" else 0.01)
    assert (scores > mixed).all()
    if name in ("strokes", "inpainting"):
        hidden = held_out.conditions[name][..., 3:] == 0
        assert _numbers(held_out, name, "", np.where(hidden, 1, held_out.images))[0] == numbers
    if name == "low_resolution":  # whose grid was found: finer detail does not matter
        assert "averaged to 4x4" in _judge(held_out, name, "").how
        blurred = held_out.images.reshape(COUNT, 4, 4, 4, 4, 3).mean((2, 4)).repeat(4, 1).repeat(4, 2)
        assert _numbers(held_out, name, "", blurred)[0][number] == pytest.approx(numbers[number], abs=0.01)
        assert _numbers(held_out, name, "colour")[0][number] > numbers[number] + 1


def test_normals_are_judged_by_their_angle(held_out):
    numbers, scores, mixed = _numbers(held_out, "normals", f"normals:reader={__name__}:directions")
    assert numbers["angular_error"] < 2 and (scores > mixed + 5).all()


def test_what_is_undefined_says_why(tmp_path):
    """Nothing is near, nothing has a colour and no point is seen: there are reasons in place of numbers."""
    black = np.zeros((tiny.SIZE, tiny.SIZE, 3), np.uint8)
    held_out = _held_out(_write(tmp_path, "night", "test", image=black, depth=black[..., 0], palette=black + 255))
    for name, spec, number, why in (
        (
            "depth",
            f"depth:reader={__name__}:red",
            "depth.abs_rel",
            "no pixel of these maps has a depth of 0.02 or more",
        ),
        ("palette", "colour:blank=white", "delta_e", "all pixels of these maps are white"),
        (
            "palette",
            f"pck:reader={__name__}:corners",
            "pck",
            "no real picture of these has two keypoints that are seen",
        ),
    ):
        judge = _judge(held_out, name, spec)
        found = judge(held_out.images, EVERY[:1])
        assert flatten(found.numbers)[number] == why
        assert number == "depth.abs_rel" or not judge.watch(held_out.images, EVERY[:1])
    assert _chosen(np.array([-3.0, np.nan, -9.0, -1.0])).tolist() == [1, 2, 0, 3]  # what is undefined is worst


def test_blank_pixels_do_not_count(held_out):
    """The distance where a map says something, by hand."""
    palette = np.round(held_out.conditions["palette"] * 255).astype(np.uint8)
    blank = palette[0, 0, 0]
    found = _judge(held_out, "palette", f"colour:blank=#{blank.tobytes().hex()}")(held_out.images, EVERY)
    distance = np.sqrt(((to_lab(to_uint8(held_out.images)) - to_lab(palette)) ** 2).sum(-1))
    counts = (palette != blank).any(-1)
    assert counts[0].sum() == 3 * 8 * 8
    wanted = [d[c].mean() for d, c in zip(distance, counts, strict=True)]
    np.testing.assert_allclose(found.scores, -np.array(wanted), rtol=1e-5)
    assert found.numbers["delta_e"] == pytest.approx(np.mean(wanted), rel=1e-5)


def test_onnx_reads_maps(held_out, tmp_path):
    """A net that gives the red channel, channels first, at a size of its own."""
    onnx = pytest.importorskip("onnx")
    of, floats = onnx.helper, onnx.TensorProto.FLOAT
    stored = [
        of.make_tensor("w", floats, (1, 3, 1, 1), [0.5, 0.0, 0.0]),
        of.make_tensor("b", floats, (1,), [0.5]),
    ]
    graph = of.make_graph(
        [of.make_node("Conv", ["x", "w", "b"], ["y"])],
        "red",
        [of.make_tensor_value_info("x", floats, ["N", 3, 8, 8])],
        [of.make_tensor_value_info("y", floats, ["N", 1, 8, 8])],
        stored,
    )
    path = tmp_path / "red.onnx"
    onnx.save(of.make_model(graph, opset_imports=[of.make_opsetid("", 17)], ir_version=10), path)
    numbers, scores, mixed = _numbers(held_out, "depth", f"depth:reader={path}")
    assert numbers["depth.rmse"] < 0.01 and (scores > mixed + 0.05).all()  # maps of 8 bits on the halved grid
    with pytest.raises(UserError, match=r"red\.onnx: it gave float32\[1, 1, 8, 8\] .*expected floats \[1, 8, 8, 3\]"):
        _judge(held_out, "palette", f"ms_ssim:reader={path}")
    with pytest.raises(UserError, match=r"ms_ssim:reader=.*: SSIM's window is 11 pixels wide, pictures are 8x8 here"):
        _judge(held_out, "depth", f"ms_ssim:reader={path}")


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("depth", "", r"no judge of the map 'depth'. Give one.*ms_ssim.*colour.*depth:reader.*pck.*edges"),
        ("depth", "mssim", r"--judge=depth=mssim: no judge of map; expected ms_ssim"),
        ("depth", "ms_ssim:scales=3", r"found 'scales=3', expected reader, as in"),
        ("depth", "depth", r"--judge=depth=depth: expected a reader, depth:reader=module:function .*FILE\.onnx"),
        ("depth", "depth:align=yes,reader=x:y", "found 'align=yes', expected reader or align"),
        ("depth", "depth:align=2,reader=x:y", "found align=2, expected 0 or 1"),
        ("depth", "depth:reader=net.pt", r"expected a reader, depth:reader=module:function"),
        ("depth", "depth:reader=nowhere.onnx", r"nowhere\.onnx: no such file"),
        (
            "depth",
            "depth:reader=test_judge_maps:nothing",
            "cannot be imported .*expected module:function, or FILE.onnx",
        ),
        ("depth", "depth:reader=test_judge_maps:far", r"it gave 4.* to .*align=1"),
        ("depth", "depth:reader=test_judge_maps:_wide", r"float64\[1, 4, 4\] .*expected floats \[1, 16, 16\]"),
        ("depth", "depth:reader=test_judge_maps:_counts", r"int64\[1, 16, 16\] .*expected floats"),
        ("depth", "depth:reader=test_judge_maps:_nan", "found NaN or infinity"),
        ("palette", "depth:reader=test_judge_maps:red", "depth has one channel, palette 3"),
        ("palette", "ms_ssim:reader=test_judge_maps:red", r"expected floats \[1, 16, 16, 3\]"),
        ("palette", "colour:blank=whitish", "found blank=whitish, expected the name of a colour"),
        ("depth", "colour", "depth has 1 channel.*colours have three"),
        ("palette", "colour:size=17", r"pictures are 16x16; expected reader, blank .* or size"),
        ("strokes", "ms_ssim", "no judge of sparse; expected colour"),
        ("normals", "", r"no judge of the normals 'normals'. Give one.*normals:reader=READER"),
        ("normals", "normals", r"expected a reader, normals:reader=module:function .*\[N, H, W, 3\] in \[0, 1\]"),
        ("depth", "pck", r"expected a reader, pck:reader=module:function .*\[N, K, 3\]: y and x in pixels"),
        ("depth", "pck:alpha=0,reader=test_judge_maps:corners", "found alpha=0"),
        ("depth", "pck:reader=test_judge_maps:red", r"for 5 pictures; expected floats \[N, K, 3\]"),
        ("depth", "pck:reader=test_judge_maps:_unsure", "confidences from 1.5 to 1.5"),
    ],
)
def test_what_cannot_judge_is_refused(held_out, name, spec, message):
    with pytest.raises(UserError, match=message):
        _judge(held_out, name, spec)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_run_is_judged_by_its_maps(pairs, base, base_path, tmp_path):
    """An MCM of random weights, as if it had been trained on that folder: its numbers, and where they are written."""
    config = tiny.make_config(base_path, {"data.name": "folder", "data.path": str(pairs)})
    with config.unlocked():
        config.modalities = {m.name: {"kind": m.kind, "channels": m.channels} for m in (DEPTH, PALETTE)}
        config.evaluation.judges = {"depth": f"depth:reader={__name__}:red", "palette": "colour"}
        config.evaluation.diversity_seeds = 0
    modulator, rng, workdir = tiny.modulator_of(config, base), np.random.default_rng(0), tmp_path / "run"
    shapes = jax.eval_shape(lambda: modulator.init(jax.random.key(0), base.latent_shape))
    workdir.mkdir()
    save_config(tiny.settings_of(config), workdir)
    save_mcm(workdir, jax.tree.map(lambda p: 0.1 * rng.normal(size=p.shape), shapes), base=base, step=0)
    found = evaluate(workdir, tmp_path / "metrics.json", maps=COUNT, references=0, steps=2)
    rows = ["real", "base", "shuffled", "both", "depth", "palette"]
    assert list(found["delta_e"]) == list(found["depth"]) == rows
    assert found["depth"]["real"]["rmse"] < 1e-6 < 0.1 < found["depth"]["both"]["rmse"]
    assert found["delta_e"]["real"] < found["delta_e"]["both"]
    assert json.loads((tmp_path / "metrics.json").read_text())["delta_e"] == found["delta_e"]
    report = (tmp_path / "report.md").read_text()
    assert "|  | depth.rmse | delta_e |\n" in report and "|  | rmse | abs_rel |" in report
    assert f"| real | {found['depth']['real']['rmse']:.3f} | {found['delta_e']['real']:.3f} |" in report
    assert "palette: Delta E (CIE76) of the picture itself at 16x16." in report
