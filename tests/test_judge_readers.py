"""Nets that read labels: ONNX files of any layout, and one trained on a user's own pairs."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from mcm_jax.data.scenes import CLASSES, PALETTE, Scenes
from mcm_jax.errors import UserError
from mcm_jax.evaluation.judges import train as module
from mcm_jax.evaluation.judges.__main__ import main
from mcm_jax.evaluation.judges.readers import open_reader

SIZE = 16
IMAGES = np.random.default_rng(0).uniform(-1, 1, (5, 4, 6, 3)).astype(np.float32)
# Logits that are a linear function of the colour; the class is that of the nearest colour in RGB.
COLOURS = (PALETTE / 127.5 - 1).astype(np.float32)
NEAREST = ((IMAGES[..., None, :] - COLOURS) ** 2).sum(-1).argmin(-1)


def _onnx(path, *, channels_first=True, logits_first=True, labels=False, shape=None, classes=6, dtype="FLOAT"):
    """A net of one linear layer a pixel, by ONNX's own helpers."""
    onnx = pytest.importorskip("onnx")
    of = onnx.helper
    kind = getattr(onnx.TensorProto, dtype)
    shape = shape or (["N", 3, "H", "W"] if channels_first else ["N", "H", "W", 3])
    colours = COLOURS[np.arange(classes) % len(COLOURS)]
    weights = {"w": 2 * colours.T, "b": -(colours**2).sum(-1)}
    stored = [of.make_tensor(k, kind, v.shape, v.ravel().tolist()) for k, v in weights.items()]
    nodes = [
        of.make_node("Transpose", ["x"], ["last"], perm=[0, 2, 3, 1] if channels_first else [0, 1, 2, 3]),
        of.make_node("MatMul", ["last", "w"], ["scaled"]),
        of.make_node("Add", ["scaled", "b"], ["logits"]),
    ]
    if labels:
        nodes.append(of.make_node("ArgMax", ["logits"], ["y"], axis=3, keepdims=0))
    else:
        nodes.append(of.make_node("Transpose", ["logits"], ["y"], perm=[0, 3, 1, 2] if logits_first else [0, 1, 2, 3]))
    out = of.make_tensor_value_info("y", onnx.TensorProto.INT64 if labels else kind, [None] * (3 if labels else 4))
    graph = of.make_graph(nodes, "net", [of.make_tensor_value_info("x", kind, shape)], [out], stored)
    model = of.make_model(graph, opset_imports=[of.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ({}, None),
        ({"channels_first": False, "logits_first": False}, None),
        ({"channels_first": False}, None),
        ({"logits_first": False}, None),
        ({"labels": True}, None),
        ({"shape": [2, 3, 4, 6]}, (4, 6)),  # five pictures by twos: the last call is filled up
        ({"shape": ["N", 3, 4, 6]}, (4, 6)),
    ],
)
def test_onnx_of_any_layout_reads(tmp_path, how, size):
    reader = open_reader(_onnx(tmp_path / "net.onnx", **how), channels=6, names=CLASSES)
    assert reader.size == size and reader.classes == CLASSES and reader.features is None
    np.testing.assert_array_equal(reader(IMAGES), NEAREST)
    assert reader(IMAGES[:0]).shape == (0, 4, 6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"classes": 9}, r"gave float32\[1, 9, 64, 64\] .*logits of the 6 classes here"),
        ({"shape": ["N", 3, "H", 6]}, "height and width both fixed, or neither"),
        ({"channels_first": False, "shape": ["N", "H", "W", "C"]}, r"\['N', 'H', 'W', 'C'\]; expected one batch of"),
        ({"dtype": "DOUBLE"}, r"takes x: tensor\(double\)"),
    ],
)
def test_onnx_that_does_not_fit_is_refused(tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        open_reader(_onnx(tmp_path / "net.onnx", **how), channels=6)


def test_onnx_of_another_number_of_labels_is_refused(tmp_path):
    path = _onnx(tmp_path / "net.onnx", labels=True)
    with pytest.raises(UserError, match=r"found classes 2 to 2, but the labels here have 0\.\.1"):
        open_reader(path, channels=2)  # by the picture that it is tried with


def test_onnx_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        open_reader(str(tmp_path / "net.onnx"), channels=6)
    (tmp_path / "net.onnx").write_text("no protobuf")
    with pytest.raises(UserError, match=r"net\.onnx: onnxruntime cannot load it"):
        open_reader(str(tmp_path / "net.onnx"), channels=6)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'mcm-jax\[onnx\]'"):
        open_reader(str(tmp_path / "net.onnx"), channels=6)


def _write(folder, split, count, seed=9):
    for i, scene in enumerate(Scenes(split, count, SIZE, SIZE, seed)):
        arrays = {"image": (scene["image"] + 1) * 127.5, "segmentation": scene["segmentation"]}
        for name, array in (arrays | {"sketch": scene["sketch"] * 255}).items():
            path = folder / split / name / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.round(array).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("pairs"), "train", 20)


@pytest.fixture(scope="module")
def judge(pairs, tmp_path_factory):
    """A judge of twenty pairs, by the command line."""
    out = tmp_path_factory.mktemp("judges") / "new" / "judge"
    main(["train", str(pairs), f"--out={out}", f"--size={SIZE}", "--steps=30", "--classes=" + ",".join(CLASSES)])
    return out


def test_a_judge_is_trained_and_reads(judge, pairs):
    assert sorted(p.name for p in judge.parent.iterdir()) == ["judge"]
    config = json.loads((judge / "config.json").read_text())
    assert config["classes"] == list(CLASSES) and config["modality"] == "segmentation"
    assert config["data"]["pairs"] + config["held_out"]["images"] == 20 and config["held_out"]["images"] <= 5
    assert (config["recipe"]["steps"], config["recipe"]["seed"]) == (30, 0)
    log = [json.loads(line) for line in (judge / module.LOG).read_text().splitlines()]
    assert log[-1]["step"] == 30 and log[-1]["loss"] < 2  # chance: ln 6 + 5/6 = 2.6
    reader = open_reader(str(judge), channels=6)
    assert reader.size == (SIZE, SIZE) and reader.classes == CLASSES
    # The recorded bound is what the folder gives on the very pairs that it held out.
    data, labels = module.data_of(str(pairs)), module.Modality("segmentation", "labels", 6)
    _, test, _ = module._split(data, labels, SIZE)
    assert config["data"]["sha256"]["held_out"] == test.digest()
    images = module.as_float(test.images)
    confusion = module.confusion_matrix(reader(images), test.labels, 6)
    assert module.mean_iou(confusion) == pytest.approx(config["held_out"]["mean_iou"], abs=1e-4) and (
        config["held_out"]["mean_iou"] > 0.15  # of one class everywhere at most 1/6 of its share
    )
    features = reader.features(images)
    assert features.shape == (len(test.names), 128) and features.dtype == np.float32 and np.ptp(features) > 0


@pytest.mark.usefixtures("judge")
def test_unlabelled_pixels_teach_nothing_and_do_not_count(tmp_path):
    folder, rng = _write(tmp_path / "pairs", "train", 12), np.random.default_rng(0)
    for path in (folder / "train" / "segmentation").iterdir():
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(rng.random(labels.shape) < 0.1, 255, labels).astype(np.uint8)).save(path)
    command = [
        "train",
        str(folder),
        f"--out={tmp_path / 'judge'}",
        f"--size={SIZE}",
        "--steps=30",
    ]  # as above: compiled
    with pytest.raises(SystemExit, match="7 values, .*which do not look like classes .*--ignore=VALUE"):
        main(command)
    main([*command, "--ignore=255"])
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    assert config["classes"] == list("012345") and config["data"]["ignore"] == 255

    _, test, _ = module._split(module.data_of(str(folder)), module.Modality("segmentation", "labels", 6, 255), SIZE)
    net, images = module.load_segmenter(tmp_path / "judge"), module.as_float(test.images[[0, 0]])
    labels = test.labels[[0, 0]]
    labels[1] = 255
    both, one = (module.loss_fn(net.net, net.params, images[:n], labels[:n]) for n in (2, 1))
    assert float(both) == pytest.approx(float(one), rel=1e-5)
    found = module.score(net, images, labels, 255)
    assert found == module.score(net, images[:1], labels[:1], 255) and found["mean_iou"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA/no"], r"no: no such folder of pairs \(docs/data\.md\), nor a data set of this name .*scenes, .*folder"),
        (
            ["DATA", "--modality=parts"],
            r"parts: no such folder, .*'parts'; .*train has segmentation, sketch\. Expected",
        ),
        (["DATA", "--modality=sketch"], r"the pixels of sketch have \d+ values, .*say how many there are, --classes="),
        (["DATA", "--classes=3"], "this model knows 0..2"),
        (["DATA", "--classes=6", "--ignore=5"], r"segmentation\.ignore must be .*6\.\.65535, got 5"),
        (["DATA", "--ignore=1"], "ignore must be -1 for none, or a value above all classes, got 1"),
        (["DATA", "--size=30"], "size must be a multiple of 4"),
        (["DATA", "--steps=0"], "steps must be at least 1"),
        (["DATA/few"], r"few: 8 pair\(s\) are left to train on, expected at least 10"),
        (["scenes", "--modality=sketch"], "scenes has no such labels; expected segmentation"),
    ],
)
def test_bad_training_data_is_refused(pairs, tmp_path, arguments, message):
    if arguments[0] == "DATA/few":
        pairs = _write(tmp_path / "pairs" / "few", "train", 9).parent
    elif arguments[0] == "DATA/no":
        assert not (pairs / "no").exists()
    arguments = [a.replace("DATA", str(pairs)) for a in arguments]
    with pytest.raises(SystemExit, match=message):
        main(["train", f"--out={tmp_path / 'judge'}", *arguments])
    assert not (tmp_path / "judge").exists()


def test_out_that_is_not_empty_is_refused(judge, pairs):
    with pytest.raises(SystemExit, match="expected a new or an empty folder"):
        main(["train", str(pairs), f"--out={judge}"])


def test_an_interrupt_leaves_nothing(pairs, tmp_path, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fit", stop)
    with pytest.raises(SystemExit) as e:
        main(["train", str(pairs), f"--out={tmp_path / 'judge'}"])
    assert e.value.code == 130 and "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_held_out_does_not_depend_on_the_rest(pairs):
    """The test split where there is one; a tenth by names, none of which is trained on, where there is none."""
    train, test, how = module._split(module.data_of(str(pairs)), module.Modality("segmentation", "labels", 6), SIZE)
    assert not set(train.names) & set(test.names) and len(train.names) + len(test.names) == 20
    assert how.startswith("10%")


def test_a_named_data_set_has_pairs_and_names():
    """With their own test split, and names of the classes that fit the labels."""
    data = module.DataSettings("scenes", size=12, seed=1)
    labels = module._labels_of(data, "segmentation", None)
    train, test, how = module._split(data, labels, 32)
    assert how == "the test split" and train.images.shape[1:] == (32, 32, 3) and len(test.names) > 1
    assert not {a.tobytes() for a in test.images} & {a.tobytes() for a in train.images}
    names = module._class_names(data, "segmentation", None, (train.labels, test.labels))
    assert len(names) == labels.channels > train.labels.max() and names == data.classes("segmentation")
    with pytest.raises(UserError, match="--classes: found 3, but segmentation of scenes has 6"):
        module._class_names(data, "segmentation", 3, (train.labels, test.labels))
