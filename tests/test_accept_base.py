"""Laws of an MCM on a base that is a fine-tune of its own: taken where asked for, and only if it can be one."""

import json
import pathlib
import shutil
import warnings

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tiny
from PIL import Image

from mcm_jax import pictures
from mcm_jax.base import load_base
from mcm_jax.errors import UserError
from mcm_jax.jobs import read_record, replay
from mcm_jax.jobs.record import is_drawn
from mcm_jax.pipeline import Pipeline

pytestmark = [pytest.mark.usefixtures("quick"), pytest.mark.slow]


def _with_schedule(path, folder, **changes):
    """A copy of a base with another noise schedule."""
    folder = pathlib.Path(shutil.copytree(path, folder))
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def _make_old(folder):
    """Makes a file's header what it was before it told more than the base's name."""
    file = folder / "mcm.safetensors"
    with safetensors.safe_open(file, "numpy") as stored:
        metadata = {k: v for k, v in stored.metadata().items() if k in ("base", "fingerprint", "step")}
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, metadata)


def _accepted(folder, base):
    """The pipeline, and the one warning."""
    with pytest.warns(UserWarning) as caught:
        found = Pipeline.from_folder(folder, base=base, accept_base=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    return found, str(caught[0].message)


def test_a_fine_tune_is_taken_where_asked_for(trained, other_base_path, tmp_path):
    with pytest.raises(UserError, match=r"'tiny'.*'other'.*--accept_base"):
        Pipeline.from_folder(trained.workdir, base=other_base_path)
    found, said = _accepted(trained.workdir, other_base_path)
    other = load_base(other_base_path).fingerprint
    assert found.base.fingerprint == other and found.mcms[0].step == 6
    assert all(word in said for word in ("'tiny'", "'other'", trained.base.fingerprint[:16], other[:16]))
    assert "not known" not in said
    tiny.assert_same_bits(jax.device_get(found.mcms[0].params), jax.device_get(trained.state.ema_params))

    moved = shutil.copytree(trained.config.base.path, tmp_path / "moved")
    with warnings.catch_warnings():  # its own base, at another place
        warnings.simplefilter("error")
        assert Pipeline.from_folder(trained.workdir, base=moved, accept_base=True).base.name == "moved"


@pytest.mark.parametrize("old", [False, True], ids=["new header", "old header"])
def test_no_fine_tune_is_refused_with_what_differs(trained, other_base_path, tmp_path, old):
    folder = trained.copy(tmp_path / "run")
    if old:
        _make_old(folder)
    bases = {
        ("schedule", "1000 timesteps", "0.000040"): _with_schedule(
            other_base_path, tmp_path / "beta", beta_end=0.02005
        ),
        ("schedule", "500 timesteps"): _with_schedule(other_base_path, tmp_path / "short", num_train_timesteps=500),
        ("latent_shape: there 16x16x3, here 8x8x3",): tiny.save_base(tmp_path / "small", seed=1, size=8),
    }
    for words, base in bases.items():
        with pytest.raises(UserError) as error:
            Pipeline.from_folder(folder, base=base, accept_base=True)
        assert all(word in str(error.value) for word in ("no fine-tune", *words)), error.value
        assert ("latent_shape" in str(error.value)) != ("schedule:" in str(error.value))


def test_an_old_file_whose_own_base_is_gone_says_that_nothing_was_compared(trained, other_base_path, tmp_path):
    folder = trained.copy(tmp_path / "run")
    _make_old(folder)
    assert "not known" not in _accepted(folder, other_base_path)[1]
    content = json.loads((folder / "config.json").read_text())
    for gone in (tmp_path / "nowhere", other_base_path):  # and one that is another base is not its own
        content["base"]["path"] = str(gone)
        (folder / "config.json").write_text(json.dumps(content))
        assert "not known" in _accepted(folder, other_base_path)[1]
    assert Pipeline.from_folder(folder, base=trained.config.base.path).mcms[0].step == 6


def test_params_must_fit_all_the_same(trained, other_base_path, tmp_path):
    folder = trained.copy(tmp_path / "run")
    content = json.loads((folder / "config.json").read_text())
    content["mcm"]["multipliers"] = [1, 3]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="another MCM"):
        Pipeline.from_folder(folder, base=other_base_path, accept_base=True)


def test_a_picture_is_drawn_again_on_the_base_it_was_drawn_on(script, trained, other_base_path, tmp_path):
    base = pathlib.Path(shutil.copytree(other_base_path, tmp_path / "tuned"))
    pictures.save_png(tmp_path / "lines.png", np.where(np.eye(16) > 0, 0, 255).astype(np.uint8))
    draw = "sample.py", f"--workdir={trained.workdir}", f"--sketch={tmp_path / 'lines.png'}", f"--base={base}"
    draw = *draw, "--num_samples=1", f"--out={tmp_path / 'first'}"
    assert script(*draw).explains("--accept_base", "'tuned'")
    assert script("evaluate.py", *draw[1:2], draw[3], f"--out={tmp_path / 'm.json'}").explains("--accept_base")
    with pytest.warns(UserWarning, match="fine-tune"):
        assert script(*draw, "--accept_base").status == 0
    first = tmp_path / "first/sample_000.png"
    said = read_record(first)
    assert said["fingerprint"] == load_base(base).fingerprint and said["base_path"] == str(base)

    def again(name, **how):
        with pytest.warns(UserWarning, match="fine-tune"):
            replay(first, tmp_path / name, **how)
        return np.asarray(Image.open(tmp_path / name / "sample_000.png")).astype(int)

    np.testing.assert_array_equal(again("second"), np.asarray(Image.open(first)))
    moved = shutil.copytree(base, tmp_path / "elsewhere/tuned")
    with pytest.raises(UserError, match="--accept_base"):
        replay(first, tmp_path / "third", base=str(moved))
    np.testing.assert_array_equal(again("third", base=str(moved), accept_base=True), np.asarray(Image.open(first)))
    assert is_drawn(tmp_path / "third/sample_000.png", said)  # wherever it was
    replay(first, tmp_path / "own", base=trained.config.base.path)
    assert np.abs(np.asarray(Image.open(tmp_path / "own/sample_000.png")).astype(int) - again("second")).max() > 2

    shutil.rmtree(base)
    tiny.save_base(base, seed=2)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"'tuned'.*--base"):
        replay(first, tmp_path / "fourth")
