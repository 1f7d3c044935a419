"""What an MCM adds to a sampling step, beside what ControlNet adds to one of the same base in PyTorch.

python -m benchmarks.sampling_step --out=benchmarks/results/sampling_step_cpu.json

Stable Diffusion 1.5's shape with random weights, latents of 64x64, the paper's MCM with its
conditions on the latents' grid; steps of the default sampler through the pipeline, prompts and transfers with them,
without decoding. The base alone and under control alternate in one process; so do diffusers' U-Net alone and with its
ControlNet (of the same shape, a condition of 512x512). With text guidance both branches are one batch of each network.
FLOPs are XLA's count of the programs as they are written.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.training import make_modulator
from mcm_jax import sampling
from mcm_jax.mcm import parameter_count
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import Trained


def alternating(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, after one of each that warms up."""
    for function in functions.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - began)
    return found


def summary(seconds: dict[str, list[float]], steps: int, alone: str) -> dict:
    """Medians a step, and what each takes beyond the one alone: the median of the rounds' ratios."""
    report = {name: {"seconds_a_step": common.median([s / steps for s in each])} for name, each in seconds.items()}
    for name, each in seconds.items():
        if name != alone:
            report[name]["over_alone"] = common.median([a / b for a, b in zip(each, seconds[alone], strict=True)])
    return report


def ours(args: argparse.Namespace) -> dict:
    base = common.make_base(args.size, args.dtype)
    raw = dataclasses.replace(base, autoencoder=None)  # decodes nothing
    modulator = make_modulator(base.card, args.mcm, args.mcm_dtype)
    params = jax.jit(lambda key: modulator.init(key, base.latent_shape))(jax.random.key(0))
    rng, height, width = np.random.default_rng(0), *base.latent_shape[:2]
    conditions = {
        "segmentation": rng.integers(0, 150, (args.batch, height, width)).astype(np.int32),
        "sketch": rng.random((args.batch, height, width)).astype(np.float32),
    }
    keys, prompts = sampling.sample_keys(0, args.batch), ["a mountain lake"] * args.batch
    settings = SamplingSettings(steps=args.steps, batch_size=args.batch)
    alone, controlled = Pipeline(raw, (), settings), Pipeline(raw, Trained(modulator, params), settings)
    report: dict = {"mcm_parameters": parameter_count(params), "base_parameters": base.card.unet_parameters}
    for scale in (7.5, 1.0):
        how = dict(prompts=prompts, text_guidance=scale)
        calls = {"base": lambda how=how: alone({}, keys, **how)}
        for where in ("before_cfg", "after_cfg", "prompt_only") if scale != 1 else ("before_cfg",):
            calls[f"base and MCM, {where}"] = lambda how=how, where=where: controlled(
                conditions, keys, modulate=where, **how
            )
        report["text guidance" if scale != 1 else "no text guidance"] = summary(
            alternating(calls, args.rounds), args.steps, "base"
        )
    x, t = jnp.zeros((args.batch, *base.latent_shape)), jnp.zeros(args.batch, jnp.int32)
    context = jnp.zeros((args.batch, 77, base.unet.config.cross_attention_dim))
    shown = jnp.ones((args.batch, 2), bool)
    whole = common.gflop(base.predict, base.params, x, t, context)
    part = common.gflop(lambda p, x: modulator(p, x, x, t, conditions, shown)[0], params, x)
    report["gflop"] = {"base": whole, "mcm": part, "share": whole and part and round(part / whole, 4)}
    return report


def theirs(args: argparse.Namespace) -> dict:
    import diffusers
    import torch

    config = {"sample_size": 64, "cross_attention_dim": 768} | common.UNETS[args.size]
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    unet = diffusers.UNet2DConditionModel(**config)
    controlnet = diffusers.ControlNetModel.from_unet(unet).to(device, dtype).eval()
    unet.to(device, dtype).eval()
    side, width = config["sample_size"], config["cross_attention_dim"]

    def make(count: int) -> list:
        shapes = (count, 4, side, side), (count, 77, width), (count, 3, 8 * side, 8 * side)
        x, text, condition = (torch.randn(*shape, device=device, dtype=dtype) for shape in shapes)
        return [x, torch.full((count,), 500, device=device), text, condition]

    @torch.no_grad()
    def run(given: list, controlled: bool) -> None:
        x, t, text, condition = given
        more = {}
        for _ in range(args.steps):
            if controlled:
                down, middle = controlnet(
                    x, t, encoder_hidden_states=text, controlnet_cond=condition, return_dict=False
                )
                more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            unet(x, t, encoder_hidden_states=text, **more)
        if device == "cuda":
            torch.cuda.synchronize()

    report = {"controlnet_parameters": sum(p.numel() for p in controlnet.parameters())}
    for name, count in (("text guidance", 2 * args.batch), ("no text guidance", args.batch)):
        given = make(count)
        calls = {"base": lambda g=given: run(g, False), "base and ControlNet": lambda g=given: run(g, True)}
        report[name] = summary(alternating(calls, args.rounds), args.steps, "base")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(common.UNETS), default="60m")
    parser.add_argument("--mcm", default="paper")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mcm_dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    report = {k: v for k, v in vars(args).items() if k != "out"} | {"ours": ours(args)}
    packages = ()
    try:
        report["diffusers"], packages = theirs(args), ("torch", "diffusers")
    except ImportError as e:
        report["diffusers"] = f"left out: {e}"
    common.write_report(args.out, __doc__, report, packages)


if __name__ == "__main__":
    main()
