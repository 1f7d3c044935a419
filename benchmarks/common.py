"""What the benchmarks share: bases of any size with random weights, data that cost nothing, and the report's frame."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.base import Base, attention
from mcm_jax.base.autoencoders import AutoencoderKL, AutoencoderKLConfig
from mcm_jax.base.clip import CLIPText, CLIPTextConfig
from mcm_jax.base.unet2d_condition import UNet2DCondition, UNet2DConditionConfig
from mcm_jax.errors import UserError
from mcm_jax.evaluation.judges import Judge, flatten
from mcm_jax.mcm import Modulator
from mcm_jax.modalities import Modality
from mcm_jax.schedules import Schedule
from mcm_jax.sharding import replicate
from mcm_jax.training import RunSettings, state, step
from mcm_jax.training.assembly import schedule_of
from mcm_jax.training.optimizer import make_optimizer

MODALITIES = (Modality("segmentation", "labels", 150), Modality("sketch", "lines", 1))
UNETS = {  # what each changes in diffusers' defaults, which are SD 1.5's but for two
    "sd15": {},
    "60m": {"block_out_channels": (96, 192, 320, 320), "attention_head_dim": 8, "cross_attention_dim": 256},
    "tiny": {
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "sample_size": 16,
    },
}
_VAES = {"sd15": (128, 256, 512, 512), "60m": (32, 64, 64, 64), "tiny": (32, 32, 32, 32)}


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input ends the command with its message alone, as that of the scripts does."""
    try:
        yield
    except UserError as e:
        raise SystemExit(str(e)) from e


class Words:
    """A stand-in for CLIP's tokenizer, whose vocabulary cannot be had here: any text is 77 tokens."""

    length = 77

    def __call__(self, prompts: Sequence[str], cut: dict[str, str] | None = None) -> np.ndarray:
        """int32 ``[B, 77]``; nothing is cut."""
        return np.stack([np.random.default_rng(len(p)).integers(0, 1000, 77).astype(np.int32) for p in prompts])


def make_base(size: str, dtype: str) -> Base:
    """Stable Diffusion 1.5's networks with random weights, whole or shrunk: ``sd15``, ``60m``, ``tiny``."""
    changes = {"sample_size": 64, "cross_attention_dim": 768} | UNETS[size]
    width = changes["cross_attention_dim"]
    unet = UNet2DCondition(UNet2DConditionConfig.from_dict(changes), dtype=jnp.dtype(dtype))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae_config = blocks | {"block_out_channels": _VAES[size], "layers_per_block": 2, "latent_channels": 4}
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(vae_config), dtype=jnp.dtype(dtype))
    layers = {"num_hidden_layers": 12, "num_attention_heads": width // 64 or 1} if size == "sd15" else {}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text_config = {"hidden_size": width, "intermediate_size": 4 * width, **(layers or small)}
    text = CLIPText(CLIPTextConfig.from_dict(text_config), jnp.dtype(dtype))
    latent = (changes["sample_size"], changes["sample_size"], 4)
    key, shape = jax.random.key(0), jax.ShapeDtypeStruct
    inputs = {
        "unet": (unet, [shape((1, *latent), jnp.float32), shape((1,), jnp.int32), shape((1, 77, width), jnp.float32)]),
        "vae": (vae, [shape((1, 64, 64, 3), jnp.float32)]),
        "text_encoder": (text, [shape((1, 77), jnp.int32)]),
    }
    rng, params = np.random.default_rng(0), {}
    for name, (net, arguments) in inputs.items():
        shapes = jax.eval_shape(net.init, key, *arguments)["params"]
        params[name] = jax.tree.map(
            lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02, dtype), shapes
        )
    schedule = Schedule.from_config(
        {
            "_class_name": "PNDMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "steps_offset": 1,
        }
    )
    image = (8 * latent[0], 8 * latent[1], 3)
    return Base(f"random-{size}", params, unet, schedule, latent, image, "0" * 64, vae, text, Words())


@dataclasses.dataclass(frozen=True)
class Noise:
    """A data set of random pictures and maps: what a folder gives, without reading it."""

    size: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        height, width, _ = self.shape
        row = np.arange(height * width, dtype=np.uint32).reshape(height, width) * np.uint32(2 * index + 1)
        grey = (row >> 7).astype(np.uint8)
        return {
            "image": np.stack([grey, grey ^ 85, grey ^ 170], -1),
            "segmentation": grey % 150,
            "sketch": grey,
            "caption": np.array(f"picture {index} " + "x" * (index % 40)),
        }


def gflop(function: Callable, *arguments: Any) -> float | None:
    """10^9 floating point operations of a call, by XLA's count of the program as it is written, for a CPU.

    Not of the optimised program: on a GPU that calls libraries, whose operations XLA does not count. Whatever was
    compiled is forgotten, before and after: what is traced here is not what runs. None where XLA does not tell.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), arguments)
    jax.clear_caches()
    with (  # attention in XLA's operations, too, and not in a loop, which it counts once
        unittest.mock.patch.object(jax, "default_backend", lambda: "cpu"),
        unittest.mock.patch.object(attention, "loops_over_heads", lambda: False),
        jax.default_device(jax.local_devices(backend="cpu")[0]),  # plugins' devices do not count
    ):
        analysis = jax.jit(lambda *args: function(*args)).lower(*shapes).cost_analysis()
    jax.clear_caches()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return round(float(analysis["flops"]) / 1e9, 3) if analysis else None


def seconds(function: Callable[[], Any], runs: int) -> list[float]:
    """Of each of some calls, after one that warms up."""
    jax.block_until_ready(function())
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - began)
    return found


def median(values: Sequence[float], digits: int = 4) -> float:
    """Rounded."""
    return round(statistics.median(values), digits)


def peak_memory() -> dict[str, float]:
    """GiB: the process's highest resident memory so far, and the first device's, where it tells."""
    # Where there is one, not getrusage: its maximum is inherited from the process that started this one.
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    unit = 1024 if platform.system() == "Darwin" else 1  # bytes there
    kib = own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    stats = jax.local_devices()[0].memory_stats() or {}
    device = {"device_gib": round(stats["peak_bytes_in_use"] / 2**30, 3)} if "peak_bytes_in_use" in stats else {}
    return {"host_gib": round(kib / 2**20, 3), **device}


def write_report(out: pathlib.Path | None, what: str, report: dict[str, Any], packages: Sequence[str] = ()) -> None:
    """Prints a result and writes it with hardware, versions and commit."""
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", *packages)}
    device = jax.devices()[0]
    frame = {
        "what": what.splitlines()[0],
        **report,
        "hardware": f"{platform.machine()}, {os.cpu_count()} logical CPU(s), {jax.device_count()} {device.device_kind}",
        "load_before": round(LOAD, 1),
        "versions": versions,
        "commit": COMMIT,
    }
    print(json.dumps(frame, indent=2))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(frame, indent=2) + "\n")


def begin_run(run: RunSettings, modulator: Modulator, base: Base, seed: int, mesh: jax.sharding.Mesh) -> list[Any]:
    """State and compiled step of a training by a config's recipe: for benchmarks that train several side by side."""
    t = run.train
    optimizer = make_optimizer(t.optimizer, schedule_of(run), weight_decay=t.weight_decay, clip_norm=t.clip_norm)
    init = jax.jit(lambda key: modulator.init(key, base.latent_shape, modulator.grid(base)))
    params = replicate(init(jax.random.key(seed, impl="rbg")), mesh)  # compiles in a third of the time
    how = dict(weighting=run.loss.weighting, l1=run.loss.l1, ema_decay=t.ema_decay)
    return [state.init_state(params, optimizer), step.make_train_step(modulator, optimizer, **how)]


def numbers_of(judges: Sequence[Judge], images: np.ndarray, which: np.ndarray, digits: int = 4) -> dict[str, float]:
    """What judges say of pictures for some held-out examples, rounded; what is undefined is left out."""
    found: dict[str, Any] = {}
    for judge in judges:
        found |= flatten(judge(np.clip(images, -1, 1), which).numbers)
    return {name: round(float(value), digits) for name, value in found.items() if not isinstance(value, str)}


LOAD = os.getloadavg()[0]  # other processes' share explains a slow run


def _commit() -> str:
    """With ``, changed`` where files differ from it; empty where git does not say."""

    def ask(*words: str) -> str:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
        return ask("rev-parse", "HEAD") + ", changed" * bool(changed)
    except OSError:
        return ""


COMMIT = _commit()


def made_of(base: Base, draws: int) -> dict[str, str]:
    """What a benchmark's cache says that it is made of."""
    return {"format": "1", "base": base.fingerprint, "base.dtype": "", "data.noise": "1", "draws.count": str(draws)}


def use_compilation_cache(workdir: pathlib.Path, shared: bool = True) -> None:
    """Compiled programs are read back from here, or from where ``JAX_COMPILATION_CACHE_DIR`` says if that may be.

    So a benchmark's second run of the same code does not compile.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR") if shared else None
    folder = named or str((workdir / "compiled").absolute())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
