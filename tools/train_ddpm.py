"""Trains the shipped bases ``scenes-ddpm`` and ``emoji-ddpm``: unconditional 32x32 DDPMs, with PyTorch and diffusers.

    python -m tools.train_ddpm scenes --out=mcm_jax/assets/scenes-ddpm --work=runs/scenes-ddpm
    python -m tools.train_ddpm emoji --out=mcm_jax/assets/emoji-ddpm --work=runs/emoji-ddpm

They see images only, never a segmentation, sketch or caption, and of emoji only the training split. A run that was
stopped goes on from ``--work``. The recipe below and the log (``training_log.jsonl``) are saved beside the weights.
About an hour each on 2 CPU cores, for scenes with bfloat16 instructions. On cores that others use too,
``OMP_WAIT_POLICY=PASSIVE`` in the environment makes it several times faster. torch.compile needs a C++ compiler.
"""

import argparse
import concurrent.futures
import copy
import json
import math
import pathlib
import time

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from mcm_jax.data.emoji import Emoji
from mcm_jax.data.scenes import Scenes
from tools.work import claim

RECIPES = {
    "scenes": {
        "images": 16_000,
        "data_seed": 0,
        "flip": True,
        "steps": 2_800,
        "batch": 48,
        "learning_rate": 8e-4,
        "warmup": 200,
        "decay": "cosine to 0",
        "adam_betas": [0.9, 0.99],
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema": 0.998,
        "loss": "eps, min-SNR-5 weighting",
        "autocast": "bfloat16",
        "seed": 0,
        "unet": {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": [48, 80, 112, 160],
            "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
            "attention_head_dim": 16,
            "norm_num_groups": 16,
        },
        "scheduler": {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    },
}
RECIPES["emoji"] = RECIPES["scenes"] | {
    "images": "the training split of emoji",
    "shift": 2,
    "steps": 4_000,
    "batch": 32,
    "ema": 0.999,
    "autocast": "none",
    "unet": RECIPES["scenes"]["unet"] | {"block_out_channels": [32, 64, 96, 128]},
}
del RECIPES["emoji"]["data_seed"]


def _render(index: int) -> np.ndarray:
    r = RECIPES["scenes"]
    image = Scenes("train", r["images"], seed=r["data_seed"])[index]["image"]
    return np.round((image + 1) * 127.5).astype(np.uint8)


def images_of(data: str, work: pathlib.Path) -> torch.Tensor:
    """The training images as uint8 ``[N, 3, 32, 32]``. Scenes are rendered once and kept in the work folder."""
    if data == "emoji":
        images = np.stack([e["image"] for e in Emoji("train")])
    else:
        path = work / "images.npy"
        if not path.exists():
            with concurrent.futures.ProcessPoolExecutor() as pool:
                np.save(path, np.stack(list(pool.map(_render, range(RECIPES["scenes"]["images"]), chunksize=200))))
        images = np.load(path)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def shifted(x: torch.Tensor, most: int, rng: torch.Generator) -> torch.Tensor:
    """Each of a batch of pictures on white (1), moved by up to so many pixels in both directions."""
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, [most] * 4, value=1.0)
    corners = torch.randint(2 * most + 1, (len(x), 2), generator=rng).tolist()
    return torch.stack([p[:, i : i + height, j : j + width] for p, (i, j) in zip(padded, corners, strict=True)])


@torch.no_grad()
def sample_sheet(net: torch.nn.Module, scheduler: dict, path: pathlib.Path, rows: int = 4, columns: int = 8) -> None:
    scheduler = DDIMScheduler(**scheduler)
    scheduler.set_timesteps(25)
    x = torch.randn(rows * columns, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x).prev_sample
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    x = x.reshape(rows, columns, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)
    Image.fromarray(x.repeat(3, 0).repeat(3, 1)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(RECIPES))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    r = RECIPES[args.data]
    claim(args.work, r)
    images = images_of(args.data, args.work)
    torch.manual_seed(r["seed"])
    net = UNet2DModel(**r["unet"])
    ema = copy.deepcopy(net).requires_grad_(False)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(
        net.parameters(), r["learning_rate"], betas=tuple(r["adam_betas"]), weight_decay=r["weight_decay"]
    )
    scheduler = DDPMScheduler(**r["scheduler"])
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)
    start, log = 0, []
    state_file = args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, log = state["step"], state["log"]
    compiled = torch.compile(net)  # emoji: 0.65 s a step in place of 1.07
    began, losses = time.time(), []
    for step in range(start, r["steps"]):
        rng = torch.Generator().manual_seed(1_000_003 * (r["seed"] + 1) + step)
        x = images[torch.randint(len(images), (r["batch"],), generator=rng)].float() / 127.5 - 1
        flip = torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5
        x = torch.where(flip, x.flip(-1), x)
        if "shift" in r:
            x = shifted(x, r["shift"], rng)
        t = torch.randint(len(abar), (len(x),), generator=rng)
        noise = torch.randn(x.shape, generator=rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=r["autocast"] == "bfloat16"):
            eps = compiled(scheduler.add_noise(x, noise, t), t).sample
        weight = snr[t].clamp(max=5) / snr[t]
        loss = (weight[:, None, None, None] * (eps.float() - noise) ** 2).mean()
        rate = min((step + 1) / r["warmup"], 0.5 + 0.5 * math.cos(math.pi * step / r["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = r["learning_rate"] * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), r["clip_norm"])
        optimizer.step()
        decay = min(r["ema"], (1 + step) / (10 + step))
        with torch.no_grad():
            for p, q in zip(ema.parameters(), net.parameters(), strict=True):
                p.lerp_(q, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = (time.time() - began) / (step + 1 - start)
            log.append(
                {"step": step + 1, "loss": round(float(np.mean(losses)), 5), "seconds_per_step": round(seconds, 3)}
            )
            print(log[-1], flush=True)
            losses = []
        if (step + 1) % 250 == 0 or step + 1 == r["steps"]:
            state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "log": log}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").rename(state_file)
            sample_sheet(ema, r["scheduler"], args.work / f"samples_{step + 1:05d}.png")
    DDPMPipeline(unet=ema.half(), scheduler=scheduler).save_pretrained(args.out)
    (args.out / "recipe.json").write_text(json.dumps(r, indent=2) + "\n")
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


if __name__ == "__main__":
    main()
