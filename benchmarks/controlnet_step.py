"""What one training step of diffusers' ControlNet takes in PyTorch, on the base that benchmarks/training.py has.

python -m benchmarks.controlnet_step --size=sd15 --dtype=bfloat16 --batch=8 --compile \
    --out=benchmarks/results/controlnet_h200.json

Random weights, latents 64x64x4, a condition of 512x512x3, the text's context given: the step of diffusers' own
train_controlnet.py without its autoencoder and text encoder: a float32 ControlNet under autocast beside a base of
--dtype, gradients clipped, AdamW. Images a second and peak memory. Compiled if --compile is given and it compiles.
"""

import argparse
import pathlib
import statistics
import time

import diffusers
import torch

from benchmarks import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "60m", "tiny"), default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that warm up")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    config = {"sample_size": 64, "cross_attention_dim": 768} | common.UNETS[args.size]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**config).requires_grad_(False)
    controlnet = diffusers.ControlNetModel.from_unet(unet)
    unet.to(device, dtype)
    controlnet.to(device).train()
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-5)
    side, width = config["sample_size"], config["cross_attention_dim"]

    def predict(x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        down, middle = controlnet(x_t, t, encoder_hidden_states=context, controlnet_cond=condition, return_dict=False)
        return unet(
            x_t,
            t,
            encoder_hidden_states=context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample

    compiled = False
    run = predict
    arrays = [
        torch.randn(args.batch, 4, side, side, device=device, dtype=dtype),
        torch.randint(0, 1000, (args.batch,), device=device),
        torch.randn(args.batch, 77, width, device=device, dtype=dtype),
        torch.rand(args.batch, 3, 8 * side, 8 * side, device=device, dtype=dtype),
    ]
    noise = torch.randn_like(arrays[0])

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            prediction = run(*arrays)
        loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    if args.compile:
        run, compiled = torch.compile(predict), True
        try:
            step()
        except Exception as e:  # of many kinds: no compiler, a graph it does not know
            print(f"does not compile: {e!r}"[:500])
            run, compiled = predict, False
    seconds = []
    for i in range(args.steps + 2):
        began = time.perf_counter()
        step()
        if i >= 2:
            seconds.append(round(time.perf_counter() - began, 4))
    report = {
        "size": args.size,
        "dtype": args.dtype,
        "batch_size": args.batch,
        "compiled": compiled,
        "trained_parameters": sum(p.numel() for p in controlnet.parameters()),
        "seconds": seconds,
        "images_per_second": round(args.batch / statistics.median(seconds), 2),
        "peak_memory": {"device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        if device == "cuda"
        else common.peak_memory(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    common.write_report(args.out, __doc__, report, ("torch", "diffusers"))


if __name__ == "__main__":
    main()
