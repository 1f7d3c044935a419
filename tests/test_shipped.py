"""What ships works right after installation: bases, MCMs, segmentation net, examples."""

import json
import pathlib
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mcm_jax import assets, load_base
from mcm_jax.data.emoji import Emoji
from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation import evaluate as evaluation
from mcm_jax.generate import generate
from mcm_jax.modalities import Modality, read_png
from mcm_jax.pipeline import Pipeline

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module", params=["scenes-ddpm", "emoji-ddpm"])
def base(request):
    return load_base(assets.resolve(request.param))


def test_assets_are_small():
    sizes = {p: p.stat().st_size for p in (ROOT / "mcm_jax" / "assets").rglob("*") if p.is_file()}
    folders = {name: sum(s for p, s in sizes.items() if name in p.parts) for name in assets.shipped()}
    of_scenes = {"scenes-ddpm", "scenes-mcm", "scenes-sd", "scenes-sd-mcm", "scenes-segmenter", "scenes-facts"}
    assert set(folders) == of_scenes | {"emoji", "emoji-ddpm", "emoji-mcm", "emoji-segmenter"}
    assert max(folders.values()) <= 12 * 2**20
    assert sum(sizes.values()) <= 60 * 2**20


def test_base_equals_pytorch(base):
    folder = assets.resolve(base.name)
    oracle = diffusers.DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float32).unet.float().eval()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 32, 32, 3)).astype(np.float32)
    t = np.array([0, 500, 999], np.int32)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy()
    found = jax.jit(base.predict)(base.params, jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(
        found, expected.transpose(0, 2, 3, 1), atol=1e-5 * max(1, np.abs(expected).max()), rtol=0
    )


@pytest.mark.slow
def test_base_removes_noise(base):
    """The base is a real model: it predicts the noise in held-out pictures far better than chance."""
    source = Scenes("test", 8, seed=2) if base.name == "scenes-ddpm" else Emoji("test")
    images = np.stack([source[i]["image"] for i in range(8)])
    images = images if images.dtype == np.float32 else np.float32(images / 127.5 - 1)
    noise = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
    t = jnp.full(8, 500, jnp.int32)
    eps = jax.jit(base.predict)(base.params, base.schedule.add_noise(jnp.asarray(images), jnp.asarray(noise), t), t)
    assert float(jnp.mean((eps - noise) ** 2)) < 0.03


@pytest.mark.slow
def test_text_conditional_base_equals_pytorch():
    """The shipped miniature Stable Diffusion, net by net: prompt to context, context to noise, picture to latent."""
    folder = assets.resolve("scenes-sd")
    base = load_base(folder)
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    prompts = ["a mountain lake at sunset with three trees", "", "something else entirely"]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *base.latent_shape)).astype(np.float32)
    image = np.stack([Scenes("test", 3, 64, 64, seed=2)[i]["image"] for i in range(3)])
    t = np.array([0, 500, 999], np.int32)
    nchw = lambda a: torch.from_numpy(np.asarray(a).transpose(0, 3, 1, 2).copy())  # noqa: E731
    with torch.no_grad():
        ids = oracle.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        context = oracle.text_encoder(ids).last_hidden_state
        eps = oracle.unet(nchw(x), torch.from_numpy(t), context).sample
        latent = oracle.vae.encode(nchw(image)).latent_dist.mean * oracle.vae.config.scaling_factor
        picture = oracle.vae.decode(nchw(x) / oracle.vae.config.scaling_factor).sample
    contexts = base.embed_text(base.params, prompts)
    for found, expected in (
        (contexts, context.numpy()),
        (jax.jit(base.predict)(base.params, x, t, contexts), eps.numpy().transpose(0, 2, 3, 1)),
        (jax.jit(base.encode)(base.params, image), latent.numpy().transpose(0, 2, 3, 1)),
        (jax.jit(base.decode)(base.params, x), picture.numpy().transpose(0, 2, 3, 1)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=0)


def _light(name, tmp_path):
    """A copy of a shipped MCM whose evaluation draws one sample a map."""
    folder = shutil.copytree(assets.resolve(name), tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    config["evaluation"]["diversity_seeds"] = 0
    config["sampling"]["batch_size"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_shipped_mcm_controls_a_prompted_base(tmp_path):
    result = evaluation.evaluate(_light("scenes-sd-mcm", tmp_path), tmp_path / "metrics.json", maps=12, steps=8)
    miou, facts = result["miou"], result["facts"]
    assert miou["real"] > 0.9
    assert miou["unprompted"] < 0.4
    assert miou["unprompted"] < miou["base"] < miou["both"] - 0.2
    assert miou["both"] > 0.7
    assert facts["real"]["mean"] > 0.95
    assert facts["both"]["mean"] >= 0.9 * facts["base"]["mean"] > 0.8
    assert (tmp_path / "samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_shipped_mcm_controls(tmp_path):
    result = evaluation.evaluate(_light("scenes-mcm", tmp_path), tmp_path / "metrics.json", maps=12, steps=8)
    miou = result["miou"]
    assert miou["real"] > 0.9
    assert miou["base"] < 0.4
    assert miou["both"] > 0.75
    assert miou["segmentation"] > 0.7
    assert miou["sketch"] > 0.5
    assert result["mcm_parameters"] <= 0.1 * result["base_parameters"]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["miou"] == miou
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_docs_quote_the_shipped_reports():
    text = (ROOT / "docs" / "experiments.md").read_text()
    for base, name in (("scenes-ddpm", "scenes-mcm"), ("scenes-sd", "scenes-sd-mcm"), ("emoji-ddpm", "emoji-mcm")):
        found = json.loads((assets.resolve(name) / "metrics.json").read_text())
        table = text.split(f"| `{base}`")[1].split("\n")
        for line, numbers in zip(table, (found["miou"], found["edge_f1"], found["diversity"]), strict=False):
            rows = [numbers.get(row) for row in ("both", "segmentation", "sketch", "base", "real")]
            rows = [row["f1"] if isinstance(row, dict) else row for row in rows]
            cells = [cell.split()[0] for cell in line.split("|")[-6:-1] if cell.strip()]
            assert cells == [f"{row:.3f}" for row in rows if row is not None], f"{base}: {line}"


def test_examples_are_conditions():
    labels = read_png(EXAMPLES / "segmentation.png", Modality("segmentation", "labels", len(CLASSES)))
    assert len(np.unique(labels)) >= 4
    sketch = read_png(EXAMPLES / "sketch.png", Modality("sketch", "map", 1))
    assert 0.6 < sketch.mean() < 0.99


@pytest.mark.slow
def test_sample_script_with_the_shipped_mcm(tmp_path):
    """The README's command, fewer steps."""
    command = [sys.executable, "sample.py", f"--segmentation={EXAMPLES / 'segmentation.png'}", "--num_samples=2"]
    command += [f"--sketch={EXAMPLES / 'sketch.png'}", "--steps=4", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["grid.png", "sample_000.png", "sample_001.png", "samples.json"]
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["fingerprint"] == Pipeline.from_folder("scenes-mcm").base.fingerprint


@pytest.mark.slow
def test_seed_and_number_name_a_sample(tmp_path):
    conditions = {"sketch": str(EXAMPLES / "sketch.png")}
    three = generate("scenes-mcm", conditions, tmp_path / "a", num_samples=3, seed=5, steps=3)
    one = generate("scenes-mcm", conditions, tmp_path / "b", num_samples=1, seed=5, steps=3)
    other = generate("scenes-mcm", conditions, tmp_path / "c", num_samples=1, seed=6, steps=3)
    assert np.abs(three[:1].astype(int) - one).max() <= 1
    assert np.abs(three[1].astype(int) - three[0]).mean() > 1
    assert np.abs(other.astype(int) - one).mean() > 1
