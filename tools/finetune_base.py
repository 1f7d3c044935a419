"""Fine-tunes the shipped base ``scenes-sd`` to winter (:mod:`tools.winter`), with PyTorch: bases as users bring them.

    python -m tools.finetune_base --method=full --out=runs/winter-full --work=runs/winter
    python -m tools.finetune_base --method=lora --out=runs/winter-lora --work=runs/winter
    python -m tools.finetune_base --method=lora --scale=0.5 --out=runs/winter-half --work=runs/winter

``full`` trains every weight of the U-Net, ``lora`` products of two narrow matrices that are added to the weights of its
convolutions and linear layers (Hu et al. 2021), and merged before saving, at ``--scale``. Autoencoder and text encoder
stay. It sees pictures and captions only. A run that was stopped goes on from ``--work``; a finished one only saves
again. The recipe, with what was trained, and the log are saved beside the weights. About 5 minutes each on a CPU core.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch.nn.utils import parametrize

from mcm_jax import assets
from mcm_jax.data.scenes import Scenes
from tools.train_scenes_sd import PROMPTS, SIZE, Training, encode_all, sample, save_sheet, token_ids
from tools.winter import winter
from tools.work import claim

BASE = "scenes-sd"
RECIPE = {
    "base": BASE,
    "palette": "winter",
    "images": 1_500,
    "data_seed": 7,
    "flip": True,
    "seed": 0,
    "steps": 400,
    "batch": 32,
    "warmup": 30,
    "decay": "cosine to 0",
    "adam_betas": [0.9, 0.99],
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "loss": "eps, min-SNR-5 weighting",
    "empty_prompts": 0.12,
}
METHODS = {"full": {"learning_rate": 4e-4}, "lora": {"learning_rate": 3e-3, "rank": 8}}


class LoRA(torch.nn.Module):
    """Adds to a weight ``[out, ...]``, seen as a matrix, one of a low rank: zero at first."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, weight[0].numel()) / weight[0].numel() ** 0.5)
        self.up = torch.nn.Parameter(torch.zeros(len(weight), rank))
        self.scale = 1.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.up @ self.down).reshape(weight.shape)


def add_lora(net: torch.nn.Module, rank: int) -> list[torch.nn.Module]:
    """Puts a :class:`LoRA` on every convolution and linear layer; returns these layers."""
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return layers


def render(path: pathlib.Path) -> tuple[torch.Tensor, list[str]]:
    """Winter pictures (uint8 ``[N, 3, 64, 64]``) and their captions, rendered once and kept in the work folder."""
    if not path.exists():
        scenes = list(Scenes("train", RECIPE["images"], SIZE, SIZE, seed=RECIPE["data_seed"]))
        pictures = np.stack([winter(s["image"], s["segmentation"]) for s in scenes])
        images = np.round((pictures + 1) * 127.5).astype(np.uint8)
        np.savez(path, images=images, captions=np.array([s["caption"] for s in scenes]))
    with np.load(path) as stored:
        return torch.from_numpy(stored["images"]).permute(0, 3, 1, 2), stored["captions"].tolist()


def train(pipe: StableDiffusionPipeline, recipe: dict, work: pathlib.Path) -> tuple[int, list[dict]]:
    """Trains the pipeline's U-Net in place; returns how many parameters learned, and the log."""
    images, captions = render(work / "train.npz")
    means, deviations = encode_all(pipe.vae, images, work / "latents.pt")
    with torch.no_grad():
        embed = lambda texts: pipe.text_encoder(token_ids(pipe.tokenizer, texts)).last_hidden_state  # noqa: E731
        contexts, empty = embed(captions), embed([""])
    torch.manual_seed(recipe["seed"])
    unet = pipe.unet.to(memory_format=torch.channels_last)
    learning, layers = [unet], []
    if recipe["method"] == "lora":
        unet.requires_grad_(False)
        layers = add_lora(unet, recipe["rank"])
        learning = [layer.parametrizations["weight"][0] for layer in layers]
    training = Training(recipe["method"], recipe, learning, [], work)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)

    def loss_fn(rng: torch.Generator) -> dict[str, torch.Tensor]:
        count = recipe["batch"]
        pick = torch.randint(len(captions), (count,), generator=rng)
        mirrored = torch.randint(2, (count,), generator=rng)
        z = torch.randn(count, *means.shape[2:], generator=rng)
        z = pipe.vae.config.scaling_factor * (means[mirrored, pick] + deviations[mirrored, pick] * z)
        untold = torch.rand(count, 1, 1, generator=rng) < recipe["empty_prompts"]
        t = torch.randint(len(snr), (count,), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        x = scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        eps = unet(x, t, torch.where(untold, empty, contexts[pick])).sample
        weight = snr[t].clamp(max=5) / snr[t]
        return {"loss": (weight[:, None, None, None] * (eps - noise) ** 2).mean()}

    training.run(loss_fn, dict)
    for layer in layers:
        layer.parametrizations["weight"][0].scale = recipe["scale"]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return sum(p.numel() for p in training.parameters), training.log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="may be the same for both methods")
    parser.add_argument("--scale", type=float, default=1.0, help="of a LoRA, as it is merged")
    args = parser.parse_args()
    if args.method == "full" and args.scale != 1:
        parser.error("--scale goes with --method=lora")
    claim(args.work, RECIPE | {"methods": METHODS})
    folder = assets.resolve(BASE)
    recipe = RECIPE | {"method": args.method, "scale": args.scale, **METHODS[args.method]}
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    count, log = train(pipe, recipe, args.work)
    shutil.copytree(folder, args.out, dirs_exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in pipe.unet.state_dict().items()}
    save_file(weights, args.out / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (args.out / "recipe.json").write_text(json.dumps(recipe | {"parameters_trained": count}, indent=2) + "\n")
    pipe = StableDiffusionPipeline.from_pretrained(args.out, torch_dtype=torch.float32)  # what was saved
    pipe.set_progress_bar_config(disable=True)
    save_sheet(sample(pipe, [p for p in PROMPTS for _ in range(8)]), args.work / f"samples_{args.out.name}.png")


if __name__ == "__main__":
    main()
