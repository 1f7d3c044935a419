"""The scripts: every mistake ends in one message that says how to mend it, and a stopped run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import load_file

from mcm_jax import jobs, pictures
from mcm_jax.cache import store
from mcm_jax.errors import UserError
from mcm_jax.generate import generate
from mcm_jax.training import assembly, train_and_evaluate
from mcm_jax.training.checkpoints import Checkpoints

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]

SETTINGS = ("num_samples", "seed", "guidance", "sampler", "steps", "eta", "batch_size")


def _edit_config(workdir, key, value):
    content = json.loads((workdir / "config.json").read_text())
    section, _, name = key.partition(".")
    content[section][name] = value
    (workdir / "config.json").write_text(json.dumps(content))


# --- train.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.stepz": 5}, ["stepz", "configs/default.py"]),
        ({"trian.steps": 5}, ["trian", "configs/default.py"]),
        ({"train.steps": "many"}, ["config.train.steps", "many"]),
        ({"train.steps": 1.5}, ["config.train.steps", "1.5"]),
        ({"mcm.residual_scale": "perhaps"}, ["config.mcm.residual_scale", "perhaps"]),
        ({"train.steps": 0}, ["config.train.steps", "at least 1", "got 0"]),
        ({"train.batch_size": -4}, ["config.train.batch_size", "at least 1", "got -4"]),
        ({"train.learning_rate": 0.0}, ["config.train.learning_rate", "above 0", "got 0.0"]),
        ({"train.learning_rate": "nan"}, ["config.train.learning_rate", "finite", "got nan"]),
        ({"train.learning_rate": "inf"}, ["config.train.learning_rate", "finite", "got inf"]),
        ({"data.size": 0}, ["config.data.size", "at least 1", "got 0"]),
        ({"seed": -1}, ["config.seed", "at least 0", "got -1"]),
        ({"seed": 2**64}, ["config.seed", "4294967295", str(2**64)]),
        ({"modalities.drop_rate": 1.0}, ["config.modalities.drop_rate", "below 1", "got 1.0"]),
        ({"train.ema_decay": 1.5}, ["config.train.ema_decay", "[0, 1]", "got 1.5"]),
        ({"loss.weighting": "huber"}, ["config.loss.weighting", "min_snr", "huber"]),
        ({"base.dtype": "float8"}, ["config.base.dtype", "bfloat16", "float8"]),
        ({"data.name": "photos"}, ["config.data.name", "scenes", "photos"]),
        ({"base.path": "nowhere"}, ["nowhere", "neither a folder nor a shipped name"]),
        ({"modalities.segmentation.channels": 3}, ["config.modalities.segmentation", "6", "3"]),
        ({"mcm.groups": 3}, ["mcm", "8 channels", "3 groups"]),
        ({"mcm.attention": (0,)}, ["mcm.attention", "2 levels", "got 1"]),
        ({"mcm.multipliers": (1, 1, 1, 1, 1, 1), "mcm.attention": (0,) * 6}, ["divisible by 32", "got 16x16"]),
        ({"mcm.inputs": ("x_t", "noise")}, ["config.mcm.inputs", "noise", "eps"]),
        ({"sampling.steps": 1001}, ["steps", "1..1000", "got 1001"]),
        ({"train.batch_size": 3}, ["train.batch_size=3", "multiple of the 2 devices"]),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_a_bad_config_is_explained_and_writes_nothing(script, base_path, tmp_path, changes, words):
    if changes == {"train.batch_size": 3} and jax.device_count() != 2:
        pytest.skip("as conftest.py sets it up, there are two devices")
    workdir = tmp_path / "run"
    assert script("train.py", *tiny.config_flags(base_path, changes), f"--workdir={workdir}").explains(*words)
    assert not workdir.exists()


def test_a_config_file_that_is_none_is_explained(script, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    absent = tmp_path / "absent.py"
    for more in ([], ["--config.train.steps=5"]):
        assert script("train.py", f"--config={absent}", workdir, *more).explains("cannot be read", str(absent))
    for name, text, words in (
        ("syntax", "def get_config(:\n", ["cannot be read", "syntax"]),
        ("imports", "import no_such_module\n", ["cannot be read", "no_such_module"]),
        ("empty", "", ["get_config"]),
        (
            "short",
            "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'seed': 0})\n",
            ["lacks", "train.steps", "configs/default.py"],
        ),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        assert script("train.py", f"--config={tmp_path / name}.py", workdir).explains(*words)
    assert script("train.py", workdir).explains("config")
    assert script("train.py", f"--config={tiny.ROOT / 'configs/default.py'}").explains("workdir")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_refused(script, trained, base_path, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    before = tiny.contents(workdir)
    arguments = tiny.config_flags(base_path, {"train.steps": 8, "seed": 3, "mcm.multipliers": (1, 3)})
    outcome = script("train.py", *arguments, f"--workdir={workdir}")
    assert outcome.explains(
        "another run's config",
        "train.steps: there 6, now 8",
        "seed: there 0, now 3",
        "mcm.multipliers: there [1, 2], now [1, 3]",
        "Take another --workdir",
    )
    assert "train.batch_size" not in outcome.err  # only what differs
    assert tiny.contents(workdir) == before


def test_a_checkpoint_of_another_base_is_refused(script, trained, other_base_path, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    _edit_config(workdir, "base.path", str(other_base_path))
    before = tiny.contents(workdir)
    outcome = script("train.py", *tiny.config_flags(other_base_path), f"--workdir={workdir}")
    assert outcome.explains("checkpoints/6", "'tiny'", trained.base.fingerprint[:16], "'other'", "config.base.path")
    assert tiny.contents(workdir) == before


def test_a_checkpoint_of_another_mcm_is_refused(script, trained, base_path, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    _edit_config(workdir, "mcm.multipliers", [1, 3])
    before = tiny.contents(workdir)
    outcome = script("train.py", *tiny.config_flags(base_path, {"mcm.multipliers": (1, 3)}), f"--workdir={workdir}")
    assert outcome.status == 1 and "Traceback" not in outcome.err
    for word in ("checkpoints/6 holds another MCM", "params/unet/", "there (", "expected (", "more"):
        assert word in outcome.err
    assert tiny.contents(workdir) == before


def test_a_damaged_checkpoint_is_explained(script, trained, base_path, tmp_path):
    workdir = trained.copy(tmp_path / "run")
    for path in (workdir / "checkpoints/6/state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    outcome = script("train.py", *tiny.config_flags(base_path), f"--workdir={workdir}")
    assert outcome.explains("checkpoints/6", "cannot be read", "Remove")
    shutil.rmtree(workdir / "checkpoints/6")  # as it says
    outcome = script("train.py", *tiny.config_flags(base_path), f"--workdir={workdir}")
    assert outcome.status == 0 and "going on from step 3" in outcome.out
    assert tiny.metrics_of(workdir) == tiny.metrics_of(trained.workdir)


def test_a_workdir_that_cannot_be_written_is_explained(script, base_path, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "run", "/proc/mcm-jax/run"):
        outcome = script("train.py", *tiny.config_flags(base_path), f"--workdir={workdir}")
        assert outcome.explains(f"workdir {workdir}", "cannot be written", "another --workdir")
    assert file.read_text() == "mine"


def test_a_finished_workdir_says_so(script, trained, base_path):
    """The config that came by the command line is the one that came by the API."""
    before = tiny.contents(trained.workdir)
    outcome = script("train.py", *tiny.config_flags(base_path), f"--workdir={trained.workdir}")
    assert outcome.status == 0 and "is finished: 6 of 6 steps" in outcome.out
    assert tiny.contents(trained.workdir) == before


def test_ctrl_c_saves_and_the_same_command_goes_on(small_path, tmp_path):
    """In a real process: 130, one message, and in the end every report once."""
    workdir = tmp_path / "run"
    changes = {"train.steps": 150, "train.log_every": 5, "train.checkpoint_every": 1000, "train.validate_every": 0}
    flags = tiny.config_flags(small_path, tiny.SMALL | changes)
    command = [sys.executable, "train.py", *flags, f"--workdir={workdir}"]
    with (tmp_path / "err").open("w+") as err:
        process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), stderr=err, stdout=err)
        metrics, until = workdir / "metrics.jsonl", time.monotonic() + 200
        while process.poll() is None and time.monotonic() < until:
            if metrics.exists() and metrics.stat().st_size:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        try:
            status = process.wait(60)
        finally:
            process.kill()
        err.seek(0)
        printed = err.read()
    assert status == 130, printed
    assert "Traceback" not in printed and "Go on with the same command" in printed and str(workdir) in printed
    stopped = json.loads((workdir / "checkpoints" / _steps(workdir)[-1] / "meta/metadata").read_text())
    assert stopped["base"] == "tiny" and 5 <= int(_steps(workdir)[-1]) < 150

    outcome = tiny.run_process(command, env=tiny.environment())
    assert outcome.status == 0, outcome.err
    assert f"going on from step {stopped_at(printed)}" in outcome.out
    assert "orbax" not in outcome.err.lower() and "Warning" not in outcome.err
    assert [line["step"] for line in tiny.metrics_of(workdir)] == list(range(5, 151, 5))
    assert _steps(workdir)[-1] == "150"


def _terminate():
    """Only under a handler: it would end the tests."""
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_before_the_first_step_stops_with_one_message(script, base_path, tmp_path, monkeypatch):
    before, assemble = signal.getsignal(signal.SIGTERM), assembly.assemble
    monkeypatch.setattr(assembly, "assemble", lambda *args: _terminate() or assemble(*args))
    outcome = script("train.py", *tiny.config_flags(base_path), f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 130 and outcome.explains("stopped", "same command")
    assert not (tmp_path / "run").exists() and signal.getsignal(signal.SIGTERM) == before


def test_a_build_that_sigterm_stops_goes_on(script, base_path, tmp_path, monkeypatch):
    write = store.write_shard

    def write_and_stop(path, tensors):
        entry = write(path, tensors)
        if path.name == store.shard_name(1):
            _terminate()
        return entry

    flags = tiny.config_flags(base_path, {"cache.shard_draws": 2, "draws.count": 1})
    monkeypatch.setattr(store, "write_shard", write_and_stop)
    outcome = script("precompute.py", *flags, f"--workdir={tmp_path}")
    assert outcome.status == 130 and "Traceback" not in outcome.err
    assert "stopped; the same command goes on from the shards that are complete" in outcome.err
    monkeypatch.undo()
    kept = len(list((tmp_path / "cache").glob("shard-*")))
    outcome = script("precompute.py", *flags, f"--workdir={tmp_path}")
    assert outcome.status == 0 and 2 <= kept < 6 and f"{6 - kept} shard(s) built now" in outcome.out


def _steps(workdir):
    return sorted((p.name for p in (workdir / "checkpoints").iterdir()), key=int)


def stopped_at(printed):
    """The step in the message of a stopped run."""
    return int(printed.split("stopped by a signal at step ")[1].split()[0])


def test_a_full_disk_is_explained_and_the_last_checkpoint_stands(trained, base_path, tmp_path):
    """Files above a limit cannot be written in this process, as on a full disk or over a quota."""
    workdir = trained.copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    train = [sys.executable, "train.py", *tiny.config_flags(base_path), f"--workdir={workdir}"]
    blocks = (workdir / "mcm.safetensors").stat().st_size // 512 + 8  # it just fits; the checkpoint's files do not
    limited = ["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh", *train]
    outcome = tiny.run_process(limited, env=tiny.environment())
    print(outcome.err)
    assert outcome.status == 1
    # One line is ours. Threads of TensorStore print before and after it, and at times half a line before its start.
    (message,) = re.findall(r"error: workdir .*", outcome.err)
    for word in (str(workdir), "could not be written", "complete one is of step 3", "same command again"):
        assert word in message

    checkpoints = Checkpoints(workdir, create=False)
    meta = {"base": "tiny", "fingerprint": trained.base.fingerprint}
    assert int(checkpoints.restore(trained.state, meta)[0].step) == 3
    checkpoints.close()
    end = train_and_evaluate(trained.config, workdir)
    tiny.assert_same_bits(jax.device_get(end), jax.device_get(trained.state))
    assert not list(workdir.rglob("*tmp*"))


# --- sample.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path):
    """Condition files of odd sizes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "maps"
    folder.mkdir()
    segmentation = rng.integers(0, 6, (23, 37)).astype(np.uint8)
    sketch = (rng.random((31, 9)) < 0.8).astype(np.uint8) * 255
    colours = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(segmentation).save(folder / "segmentation.png")
    Image.fromarray(sketch).save(folder / "sketch.png")
    Image.fromarray(segmentation).save(folder / "labels.jpg")
    shutil.copy(folder / "labels.jpg", folder / "renamed.png")
    Image.fromarray(colours).save(folder / "colours.png")
    Image.fromarray(np.where(segmentation == 5, 9, segmentation).astype(np.uint8)).save(folder / "unknown.png")
    (folder / "text.png").write_text("This is no picture.\n")
    (folder / "cut.png").write_bytes((folder / "segmentation.png").read_bytes()[:200])
    return folder


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["no condition given", "--segmentation=PNG", "--sketch=PNG"]),
        (["--segmentation=absent.png"], ["absent.png: no such file"]),
        (["--segmentation={maps}"], ["no such file"]),
        (["--segmentation={maps}/text.png"], ["text.png: not a picture", "PNG"]),
        (["--sketch={maps}/text.png"], ["text.png: not a picture"]),
        (["--segmentation={maps}/cut.png"], ["cut.png: not a picture"]),
        (["--segmentation={maps}/labels.jpg"], ["labels.jpg", "JPEG", "PNG"]),
        (["--segmentation={maps}/renamed.png"], ["renamed.png", "JPEG", "PNG"]),
        (["--segmentation={maps}/colours.png"], ["colours.png", "colour picture", "0..5"]),
        (["--segmentation={maps}/unknown.png"], ["unknown.png", "[9]", "0..5"]),
        (["--sketch={maps}/sketch.png", "--segmentation={maps}/unknown.png"], ["unknown.png", "[9]"]),
        (["--sketch={maps}/sketch.png", "--num_samples=0"], ["num_samples", "at least 1", "got 0"]),
        (["--sketch={maps}/sketch.png", "--num_samples=two"], ["num_samples", "two"]),
        (["--sketch={maps}/sketch.png", "--seed=-1"], ["seed", "0..4294967295", "got -1"]),
        (["--sketch={maps}/sketch.png", f"--seed={2**64}"], ["seed", "4294967295", str(2**64)]),
        (["--sketch={maps}/sketch.png", "--eta=1.5"], ["eta", "[0, 1]", "got 1.5"]),
        (["--sketch={maps}/sketch.png", "--guidance=-1"], ["guidance", "at least 0", "got -1"]),
        (["--sketch={maps}/sketch.png", "--guidance=nan"], ["guidance", "got nan"]),
        (["--sketch={maps}/sketch.png", "--batch_size=0"], ["batch_size", "at least 1", "got 0"]),
        (["--sketch={maps}/sketch.png", "--steps=0"], ["steps", "at least 1", "got 0"]),
        (["--sketch={maps}/sketch.png", "--steps=1001"], ["steps", "1..1000", "got 1001"]),
        (["--sketch={maps}/sketch.png", "--sampler=euler_a"], ["sampler", "euler_ancestral", "'euler_a'"]),
        (["--sketch={maps}/sketch.png", "--start=0.5", "--end=0.4"], ["end", "start=0.5", "got 0.4"]),
        (["--sketch={maps}/sketch.png", "--timesteps=900,x"], ["timesteps", "900,x"]),
        (["--sketch={maps}/sketch.png", "--timesteps=100,900.5"], ["timesteps", "falling", "900.5"]),
        (["--sketch={maps}/sketch.png", "--window=depth=0:1"], ["window", "segmentation, sketch", "depth"]),
        (["--sketch={maps}/sketch.png", "--window=sketch=0.5"], ["window.sketch", "two shares", "0.5"]),
        (["--sketch={maps}/sketch.png", "--strength=sketch=x"], ["--strength=sketch=x", "NAME=NUMBER"]),
        (["--sketch={maps}/sketch.png", "--weights=1,2"], ["weights", "1, one an MCM", "2.0"]),
        (["--sketch={maps}/sketch.png", "--inpaint={maps}/sketch.png"], ["inpaint", "given with an image"]),
        (["--sketch={maps}/sketch.png", "--image={maps}/text.png"], ["text.png: not a picture"]),
        (
            ["--sketch={maps}/sketch.png", "--image={maps}/colours.png", "--inpaint={maps}/sketch.png"],
            ["sketch.png: is 9x31 pixels", "colours.png: 16x16 pixels"],
        ),
        (["--sketch={maps}/sketch.png", "--image_strength=0.5"], ["image_strength", "without an image"]),
        (["--sketch={maps}/sketch.png", "--modulate=after_cfg"], ["--modulate", "unconditional"]),
        (["--sketch={maps}/sketch.png", "--width=19"], ["width", "a multiple of 2", "20", "got 19"]),
        (["--sketch={maps}/sketch.png", "--variation=0.5"], ["variation", "variation_seed"]),
        (["--jobs={maps}/text.png", "--show_base"], ["--jobs", "--show_base"]),
        (["--sketch={maps}/sketch.png", "--workdir=absent"], ["absent", "neither a folder nor a shipped name"]),
        (["--sketch={maps}/sketch.png", "--workdir={maps}"], ["config.json: no such file", "no workdir", "train.py"]),
        (["--sketch={maps}/sketch.png", "--depth={maps}/sketch.png"], ["depth"]),
        (["{maps}/sketch.png"], ["sketch.png", "flags only", "--name=value"]),
    ],
    ids=lambda v: " ".join(v).replace("{maps}/", "") if v and v[0].startswith("--") else "",
)
def test_bad_input_of_sampling_is_explained_and_writes_nothing(script, trained, maps, tmp_path, arguments, words):
    arguments = [a.format(maps=maps) for a in arguments]
    outcome = script("sample.py", f"--workdir={trained.workdir}", f"--out={tmp_path / 'out'}", *arguments)
    assert outcome.explains(*words)
    assert not (tmp_path / "out").exists()


def test_out_must_be_given_and_writable(script, trained, maps):
    arguments = [f"--workdir={trained.workdir}", f"--sketch={maps / 'sketch.png'}", "--num_samples=2"]
    assert script("sample.py", *arguments).explains("out")
    outcome = script("sample.py", *arguments, f"--out={maps / 'text.png'}")
    assert outcome.explains("text.png", "cannot be written", "--out")


def test_samples_can_be_repeated(trained, maps, tmp_path):
    """A real process writes them; samples.json alone says how to have them again, bit for bit."""
    out = tmp_path / "out"
    outcome = tiny.run_process(
        [
            *(sys.executable, "sample.py", f"--workdir={trained.workdir}", f"--out={out}", "--num_samples=3"),
            *(f"--segmentation={maps / 'segmentation.png'}", f"--sketch={maps / 'sketch.png'}"),
            *("--seed=5", "--guidance=1.5", "--eta=0.3", "--steps=2"),
        ],
        env=tiny.environment(),
    )
    assert outcome.status == 0, outcome.err
    assert str(out) in outcome.out and "Warning" not in outcome.err
    names = ["grid.png", "sample_000.png", "sample_001.png", "sample_002.png", "samples.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    pictures = [np.asarray(Image.open(out / name)) for name in names[1:4]]
    assert all(p.shape == (tiny.SIZE, tiny.SIZE, 3) and p.dtype == np.uint8 and p.std() > 5 for p in pictures)
    assert np.asarray(Image.open(out / "grid.png")).shape == (6 * 18, 6 * (5 * 17 + 1), 3)

    said = json.loads((out / "samples.json").read_text())
    given = {"num_samples": 3, "seed": 5, "guidance": 1.5, "eta": 0.3, "steps": 2, "sampler": "ddim"}
    assert {key: said[key] for key in given} == given
    assert said["fingerprint"] == trained.base.fingerprint and said["mcm_step"] == 6
    again = tmp_path / "again"
    files = {name: condition["file"] for name, condition in said["conditions"].items()}
    generate(said["workdir"], files, again, **{key: said[key] for key in SETTINGS})
    assert {n: b for n, b in tiny.contents(again).items() if n.endswith("png")} == {
        n: b for n, b in tiny.contents(out).items() if n.endswith("png")
    }


def test_a_sample_does_not_depend_on_how_many_there_are(script, trained, maps, tmp_path, monkeypatch):
    """Two samples, then three in the same folder: the first two are the same, and one condition is enough."""
    sketch = {"sketch": str(maps / "sketch.png")}
    images = {n: generate(str(trained.workdir), sketch, tmp_path / str(n), num_samples=n, seed=7) for n in (2, 3)}
    assert np.abs(images[2].astype(int) - images[3][:2]).max() <= 1
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = script(
        *("sample.py", f"--workdir={trained.workdir}", f"--sketch={maps / 'sketch.png'}", "--num_samples=2"),
        *("--seed=7", "--out=~/script"),  # no shell expands it there
    )
    assert outcome.status == 0 and str(tmp_path / "script") in outcome.out
    for name in ("sample_000.png", "sample_001.png", "grid.png"):
        assert (tmp_path / "script" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    other = generate(str(trained.workdir), sketch, tmp_path / "8", num_samples=2, seed=8)
    assert np.abs(other.astype(int) - images[2]).max() > 1


def test_a_second_run_into_a_folder_replaces_the_first(trained, maps, tmp_path):
    sketch = {"sketch": str(maps / "sketch.png")}
    shutil.copy(maps / "sketch.png", tmp_path / "sample_mine.png")  # no file of ours, whatever it is called
    for count in (3, 1):
        generate(str(trained.workdir), sketch, tmp_path, num_samples=count, seed=7)
    assert [p.name for p in sorted(tmp_path.glob("sample_*"))] == ["sample_000.png", "sample_mine.png"]
    with pytest.raises(UserError, match="preview_every must be a number of steps, or 0"):
        generate(str(trained.workdir), sketch, tmp_path, num_samples=1, seed=7, preview_every=-1)
    assert (tmp_path / "grid.png").exists()
    with pytest.raises(UserError, match="grid.png: is what is drawn from"):
        generate(str(trained.workdir), {"sketch": str(tmp_path / "grid.png")}, tmp_path, num_samples=1, seed=7)
    shutil.copy(maps / "sketch.png", tmp_path / "sample_000.png")
    with pytest.raises(UserError, match="sample_000.png: was not written by sample.py"):
        generate(str(trained.workdir), sketch, tmp_path, num_samples=1, seed=7)
    assert (tmp_path / "sample_000.png").read_bytes() == (maps / "sketch.png").read_bytes()
    (tmp_path / "sample_000.png").unlink()
    generate(str(trained.workdir), sketch, tmp_path / "own", num_samples=1, seed=7)
    of_a_list = (tmp_path / "own/sample_000.png").replace(tmp_path / "grid.png").read_bytes()
    with pytest.raises(UserError, match="grid.png: is a picture of a list"):
        generate(str(trained.workdir), sketch, tmp_path, num_samples=1, seed=7)
    assert (tmp_path / "grid.png").read_bytes() == of_a_list
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(maps / "sketch.png").save(tmp_path / "turned.png", exif=turned)
    with pytest.warns(UserWarning, match="turned.png: EXIF data would turn it"):
        generate(str(trained.workdir), {"sketch": str(tmp_path / "turned.png")}, tmp_path / "own", num_samples=1)


def test_an_interrupt_leaves_whole_samples_and_the_same_call_goes_on(trained, maps, tmp_path, monkeypatch):
    out = tmp_path / "out"
    how = {"num_samples": 3, "seed": 7, "batch_size": 1}
    sketch, save, left = {"sketch": str(maps / "sketch.png")}, pictures.save_png, [2]

    def stops(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "save_png", stops)
        generate(str(trained.workdir), sketch, out, **how)
    assert [p.name for p in sorted(out.iterdir())] == ["sample_000.png", "sample_001.png"]
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(generate(str(trained.workdir), sketch, out, **how)) == 3
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert len([*out.iterdir()]) == 5  # with the third, the grid and samples.json


def test_a_sample_that_is_nan_is_named_and_the_others_are_written(trained, maps, tmp_path, monkeypatch):
    whole = jobs.Drawer.sample

    def second_is_nan(self, *args, **how):
        images = whole(self, *args, **how)
        images[1, 0, 0] = np.nan
        return images

    generate(str(trained.workdir), {"sketch": str(maps / "sketch.png")}, tmp_path, num_samples=3, seed=8, steps=1)
    monkeypatch.setattr(jobs.Drawer, "sample", second_is_nan)
    with pytest.raises(UserError, match=r"(?s)sample_001, seed 7\): came out as NaN.*black in grid.png"):
        generate(str(trained.workdir), {"sketch": str(maps / "sketch.png")}, tmp_path, num_samples=3, seed=7)
    assert [p.name for p in sorted(tmp_path.glob("sample_*"))] == ["sample_000.png", "sample_002.png"]
    assert (tmp_path / "grid.png").exists() and (tmp_path / "samples.json").exists()
    idle = {"strength": {"segmentation": 0.5}}
    with pytest.raises(UserError, match="strength: given of segmentation, of which there is no condition"):
        generate(str(trained.workdir), {"sketch": str(maps / "sketch.png")}, tmp_path, num_samples=1, **idle)


def test_a_sketch_that_looks_inverted_is_pointed_out(trained, maps, tmp_path):
    file = tmp_path / "inverted.png"
    Image.fromarray(np.where(np.eye(31, dtype=bool), 255, 0).astype(np.uint8)).save(file)
    with pytest.warns(UserWarning, match="mostly dark; a sketch is black lines on white"):
        generate(str(trained.workdir), {"sketch": str(file)}, tmp_path, num_samples=1)


def test_train_py_killed_while_it_saves_goes_on_to_the_same_end(small_path, tmp_path):
    """SIGKILL of the script with a checkpoint half written: what comes is bit for bit what would have come."""
    changes = {"train.steps": 20, "train.checkpoint_every": 1, "train.validate_every": 0}
    command = [sys.executable, "train.py", *tiny.config_flags(small_path, tiny.SMALL | changes)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert tiny.run_process([*command, f"--workdir={whole}"], env=tiny.environment()).status == 0
    command.append(f"--workdir={killed}")

    def half_written():
        return list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    hits = 0
    for after in (2, 8):  # steps that are whole at least
        process = subprocess.Popen(
            command, cwd=tiny.ROOT, env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            done = [int(p.name) for p in (killed / "checkpoints").glob("*") if p.name.isdecimal()]
            if max(done, default=0) < after:
                time.sleep(0.01)
            elif half_written():
                process.kill()
        assert process.wait(60) == -signal.SIGKILL
        hits += bool(half_written())
    assert hits
    outcome = tiny.run_process(command, env=tiny.environment())
    assert outcome.status == 0 and "going on from step" in outcome.out, outcome.err
    # Not the files' bytes: the metadata in their headers have no order.
    tiny.assert_same_bits(*(load_file(folder / "mcm.safetensors") for folder in (killed, whole)))
    assert tiny.metrics_of(killed)[-1] == tiny.metrics_of(whole)[-1]
    assert not half_written()


def test_sigterm_before_the_first_step_is_one_message(script, base_path, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def assemble(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # Python's handler comes at the next instruction; this is never waited out
        raise AssertionError("not stopped")

    monkeypatch.setattr(assembly, "assemble", assemble)
    outcome = script("train.py", *tiny.config_flags(base_path, {}), f"--workdir={tmp_path / 'run'}")
    assert outcome.status == 130 and outcome.err.count("the same command goes on") == 1, outcome.err
    assert signal.getsignal(signal.SIGTERM) == before
