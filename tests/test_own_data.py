"""Training on a folder of the user's own pairs, and what is said, and left behind, when something is wrong with it."""

import json
import shlex
import threading
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from mcm_jax import config as config_lib
from mcm_jax.base import load_base
from mcm_jax.cache import Cache
from mcm_jax.data import inputs
from mcm_jax.data.__main__ import main as commands
from mcm_jax.data.folder import Folder
from mcm_jax.data.scenes import PALETTE
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.pipeline import Pipeline
from mcm_jax.sharding import make_mesh, replicate
from mcm_jax.training import precompute, train_and_evaluate
from mcm_jax.training.workdir import check_same_run

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

COUNT = 5


def _write(folder, stem, rng):
    """A pair of 20x30 pixels: random pictures, labels 0..5."""
    colours = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(colours).save(folder / "image" / f"{stem}.png")
    Image.fromarray(rng.integers(0, 6, (20, 30)).astype(np.uint8)).save(folder / "segmentation" / f"{stem}.png")
    Image.fromarray(colours[..., 0]).save(folder / "sketch" / f"{stem}.png")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("image", "segmentation", "sketch"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(COUNT):
            _write(tmp_path / "data" / split, f"{i}", rng)
    return tmp_path / "data"


@pytest.fixture
def config(data, base_path):
    changes = {"data.name": "folder", "data.path": str(data), "train.steps": 2, "train.validate_every": 0}
    return tiny.make_config(base_path, changes | {"train.checkpoint_every": 1, "train.log_every": 1})


def test_the_command_trains_on_a_folder_and_samples(script, config, base_path, data, tmp_path):
    changes = {"data.name": "folder", "data.path": data, "train.steps": 2, "train.validate_every": 2}
    workdir = tmp_path / "run"
    outcome = script("train.py", *tiny.config_flags(base_path, changes), f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert (workdir / "validation/step_0000002.png").exists()
    sketch = data / "test/sketch/0.png"
    outcome = script(
        *("sample.py", f"--workdir={workdir}", f"--condition=sketch={sketch}", "--num_samples=1", "--steps=2"),
        f"--out={tmp_path / 'out'}",
    )
    assert outcome.status == 0, outcome.err
    command = ["evaluate.py", f"--workdir={workdir}", f"--out={tmp_path / 'metrics.json'}", "--steps=2", "--maps=2"]
    assert script(*command).explains("no judge of the labels 'segmentation'", "--judge=segmentation=HOW")
    assert script(*command, "--judge=segmentation").explains("--judge=segmentation", "expected MODALITY=HOW")
    outcome = script(*command, "--judge=segmentation=none")
    assert outcome.status == 0, outcome.err
    assert set(json.loads((tmp_path / "metrics.json").read_text())["edge_f1"]) >= {"real", "base", "sketch"}


def test_bare_pictures_become_an_mcm_by_three_commands(script, small_path, tmp_path, capfd):
    """docs/data.md's tutorial, shortened: what `check` prints trains as it stands, nothing else is configured."""
    rng, pictures = np.random.default_rng(0), tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        square = np.zeros((20, 20, 3), np.uint8)
        square[rng.integers(8) :, rng.integers(8) :] = rng.integers(100, 256, 3)
        Image.fromarray(square).save(pictures / f"{i}.png")
    for command in (["make", str(pictures), "--extract=sketch,strokes"], ["check", str(pictures)]):
        with pytest.raises(SystemExit) as ended:
            commands(command)
        assert not ended.value.code
    words = shlex.split(capfd.readouterr().out.strip().splitlines()[-1])
    assert words[:3] == ["python", "train.py", "--config=configs/folder.py"]
    small = tiny.config_flags(small_path, tiny.SMALL | {"train.steps": 2, "train.validate_every": 0, "mcm.head_dim": 0})
    small = [flag for flag in small if not flag.startswith(("--config=", "--config.data.", "--config.modalities."))]
    workdir = tmp_path / "run"
    outcome = script(*words[1:3], f"--config.data.path={pictures}", *small, f"--workdir={workdir}")
    assert outcome.status == 0, outcome.err
    found = json.loads((workdir / "config.json").read_text())["modalities"]
    assert {k: v["kind"] for k, v in found.items() if k != "drop_rate"} == {"sketch": "lines", "strokes": "sparse"}
    command = ["evaluate.py", f"--workdir={workdir}", f"--out={tmp_path / 'metrics.json'}", "--steps=2", "--maps=1"]
    assert script(*command, "--strengths=2,0").explains("strengths must be above 0, got (2.0, 0.0)")
    outcome = script(*command, "--strengths=2,3.5")
    assert outcome.status == 0, outcome.err
    numbers, subsets = json.loads((tmp_path / "metrics.json").read_text()), ("both", "sketch", "strokes")
    stronger = {f"{subset}@{strength}" for subset in subsets for strength in ("2", "3.5")}
    assert set(numbers["edge_f1"]) == {"real", "base", *subsets, *stronger}
    assert numbers["strengths"] == [2.0, 3.5]


def test_a_folder_with_unknown_pixels_of_other_kinds_trains_and_samples(config, data, tmp_path):
    """Unlabelled pixels, and modalities that a config alone adds."""
    rng = np.random.default_rng(1)
    for path in data.glob("*/segmentation/*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(rng.random(labels.shape) < 0.1, 255, labels).astype(np.uint8)).save(path)
    config.cache.mode = "build"
    with pytest.raises(
        UserError, match=r"\[255\], but this model knows 0\.\.5 .*config\.modalities\.segmentation\.ignore"
    ):
        train_and_evaluate(config, tmp_path / "refused")
    config.modalities.segmentation.ignore = 255
    with config.unlocked():
        config.modalities.strokes = {"kind": "sparse", "channels": 3}
        config.modalities.normals = {"kind": "normals", "channels": 3}
    for path in data.glob("*/image/*.png"):
        for name, mode in (("strokes", "RGBA"), ("normals", "RGB")):
            picture = Image.open(path).convert(mode)
            if name == "strokes":
                picture.putalpha(Image.fromarray((rng.random((20, 30)) < 0.5).astype(np.uint8) * 255))
            (path.parents[1] / name).mkdir(exist_ok=True)
            picture.save(path.parents[1] / name / path.name)
    config.data.views, config.data.flip, config.train.validate_every = 2, True, 2
    colours = PALETTE // 2  # not those of scenes
    classes = [{"name": f"{i}", "color": colour} for i, colour in enumerate(colours.tolist())]
    (data / "classes.json").write_text(json.dumps({"classes": classes, "ignore": 255, "ignore_color": [1, 2, 3]}))
    workdir = tmp_path / "run"
    assert int(train_and_evaluate(config, workdir).step) == 2
    record = Cache(workdir / "cache").read(np.arange(COUNT, dtype=np.int32), np.zeros(COUNT, np.int32))["segmentation"]
    assert record.dtype == np.uint8 and set(np.unique(record)) == {0, 1, 2, 3, 4, 5, 255}
    assert 0.02 < (record == 255).mean() < 0.25
    given = {name: str(data / f"test/{name}/0.png") for name in ("segmentation", "strokes", "normals")}
    images = generate(str(workdir), given, tmp_path / "out", num_samples=1, steps=2)
    assert images.shape[0] == 1 and images.std() > 0
    data.rename(tmp_path / "moved")  # the workdir still knows the colours, to read by and to draw in
    given = {name: str(tmp_path / f"moved/test/{name}/0.png") for name in given}
    labels = np.array(Image.open(given["segmentation"]))
    Image.fromarray(np.array([*colours, *[(1, 2, 3)] * 250], np.uint8)[labels]).save(given["segmentation"])
    again = generate(str(workdir), given, tmp_path / "out", num_samples=1, steps=2)
    np.testing.assert_array_equal(again, images)
    drawn = np.array(Image.open(tmp_path / "out/grid.png").convert("RGB"))
    assert set(map(tuple, colours.tolist())) <= set(map(tuple, drawn.reshape(-1, 3).tolist()))


def test_conditions_are_cut_in_sampling_as_in_training(config, data, base, tmp_path, monkeypatch):
    """A wide sketch on a square base: the centre, not all of it squeezed; a map in the data's colours: its classes."""
    modalities = tiny.settings_of(config).modalities.shown
    source = Folder(data, "train", modalities, *base.image_shape[:2])
    seen = {}

    class Stop(Exception):
        pass

    def call(pipeline, maps, *args, **kwargs):
        seen.update(maps)
        raise Stop

    train_and_evaluate(config, tmp_path / "run")
    monkeypatch.setattr(Pipeline, "__call__", call)
    files = {name: str(data / "train" / name / "3.png") for name in ("segmentation", "sketch")}
    classes = [{"name": f"{i}", "color": PALETTE[i].tolist()} for i in range(6)]
    (data / "classes.json").write_text(json.dumps({"classes": classes}))
    files["segmentation"] = str(tmp_path / "colours.png")
    labels = np.array(Image.open(data / "train" / "segmentation" / "3.png"))
    Image.fromarray(PALETTE[labels]).save(files["segmentation"])
    with pytest.raises(Stop):
        generate(str(tmp_path / "run"), files, tmp_path / "out", num_samples=1)
    np.testing.assert_array_equal(seen["segmentation"][0], source[3]["segmentation"])
    np.testing.assert_allclose(seen["sketch"][0], source[3]["sketch"] / 255.0, atol=0.5 / 255 + 1e-6)


def test_bad_data_leave_no_workdir_and_once_mended_train(config, data, tmp_path, capsys):
    workdir = tmp_path / "run"
    file = data / "train/segmentation/4.png"
    good = file.read_bytes()
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(file)
    with pytest.raises(UserError, match=r"4\.png.*\[9\]"):
        train_and_evaluate(config, workdir)
    assert not workdir.exists() or not any(workdir.iterdir())

    config.train.validate_every = 2
    file.write_bytes(good)
    (data / "test/sketch/2.png").unlink()  # the held-out split is looked at first
    with pytest.raises(UserError, match="sketch"):
        train_and_evaluate(config, workdir)
    assert not workdir.exists() or not any(workdir.iterdir())

    config.train.validate_every, config.train.evaluate_every = 0, 2
    _write(data / "test", "2", np.random.default_rng(2))
    config.evaluation.judges.segmentation = "misspelt"
    with pytest.raises(UserError, match="misspelt"):
        train_and_evaluate(config, workdir)
    assert not workdir.exists() or not any(workdir.iterdir())

    tiny.shutil.rmtree(data / "test")
    config.data.held_out_share = 0.0  # nothing is held out, so there is nothing to judge
    assert int(train_and_evaluate(config, workdir).step) == 2
    assert "control is not measured while training" in capsys.readouterr().out


def test_other_files_are_another_run(config, data, tmp_path):
    """Indices are positions in the sorted folder: a file more would give every later example another's noise."""
    workdir = tmp_path / "run"
    train_and_evaluate(config, workdir)
    for name in ("checkpoints/2", "mcm.safetensors"):
        path = workdir / name
        tiny.shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(data / "train", "added", np.random.default_rng(1))
    with pytest.raises(UserError, match="checkpoints/1: the training examples are others"):
        train_and_evaluate(config, workdir)
    for name in ("image", "segmentation", "sketch"):
        (data / "train" / name / "added.png").unlink()
    assert int(train_and_evaluate(config, workdir).step) == 2


def test_a_held_out_loss_that_nothing_gives_is_refused_before_a_cache_is_built(config, data, tmp_path):
    tiny.shutil.rmtree(data / "test")
    with config.unlocked():
        config.data.held_out_share, config.cache.mode = 0.0, "build"
        config.train.evaluate_every, config.train.best = 1, "held_out_mse"
    with pytest.raises(UserError, match="config.train.best='held_out_mse': not measured"):
        train_and_evaluate(config, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["image", "prompt", "latent", "draw"])
def test_names_that_an_example_holds_already(config, name):
    with config.unlocked():
        config.modalities[name] = {"kind": "map", "channels": 1}
    with pytest.raises(UserError, match=f"modalities.{name}: this name is taken"):
        tiny.settings_of(config)


@pytest.mark.parametrize("name", ["base", "file", "base_path", "fidelity"])
def test_names_that_mean_two_things_are_for_older_runs_alone(config, name, tmp_path):
    with config.unlocked():
        config.modalities[name] = {"kind": "map", "channels": 1}
    settings, workdir = tiny.settings_of(config), tmp_path / "run"
    for begin in (precompute, train_and_evaluate):
        with pytest.raises(UserError, match=f"config.modalities.{name}: this name is taken, .*, {name}"):
            begin(config, workdir)
    assert not workdir.exists()
    workdir.mkdir()
    config_lib.save(settings, workdir)
    assert check_same_run(settings, workdir) == settings == config_lib.load(type(settings), workdir)


def test_pictures_are_not_read_far_ahead(config, sd_path):
    """Reading is faster than encoding: without a bound the whole set would wait in memory."""
    base, modalities = load_base(sd_path), tiny.settings_of(config).modalities.shown
    picture = np.zeros((32, 32, 3), np.uint8)
    example = {"image": picture, "segmentation": picture[..., 0], "sketch": picture[..., 0], "caption": np.array("a")}
    lock, read, ahead, encoded = threading.Lock(), [0], [0], [0]

    class Source:
        def __len__(self):
            return 2_000

        def __getitem__(self, index):
            with lock:
                read[0] += 1
                ahead[0] = max(ahead[0], read[0] - encoded[0])
            return example

    class Slow:
        """The base, with an encoder that takes its time."""

        latent_shape, params, name = base.latent_shape, replicate(base.params, make_mesh()), base.name
        is_latent = is_text_conditional = True
        embed_text = staticmethod(lambda params, prompts, cut: np.zeros((len(prompts), 3, 24), np.float32))

        @staticmethod
        def encode(params, image):
            def wait(latent):
                encoded[0] += len(latent)
                time.sleep(0.002)
                return latent

            latent = image[:, ::2, ::2, :1].repeat(4, axis=-1)
            return inputs.jax.pure_callback(wait, inputs.jax.ShapeDtypeStruct(latent.shape, latent.dtype), latent)

    prepared = inputs.prepare(Slow(), Source(), modalities, make_mesh())
    assert len(prepared.source) == 2_000 and prepared.contexts.shape == (2, 3, 24)
    assert ahead[0] < 400
