"""Data sets of TFDS: every builder on a few pictures in the published layout, without TensorFlow."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from configs import celeba_ldm
from mcm_jax.data import DataSettings
from mcm_jax.data.folder import Folder
from mcm_jax.data.pipeline import training_batches
from mcm_jax.data.tfds import LAYOUTS, celeba, coco
from mcm_jax.data.tfds.__main__ import main
from mcm_jax.data.tfds.build import build
from mcm_jax.data.tfds.layout import png
from mcm_jax.data.tfds.records import Records, describe, find
from mcm_jax.errors import UserError
from mcm_jax.evaluation.judges import train as judge_training
from mcm_jax.evaluation.judges.train import data_of
from mcm_jax.modalities import Modality
from mcm_jax.training import read_run

LABELS = Modality("segmentation", "labels", 4)
SKETCH = Modality("sketch", "lines", 1)


def picture(path, height=24, width=32, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path, quality=95)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def celeba_hq_mask(root):
    """Hair covers the left half, neck the upper: where they overlap the order decides."""
    root /= "CelebAMask-HQ"
    left, upper = np.zeros((2, 512, 512), np.uint8)
    left[:, :256], upper[:256] = 255, 255
    for i in range(4):
        picture(root / f"CelebA-HQ-img/{i}.jpg", 64, 64, i)
        for part, mask in (("hair", left), ("neck", upper)):
            save(root / f"CelebAMask-HQ-mask-anno/0/{i:05}_{part}.png", np.stack([mask] * 3, -1))
    rows = (119613, 162770, 162771, 182638)
    text(
        root / "CelebA-HQ-to-CelebA-mapping.txt",
        "idx orig_idx orig_file",
        *(f"{i} {n} {n:06}.jpg" for i, n in enumerate(rows)),
    )


def coco_stuff(root):
    for part, ids in (("train2017", (25, 9)), ("val2017", (139,))):
        for i in ids:
            picture(root / f"images/{part}/{i:012}.jpg", seed=i)
            save(root / f"annotations/{part}/{i:012}.png", np.full((24, 32), 181 if i == 9 else 255, np.uint8))
        images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in ids]
        captions = [{"id": 10 * i - n, "image_id": i, "caption": f"caption {n} of\n{i} "} for i in ids for n in (1, 2)]
        text(root / f"annotations/captions_{part}.json", json.dumps({"images": images, "annotations": captions}))


def ade20k(root):
    root /= "ADEChallengeData2016"
    for published, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        picture(root / f"images/{published}/{name}.jpg")
        save(root / f"annotations/{published}/{name}.png", np.repeat(np.uint8([[0, 1, 150, 150]]), 3, 0))
    text(
        root / "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tName",
        *(f"{i} \t0.1\t1\t1\tname {i}, other" for i in range(1, 151)),
    )
    text(root / "sceneCategories.txt", "ADE_train_00000001 airport_terminal", "ADE_val_00000001 bedroom")


def lhq(root):
    for i in range(6):
        picture(root / f"{i:07}.png", seed=i)


def paired_folder(root):
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            picture(root / f"{split}/image/{i}.jpg", seed=i)
            save(root / f"{split}/segmentation/{i}.png", np.repeat(np.uint8(np.eye(4, 3, -1)[None] * 255), 3, 0))
            picture(root / f"{split}/sketch/{i}.png", 48, 64, i, "L")
            text(root / f"{split}/caption/{i}.txt", f"prompt {i}")
    colors = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    classes = [{"name": f"class {i}", "color": color} for i, color in enumerate(colors)]
    text(root / "classes.json", json.dumps({"classes": classes, "swap": {"class 1": "class 2"}}))


def controlnet_rows(count):
    rng = np.random.default_rng(0)
    image = [{"bytes": png(rng.integers(0, 256, (16, 16, 3), np.uint8)), "path": None} for _ in range(count)]
    edges = [{"bytes": png(np.full((16, 16, 3), 255 * (i % 2), np.uint8)), "path": f"{i}.png"} for i in range(count)]
    rows = {"image": image, "conditioning_image": edges, "text": [f"prompt  {i}" for i in range(count)]}
    return pyarrow.table(rows | {"other": list(range(count))})


def controlnet(root):
    (root / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(controlnet_rows(3), root / "data/train-00000-of-00002-1a2b.parquet")
    pyarrow.parquet.write_table(controlnet_rows(2), root / "data/train-00001-of-00002-3c4d.parquet")
    pyarrow.parquet.write_table(controlnet_rows(1), root / "data/validation-00000-of-00001.parquet")


def saved_to_disk(root):
    text(root / "dataset_dict.json", json.dumps({"splits": ["train"]}))
    text(root / "train/state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    table = controlnet_rows(3)
    with pyarrow.ipc.new_stream(root / "train/data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


MAKERS = {f.__name__: f for f in (celeba_hq_mask, coco_stuff, ade20k, lhq, paired_folder, controlnet)}
BUILDS = (
    ("scenes", "", "--size=12", "--test_size=3"),
    ("celeba_hq_mask", "celeba_hq_mask"),
    ("celeba_hq_mask", "celeba_hq_mask", "--order=face_parsing"),
    ("flickr_mountains", "paired_folder"),
    ("lhq", "lhq", "--held_out_share=0.4"),
    ("coco_stuff", "coco_stuff"),
    ("ade20k", "ade20k"),
    ("paired_folder", "paired_folder"),
    ("controlnet", "controlnet", "--invert=True"),
    ("controlnet", "saved_to_disk", "--config=saved", "--channels=3", "--kind=map"),
)
PROGRAM = """
import json, sys

from mcm_jax.data.tfds.__main__ import main
from mcm_jax.data.tfds.records import Records, describe, find

for arguments in json.loads(sys.argv[1]):
    main(arguments)
root = find(sys.argv[2])
read = [Records(root, split, (), 8, 8)[0]["image"].shape for split in describe(root).splits]
assert read == [(8, 8, 3)] * 3
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    root = tmp_path_factory.mktemp("downloads")
    for name, make in (MAKERS | {"saved_to_disk": saved_to_disk}).items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def data(downloads, tmp_path_factory):
    """What a process that never imported TensorFlow built, by the command of the docs, and read."""
    data = tmp_path_factory.mktemp("data")
    commands = [
        ["build", name, f"--manual_dir={downloads / folder}", f"--data_dir={data}", *options]
        for name, folder, *options in BUILDS
    ]
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands), str(data / "celeba_hq_mask/default")]
    result = subprocess.run(program, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "24,183 train" in result.stdout
    return data


def read(path, split, modalities=(), height=24, width=32, captions=False):
    records = Records(path, split, modalities, height, width, captions)
    return [records[i] for i in range(len(records))]


def test_every_layout_is_built(data):
    assert {name for name, *_ in BUILDS} == set(LAYOUTS) == {p.name for p in data.iterdir()}


@pytest.mark.parametrize(("order", "over"), [("default", "neck"), ("order-face_parsing", "hair")])
def test_the_parts_of_a_face_lie_over_one_another_as_published(data, order, over):
    path = data / "celeba_hq_mask" / order
    known = describe(find(path))
    (labels,) = known.modalities
    assert labels.channels == 19 and known.splits == ("train", "validation", "test")
    names = known.classes["segmentation"].names
    assert names == celeba.ORDERS["celebamask_hq" if order == "default" else "face_parsing"]
    assert names[known.classes["segmentation"].mirrored[names.index("l_eye")]] == "r_eye"
    assert [len(read(path, split)) for split in known.splits] == [2, 1, 1]
    shown = read(path, "train", (labels,), 2, 2)[0]["segmentation"]
    assert [[names[v] for v in row] for row in shown] == [[over, "neck"], ["hair", "background"]]


def test_the_command_of_the_docs_finds_its_modalities(data):
    """configs/celeba_ldm.py has sketches, too, which the data set has not."""
    c = celeba_ldm.get_config()
    c.data.name, c.data.path = "tfds", str(data / "celeba_hq_mask/default")
    with pytest.raises(UserError, match=r"config.modalities.sketch.kind=none leaves it out"):
        read_run(c)
    command = (pathlib.Path(__file__).parents[1] / "docs/tfds.md").read_text()
    assert "--config=configs/celeba_ldm.py" in command and "--config.modalities.sketch.kind=none" in command
    c.modalities.sketch.kind = "none"
    (m,) = read_run(c).modalities.shown
    assert (m.name, m.channels) == ("segmentation", 19)


def test_the_two_orders_of_a_face_number_the_same_classes():
    one, other = celeba.ORDERS.values()
    assert sorted(one) == sorted(other) and len(set(one)) == 19
    assert (one.index("hair"), one.index("neck"), one.index("cloth")) == (13, 17, 18)
    assert (other.index("skin"), other.index("nose"), other.index("neck"), other.index("hair")) == (1, 10, 14, 17)


def test_coco_has_its_numbers_and_the_first_caption(data):
    assert data_of(str(data / "coco_stuff")).holds == describe(find(data / "coco_stuff")).modalities
    (labels,) = describe(find(data / "coco_stuff")).modalities
    assert (labels.channels, labels.ignore) == (182, 255)
    first, second = read(data / "coco_stuff", "train", (labels,), captions=True)
    assert [str(e["caption"]) for e in (first, second)] == ["caption 2 of 9", "caption 2 of 25"]
    assert (first["segmentation"] == 181).all() and (second["segmentation"] == 255).all()
    numbers = [coco.CLASSES.index(name) for name in ("person", "street sign", "banner", "sky-other", "wood")]
    assert numbers == [0, 11, 91, 156, 181] and len(set(coco.CLASSES)) == 182


def test_ade20k_begins_at_zero_and_leaves_the_unknown_out(data):
    known = describe(find(data / "ade20k"))
    (labels,) = known.modalities
    assert known.classes["segmentation"].names[0] == "name 1" and labels.channels == 150
    (example,) = read(data / "ade20k", "train", (labels,), 3, 4, captions=True)
    assert example["segmentation"].tolist() == [[255, 0, 149, 149]] * 3
    assert example["caption"] == "airport terminal"


@pytest.mark.parametrize(("saved", "count", "inverted"), [("invert-True", (5, 1), 255), ("saved", (2, 1), 0)])
def test_controlnet_reads_parquet_and_arrow(data, saved, count, inverted):
    """A validation split tests; without one, a row of three is held out."""
    path = data / "controlnet" / saved
    known = describe(find(path))
    train, test = (read(path, split, known.modalities, 16, 16, captions=True) for split in ("train", "test"))
    assert (len(train), len(test)) == count
    rows = train[:3] if saved != "saved" else sorted([*train, *test], key=lambda e: str(e["caption"]))
    assert [str(e["caption"]) for e in rows] == ["prompt 0", "prompt 1", "prompt 2"]
    assert all((e["sketch"] == (inverted if i % 2 == 0 else 255 - inverted)).all() for i, e in enumerate(rows))


def test_controlnets_deep_maps_and_seen_through_lines_are_read_right():
    with pytest.raises(UserError, match="kind must be one of pictures without transparency.*got 'sparse'"):
        LAYOUTS["controlnet"](modality="strokes", kind="sparse", channels=3)
    layout = LAYOUTS["controlnet"](modality="depth", kind="map", channels=1)
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)).save(file, "PNG")
    found = np.asarray(Image.open(io.BytesIO(layout._condition({"bytes": file.getvalue()}, "row 0"))))
    np.testing.assert_array_equal(found.reshape(-1), np.arange(16) * 17)
    drawn = np.zeros((4, 4, 4), np.uint8)
    drawn[0, :, 3] = 255  # a black line on nothing
    for invert, colour in ((False, 0), (True, 255)):
        file = io.BytesIO()
        drawn[..., :3] = colour
        Image.fromarray(drawn).save(file, "PNG")
        layout = LAYOUTS["controlnet"](invert=invert)
        found = np.asarray(Image.open(io.BytesIO(layout._condition({"bytes": file.getvalue()}, "row 0"))))
        assert (found[0] == 0).all() and (found[1:] == 255).all()


def test_a_judge_of_labels_knows_what_the_data_set_says(data):
    """Its value for unknown; and of pairs, whose kinds are not certain, what is told or described."""
    ade = judge_training._labels_of(DataSettings(name="tfds", path=str(data / "ade20k")), "segmentation", None)
    assert (ade.channels, ade.ignore) == (150, 255)
    pairs = DataSettings(name="tfds", path=str(data / "paired_folder"))
    assert judge_training._labels_of(pairs, "segmentation", 4).channels == 4
    with pytest.raises(UserError, match="celeba.* has no such labels|tfds has no such labels; expected segmentation"):
        judge_training._labels_of(DataSettings(name="tfds", path=str(data / "ade20k")), "sketch", None)


def test_pairs_without_a_test_split_hold_out_what_their_folder_does(tmp_path):
    for i in range(12):
        picture(tmp_path / f"pairs/train/image/{i}.jpg", seed=i)
        picture(tmp_path / f"pairs/train/sketch/{i}.png", seed=i, mode="L")
    pairs = tmp_path / "pairs"
    for options, share in (({}, 0.1), ({"held_out_share": 0.4}, 0.4), ({"held_out_share": 0.0}, 0)):
        built = build(LAYOUTS["paired_folder"](**options), pairs, tmp_path / "built")
        splits = describe(built).splits
        assert splits == (("train", "test") if share else ("train",))
        for split in splits:
            folder = Folder(pairs, split, (SKETCH,), 16, 16, held_out_share=share)
            assert folder.fingerprints() == Records(built, split, (SKETCH,), 16, 16).fingerprints()


def test_pictures_alone_are_an_image_alone(data):
    assert sum(len(read(data / "lhq", split)) for split in ("train", "test")) == 6
    with pytest.raises(UserError, match="no segmentation; found image, name"):
        Records(data / "lhq", "train", (LABELS,), 8, 8)


@pytest.mark.parametrize("name", ["paired_folder", "flickr_mountains"])
def test_a_folder_and_its_records_are_the_same(data, downloads, name):
    for split in ("train", "test"):
        folder = Folder(downloads / "paired_folder", split, (LABELS, SKETCH), 16, 16, captions=True)
        records = Records(data / name, split, (LABELS, SKETCH), 16, 16, captions=True)
        assert len(folder) == len(records)
        assert records.classes["segmentation"].names == ("class 0", "class 1", "class 2", "class 3")
        assert records.classes["segmentation"].swap == folder.classes["segmentation"].swap
        for i in range(len(folder)):
            for key, value in folder[i].items():
                np.testing.assert_array_equal(records[i][key], value)
        fingerprints = records.fingerprints()
        assert all(fingerprints[key] == folder.fingerprints()[key] for key in ("image", "segmentation", "sketch"))
        assert fingerprints.keys() == folder.fingerprints().keys()


class Card:
    image_shape = (32, 32, 3)
    is_text_conditional = True


def test_scenes_by_tfds_give_the_same_batches(data):
    by_tfds = DataSettings(name="tfds", path=str(data / "scenes"), flip=True, views=2)
    drawn = DataSettings(name="scenes", size=12, flip=True, views=2)
    assert by_tfds.holds == drawn.holds and by_tfds.classes("segmentation") == drawn.classes("segmentation")
    assert by_tfds.has_test_split() and not by_tfds.is_at_hand("validation")
    by_tfds.check_holds(drawn.holds)
    sets = []
    for settings in (by_tfds, drawn):
        source = settings.open("train", drawn.holds, Card)

        def stacked(index, draw, source=source):
            examples = [source[int(2 * i + d % 2)] for i, d in zip(index, draw, strict=True)]
            return {key: np.stack([e[key] for e in examples]) for key in examples[0]}

        sets.append(training_batches(stacked, 12, 5, seed=3))
    for step in range(5):
        ours, theirs = (batches[step] for batches in sets)
        assert ours.keys() == theirs.keys() >= {"image", "segmentation", "sketch", "caption"}
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(ours[key], theirs[key])


# Bad input


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "scenes"])
def test_missing_downloads_are_named_with_their_page(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["build", name, f"--manual_dir={tmp_path / 'none'}", f"--data_dir={tmp_path}"])
    assert LAYOUTS[name].page in str(e.value) and "--manual_dir" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_data_set_lists_what_there_is(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data))
    assert find("coco_stuff").name == "1.0.0" and find("controlnet/saved:1.0.0") == find("controlnet/saved")
    with pytest.raises(UserError, match="there are: ade20k, .*can build: scenes, "):
        find("mnist")
    with pytest.raises(UserError, match="has no version 2.0.0; found 1.0.0"):
        find("controlnet/saved:2.0.0")
    with pytest.raises(UserError, match="several data sets in this folder, default, order-face_parsing"):
        find("celeba_hq_mask")
    with pytest.raises(UserError, match="no data set of TFDS in this folder"):
        find(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="Build it by python -m mcm_jax.data.tfds build lhq .*universome/alis"):
        find("lhq")
    assert not DataSettings(name="tfds", path="lhq").is_at_hand()


def test_a_download_leads_nowhere_else(downloads, tmp_path):
    coco_stuff(tmp_path / "coco")
    path = tmp_path / "coco/annotations/captions_train2017.json"
    path.write_text(path.read_text().replace("000000000025.jpg", "../val2017/000000000139.jpg"))
    with pytest.raises(UserError, match=r"captions_train2017.json: the file name '../val2017/.* is a path"):
        LAYOUTS["coco_stuff"]().splits(tmp_path / "coco")
    saved_to_disk(tmp_path / "saved")
    text(tmp_path / "saved/dataset_dict.json", json.dumps({"splits": ["../../train"]}))
    with pytest.raises(UserError, match=r"dataset_dict.json: the file name '../../train' is a path"):
        LAYOUTS["controlnet"]().splits(tmp_path / "saved")
    rows = controlnet_rows(1).set_column(0, "image", [[{"bytes": None, "path": "/etc/passwd"}]])
    pyarrow.parquet.write_table(rows, tmp_path / "train.parquet")
    (shard,) = LAYOUTS["controlnet"]().splits(tmp_path)["train"]
    with pytest.raises(UserError, match=r"row 0, image: expected the bytes of a picture.*embedded"):
        list(shard())


def test_the_extra_is_named_where_it_is_missing(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mcm-jax\[tfds\]'"):
        Records(data / "lhq", "train", (), 8, 8)


def test_damage_is_named(data, tmp_path):
    root = find(data / "controlnet/saved")
    for file in root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob("*-train.array_record-*")
    content = file.read_bytes()
    file.write_bytes(content[:150] + bytes(20) + content[170:])
    with pytest.raises(UserError, match=r"train\[0\] cannot be read .*Build it anew"):
        read(tmp_path, "train")
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not a data set as TFDS writes it"):
        read(tmp_path, "train")
