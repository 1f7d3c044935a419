"""A tiny base, a tiny run on it, and the scripts' command line inside this process: shared by the tests of whole runs.

Widths of the base (20, 28) and of the MCM (8, 16) have no sum in common, so an array's shape tells whose it is.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app, flags

from configs import default
from mcm_jax import config as config_lib
from mcm_jax.base import load_base, loading
from mcm_jax.data.pipeline import InMemory
from mcm_jax.training import RunSettings, read_run, train_and_evaluate

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZE = 16
OVERRIDES = {
    "data.size": 12,
    "cache.batch_size": 8,
    "mcm.channels": 8,
    "mcm.multipliers": (1, 2),
    "mcm.blocks": 1,
    "mcm.attention": (0, 0),
    "mcm.groups": 4,
    "mcm.conditions": "grid",
    "train.steps": 6,
    "train.batch_size": 4,
    "train.log_every": 2,
    "train.checkpoint_every": 3,
    "train.validate_every": 3,
    "sampling.sampler": "ddim",
    "sampling.steps": 3,
}


# An MCM of one level, where nothing depends on the network: it compiles in half the time.
SMALL = {"mcm.channels": 4, "mcm.multipliers": (1,), "mcm.attention": (0,), "mcm.groups": 2, "cache.batch_size": 4}


def save_base(folder, seed, size=SIZE, widths=(20, 28)):
    """Writes a random base in diffusers' own format."""
    import diffusers  # here, so that tests that need no base do not wait for PyTorch
    import torch

    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def save_ldm_base(folder, seed=0):
    """Writes a random unconditional latent base: pictures of 32x32, latents of 16x16x3."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    net = diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(20, 28),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=7,
    )
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
    diffusers.LDMPipeline(vqvae, net, diffusers.DDIMScheduler(**schedule)).save_pretrained(folder)
    return folder


WORDS = "a mountain lake meadow at dawn sunset night by day with and sun moon one two three trees tree , . !"


def save_tokenizer(folder, length=20):
    """Writes a CLIP tokenizer that knows :data:`WORDS` and single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges, pieces = [], [*letters, *(f"{c}</w>" for c in letters), *("!</w>", ",</w>", ".</w>")]
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    pieces = [*dict.fromkeys(["!", *pieces]), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def save_clip(folder, text=None, vision=None, length=20, seed=0, **config):
    """Writes a random CLIP with its image processor and tokenizer, no parameter left at 0 or 1; returns the CLIP."""
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder / "letters", length)
    depth = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": length, "hidden_size": 12}
    words |= {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = {"projection_dim": 7, **config}
    config["text_config"] = {**depth, **words, **(text or {})}
    config["vision_config"] = {**depth, "hidden_size": 15, "image_size": 13, "patch_size": 4, **(vision or {})}
    net = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = config["vision_config"]["image_size"]
    transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
    return net


def save_sd_base(folder, version=1, seed=0):
    """Writes a random Stable Diffusion, 1.x or 2.x: pictures of 32x32, latents of 16x16x4."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(seed)
    tokenizer = save_tokenizer(folder / "tokenizer")
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=20,
            hidden_act="quick_gelu" if version == 1 else "gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    net = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(20, 28),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2 if version == 1 else [4, 7],
        use_linear_projection=version == 2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIZE,
    )
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    schedule |= {"steps_offset": 1, "set_alpha_to_one": False}
    schedule["prediction_type"] = "epsilon" if version == 1 else "v_prediction"
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=diffusers.DDIMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_config(base_path, changes=None):
    """configs/default.py, shrunken; ``changes`` has dotted keys."""
    config = default.get_config().lock()
    config.update_from_flattened_dict(OVERRIDES | {"base.path": str(base_path)} | (changes or {}))
    return config


def leave_gaps(patch):
    """Scenes, from now on, of which every third lacks its segmentation, and every fourth its sketch."""
    render = InMemory.render

    def partial(scenes):
        arrays, i = render(scenes).arrays, np.arange(len(scenes))
        return InMemory(arrays | {"present": np.stack([i % 3 != 0, i % 4 != 0], 1).astype(np.uint8)})

    patch.setattr(InMemory, "render", partial)


def settings_of(config):
    """A config as the library has it."""
    return read_run(config)


def changed(settings, changes):
    """Settings with some keys changed."""
    return read_run(config_lib.override(RunSettings, config_lib.to_dict(settings), changes))


def modulator_of(config, base):
    """The MCM that a config describes, for a base."""
    settings = settings_of(config)
    return settings.mcm.modulator(settings.modalities.shown, base)


def config_flags(base_path, changes=None):
    """The same config as :func:`make_config`, as arguments of train.py."""
    values = OVERRIDES | {"base.path": str(base_path)} | (changes or {})
    return [f"--config={ROOT / 'configs/default.py'}", *(f"--config.{key}={value}" for key, value in values.items())]


def contents(folder):
    """Bytes of every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


PACE = ("images_per_second", "input_wait")


def metrics_of(workdir):
    """The lines of metrics.jsonl, without what is a matter of the machine."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in PACE} for line in lines]


def assert_same_bits(found, expected):
    """Two pytrees have the same structure, dtypes and values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), jax.tree_util.keystr(path)


def count(tree):
    """Number of values in a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training run; its workdir is never changed (tests copy it)."""

    workdir: pathlib.Path
    config: object
    state: object
    base: object  # the object that the run itself had loaded and used
    printed: str

    def copy(self, folder):
        """A copy of the workdir, to be changed."""
        return shutil.copytree(self.workdir, folder)


@contextlib.contextmanager
def quick_compiling():
    """Compiles in half the time, to slower programs, which tiny nets do not notice."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick():
    """For ``pytestmark``: every test of a file under :func:`quick_compiling`."""
    with quick_compiling():
        yield


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("bases") / "tiny", seed=0)


@pytest.fixture(scope="session")
def small_path(tmp_path_factory):
    """A base of one level and 8x8, to go with :data:`SMALL`."""
    return save_base(tmp_path_factory.mktemp("bases") / "tiny", seed=0, size=8, widths=(20,))


@pytest.fixture(scope="session")
def other_base_path(tmp_path_factory):
    """A base of the same architecture and other weights."""
    return save_base(tmp_path_factory.mktemp("bases") / "other", seed=1)


@pytest.fixture(scope="session")
def ldm_path(tmp_path_factory):
    return save_ldm_base(tmp_path_factory.mktemp("bases") / "ldm")


@pytest.fixture(scope="session")
def sd_path(tmp_path_factory):
    return save_sd_base(tmp_path_factory.mktemp("bases") / "sd", version=1)


@pytest.fixture(scope="session")
def sd2_path(tmp_path_factory):
    return save_sd_base(tmp_path_factory.mktemp("bases") / "sd2", version=2)


@pytest.fixture(scope="session")
def base(base_path):
    return load_base(base_path)


@pytest.fixture(scope="session")
def trained(base_path, tmp_path_factory):
    """Six steps without a break."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    config, used = make_config(base_path), []
    with quick_compiling(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_base", lambda *args: used.append(load_base(*args)) or used[-1])
        patch.setattr("builtins.print", lambda *args, **_: used.append(" ".join(map(str, args))))
        state = train_and_evaluate(config, workdir)
    return Run(workdir, config, state, used[0], "\n".join(used[1:]))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a script did: exit status, and what it printed (a message that it exits with counts as printed)."""

    status: int
    out: str
    err: str

    def explains(self, *words):
        """Holds if the script failed with one short message, free of tracebacks, that has all the words."""
        message = self.err.strip().splitlines()
        assert self.status not in (0, None), self
        assert "Traceback" not in self.err and len(message) <= 12, self.err
        assert not [word for word in words if word not in self.err], self.err
        return True


@pytest.fixture
def script(monkeypatch, capfd):
    """``script("train.py", *arguments)`` runs a script as ``__main__`` in this process, where imports cost nothing."""

    def run(name, *arguments):
        app.define_help_flags()
        known = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        capfd.readouterr()
        code = None
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            code = e.code
        finally:
            flags.FLAGS.unparse_flags()
            sys.modules.pop("config_config", None)  # ml_collections would load the next config into this module
            for flag in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, flag)
        out, err = capfd.readouterr()
        if isinstance(code, str):
            return Outcome(1, out, err + code)
        return Outcome(code or 0, out, err)

    return run


def environment(devices=None):
    """Of a script's own process: compiled programs are read back from the tests' cache."""
    count = f"--xla_force_host_platform_device_count={devices or jax.device_count()}"
    changes = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}",  # the last one counts
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }
    return os.environ | changes


def run_process(command, timeout=300, **kwargs):
    """Runs a command from the repository's root to its end."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, **kwargs)
    return Outcome(done.returncode, done.stdout, done.stderr)
