"""Trains the shipped base ``scenes-sd``: a miniature Stable Diffusion on captioned 64x64 scenes, with PyTorch.

    python -m tools.train_scenes_sd --out=mcm_jax/assets/scenes-sd --work=runs/scenes-sd

First the autoencoder (64x64x3 to 16x16x4), then text encoder and U-Net together on its latents. Both see images and
captions only, never a segmentation or a sketch. A run that was stopped goes on from ``--work``; a finished one only
saves and measures again. The recipe below, what was measured on held-out scenes (``recipe.json``) and the log
(``training_log.jsonl``) are saved beside the weights. Whether samples follow their captions is measured where the
facts net (``tools/train_scenes_facts.py``) is there. About 55 minutes on 2 CPU cores with bfloat16 instructions.
"""

import argparse
import concurrent.futures
import copy
import json
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mcm_jax.data.scenes import Scenes, scene_at
from tools.work import claim

SIZE = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
RECIPE = {
    "images": 10_000,
    "data_seed": 0,
    "flip": True,
    "autocast": "bfloat16",
    "seed": 0,
    "vae_training": {
        "steps": 1_500,
        "batch": 16,
        "learning_rate": 1.5e-3,
        "warmup": 100,
        "decay": "cosine to 0",
        "adam_betas": [0.9, 0.99],
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "loss": "L1 + MSE + edges_weight * L1 of differences of neighbours + kl_weight * KL (a mean of latents)",
        "edges_weight": 0.5,
        "kl_weight": 1e-4,
    },
    "unet_training": {
        "steps": 2_900,
        "batch": 48,
        "learning_rate": 8e-4,
        "warmup": 200,
        "decay": "cosine to 0",
        "adam_betas": [0.9, 0.99],
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "ema": 0.998,
        "loss": "eps, min-SNR-5 weighting",
        "empty_prompts": 0.12,
    },
    "vae": {
        "sample_size": SIZE,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [32, 48, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    },
    "text_encoder": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "projection_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "hidden_act": "quick_gelu",
    },
    "unet": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": [64, 96, 128],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 96,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "sampling": {"guidance_scale": 3.0, "num_inference_steps": 25},
}
WORDS = (
    *("a", "mountain", "lake", "meadow", "at", "by", "dawn", "day", "sunset", "night", "with", "and", "sun", "moon"),
    *("one", "two", "three", "four", "five", "tree", "trees"),
)
"""Every word of the captions."""
PROMPTS = (
    "a mountain lake at sunset with three trees",
    "a mountain meadow at night with a moon",
    "a mountain lake by day with a sun",
    "a mountain meadow by day with five trees and a sun",
    "a mountain lake at dawn",
    "a mountain meadow at sunset with one tree and a sun",
    "a mountain lake at night with two trees and a moon",
    "a mountain meadow at dawn with four trees",
)


def _render(split: str, size: int, index: int) -> tuple[np.ndarray, str]:
    scene = Scenes(split, size, SIZE, SIZE, seed=RECIPE["data_seed"])[index]
    return np.round((scene["image"] + 1) * 127.5).astype(np.uint8), scene["caption"]


def render_all(split: str, size: int, path: pathlib.Path) -> tuple[torch.Tensor, list[str]]:
    """Images (uint8 ``[N, 3, 64, 64]``) and their captions, rendered once and kept in the work folder."""
    if not path.exists():
        with concurrent.futures.ProcessPoolExecutor() as pool:
            scenes = list(pool.map(_render, [split] * size, [size] * size, range(size), chunksize=100))
        images, captions = zip(*scenes, strict=True)
        np.savez(path, images=np.stack(images), captions=np.array(captions))
    with np.load(path) as stored:
        images = torch.from_numpy(stored["images"]).permute(0, 3, 1, 2)
        return images.contiguous(memory_format=torch.channels_last), stored["captions"].tolist()


def build_tokenizer(folder: pathlib.Path) -> CLIPTokenizer:
    """A CLIP tokenizer that makes one token of each caption word and byte-level pieces of any other text.

    ``vocab.json`` and ``merges.txt`` are written into ``folder``, in CLIP's format.
    """
    symbols = sorted(ByteLevel.alphabet())
    vocab = [*symbols, *(s + "</w>" for s in symbols)]
    merges = []
    for word in WORDS:  # grown letter by letter, from the left
        token, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            if (token, piece) not in merges:
                merges.append((token, piece))
                vocab.append(token + piece)
            token += piece
    vocab = {token: i for i, token in enumerate([*vocab, BOS, EOS])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    length = RECIPE["text_encoder"]["max_position_embeddings"]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder, with random weights."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **RECIPE["text_encoder"]
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as the pipeline makes them, ``[N, length]``."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Training:
    """What both trainings share: optimizer, learning rate, log, and checkpoints from which to go on.

    Args:
      name: names the part in the log and the checkpoint's file.
      recipe: the part of :data:`RECIPE`.
      nets: the modules that learn.
      averaged: an average of each module's weights, or nothing.
      work: the folder of checkpoints.
    """

    def __init__(
        self, name: str, recipe: dict, nets: list[torch.nn.Module], averaged: list[torch.nn.Module], work: pathlib.Path
    ):
        self.name, self.recipe, self.nets, self.averaged = name, recipe, nets, averaged
        self.file, self.step, self.log = work / f"{name}.pt", 0, []
        self.parameters = [p for net in nets for p in net.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            recipe["learning_rate"],
            betas=tuple(recipe["adam_betas"]),
            weight_decay=recipe["weight_decay"],
        )
        print(f"{name}: {sum(p.numel() for p in self.parameters):,} parameters", flush=True)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for net, weights in zip([*nets, *averaged], state["nets"], strict=True):
                net.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.log = state["step"], state["log"]

    def save(self) -> None:
        nets = [net.state_dict() for net in (*self.nets, *self.averaged)]
        state = {"nets": nets, "optimizer": self.optimizer.state_dict(), "step": self.step, "log": self.log}
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").rename(self.file)

    def run(
        self, loss_fn: Callable[[torch.Generator], dict[str, torch.Tensor]], look: Callable[[], dict], every: int = 400
    ) -> None:
        """Trains to the end. ``loss_fn`` returns ``loss`` and other numbers to log; ``look`` judges, each ``every``."""
        r, began, start, numbers = self.recipe, time.time(), self.step, []
        while self.step < r["steps"]:
            rng = torch.Generator().manual_seed(1_000_003 * (RECIPE["seed"] + 1) + self.step)
            parts = loss_fn(rng)
            rate = min((self.step + 1) / r["warmup"], 0.5 + 0.5 * math.cos(math.pi * self.step / r["steps"]))
            for group in self.optimizer.param_groups:
                group["lr"] = r["learning_rate"] * rate
            self.optimizer.zero_grad(set_to_none=True)
            parts["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, r["clip_norm"])
            self.optimizer.step()
            if self.averaged:
                decay = min(r["ema"], (1 + self.step) / (10 + self.step))
                mean = [p for net in self.averaged for p in net.parameters()]
                with torch.no_grad():
                    for p, q in zip(mean, self.parameters, strict=True):
                        p.lerp_(q, 1 - decay)
            self.step += 1
            numbers.append({k: v.item() for k, v in parts.items()})
            judge = self.step % every == 0 or self.step == r["steps"]
            if self.step % 50 == 0 or judge:
                line = {k: round(float(np.mean([n[k] for n in numbers])), 5) for k in parts}
                seconds = (time.time() - began) / (self.step - start)
                line = {"part": self.name, "step": self.step, **line, "seconds_per_step": round(seconds, 3)}
                self.log.append(line | (look() if judge else {}))
                print(self.log[-1], flush=True)
                numbers = []
            if self.step % 200 == 0 or judge:
                self.save()


def flipped(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirrors half of the images ``[B, C, H, W]``; a caption stays true of a mirrored scene."""
    return torch.where(torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5, images.flip(-1), images)


def moments(vae: AutoencoderKL, x: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior of images ``[B, 3, 64, 64]``, computed in bfloat16, in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        parameters = vae.encode(x).latent_dist.parameters
    return DiagonalGaussianDistribution(parameters.float())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Float32 reconstructions of uint8 images ``[N, 3, 64, 64]``, clipped, and the mean over images of their PSNR."""
    found = []
    for part in images.split(32):
        found.append(vae.decode(vae.encode(part.float() / 127.5 - 1).latent_dist.mode()).sample.clamp(-1, 1))
    found = torch.cat(found)
    error = (found - (images.float() / 127.5 - 1)).square().mean((1, 2, 3)) / 4  # of values in [0, 1]
    return found, float(-10 * error.log10().mean())


def save_sheet(x: torch.Tensor, path: pathlib.Path, columns: int = 8) -> None:
    """Saves images ``[N, 3, H, W]`` in [-1, 1] as one picture, enlarged."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    n, h, w, _ = x.shape
    x = x.reshape(n // columns, columns, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(n // columns * h, columns * w, 3)
    Image.fromarray(x.repeat(2, 0).repeat(2, 1)).save(path)


def train_vae(images: torch.Tensor, held_out: torch.Tensor, work: pathlib.Path) -> tuple[AutoencoderKL, list[dict]]:
    r = RECIPE["vae_training"]
    torch.manual_seed(RECIPE["seed"])
    vae = AutoencoderKL(**RECIPE["vae"]).to(memory_format=torch.channels_last)
    training = Training("vae", r, [vae], [], work)

    def loss_fn(rng: torch.Generator) -> dict[str, torch.Tensor]:
        x = flipped(images[torch.randint(len(images), (r["batch"],), generator=rng)].float() / 127.5 - 1, rng)
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = moments(vae, x)
        with torch.autocast("cpu", torch.bfloat16):
            y = vae.decode(posterior.sample(rng)).sample
        difference = y.float() - x
        absolute, square = difference.abs().mean(), difference.square().mean()
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {
            "loss": absolute + square + r["edges_weight"] * edges + r["kl_weight"] * kl,
            "absolute": absolute,
            "square": square,
            "kl": kl,
        }

    def look() -> dict:
        found, psnr = reconstruct(vae, held_out[:64])
        pairs = torch.stack([held_out[:32].float() / 127.5 - 1, found[:32]], 1).flatten(0, 1)
        save_sheet(pairs, work / "reconstructions.png")
        return {"psnr_of_64": round(psnr, 2)}

    training.run(loss_fn, look)
    return vae.eval().requires_grad_(False), training.log


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, path: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of latents, ``[2, N, 4, 16, 16]`` each (the second half of mirrored images)."""
    if not path.exists():
        found = []
        for mirrored in (False, True):
            for part in images.split(64):
                x = part.float() / 127.5 - 1
                posterior = moments(vae, x.flip(-1) if mirrored else x)
                found.append(torch.stack([posterior.mean, posterior.std]))
        found = torch.cat(found, 1).unflatten(1, (2, len(images)))
        torch.save(found.contiguous(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return tuple(torch.load(path, weights_only=True))


def pipeline(vae, text, tokenizer, unet) -> StableDiffusionPipeline:
    found = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**RECIPE["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    found.set_progress_bar_config(disable=True)
    return found


def sample(pipe: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """One image a prompt, ``[N, 3, 64, 64]`` in [-1, 1]; its noise depends on its number alone."""
    rngs = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipe(list(prompts), generator=rngs, output_type="pt", **RECIPE["sampling"]).images
    return images.float() * 2 - 1


def train_unet(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, images: torch.Tensor, captions: list[str], work: pathlib.Path
) -> tuple[CLIPTextModel, UNet2DConditionModel, list[dict]]:
    r = RECIPE["unet_training"]
    means, deviations = encode_all(vae, images, work / "latents.pt")
    spread = (means.var() + deviations.square().mean()).sqrt()  # of samples of the latents, about the mean of all
    vae.register_to_config(scaling_factor=round(1 / spread.item(), 5))
    tokens = token_ids(tokenizer, captions)
    empty = token_ids(tokenizer, [""])
    torch.manual_seed(RECIPE["seed"])
    text, unet = text_model(tokenizer), UNet2DConditionModel(**RECIPE["unet"]).to(memory_format=torch.channels_last)
    averaged = [copy.deepcopy(net).requires_grad_(False).eval() for net in (text, unet)]
    training = Training("unet", r, [text, unet], averaged, work)
    scheduler = DDIMScheduler(**RECIPE["scheduler"])
    abar = scheduler.alphas_cumprod
    snr = abar / (1 - abar)

    def loss_fn(rng: torch.Generator) -> dict[str, torch.Tensor]:
        pick = torch.randint(len(captions), (r["batch"],), generator=rng)
        mirrored = torch.randint(2, (r["batch"],), generator=rng)
        z = torch.randn(r["batch"], *means.shape[2:], generator=rng)
        z = vae.config.scaling_factor * (means[mirrored, pick] + deviations[mirrored, pick] * z)
        ids = torch.where(torch.rand(len(z), 1, generator=rng) < r["empty_prompts"], empty, tokens[pick])
        t = torch.randint(len(abar), (len(z),), generator=rng)
        noise = torch.randn(z.shape, generator=rng)
        x = scheduler.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            eps = unet(x, t, text(ids).last_hidden_state).sample
        weight = snr[t].clamp(max=5) / snr[t]
        return {"loss": (weight[:, None, None, None] * (eps.float() - noise) ** 2).mean()}

    def look() -> dict:
        with torch.autocast("cpu", torch.bfloat16):
            found = sample(pipeline(vae, averaged[0], tokenizer, averaged[1]), PROMPTS * 2)
        save_sheet(found, work / f"samples_{training.step:05d}.png")
        return {}

    training.run(loss_fn, look)
    return *averaged, training.log


def measure_facts(pipe: StableDiffusionPipeline, count: int = 128) -> dict:
    """The share of samples that a facts net finds to show what their held-out captions say."""
    from mcm_jax.evaluation.facts import facts_of, load_facts_net

    net = load_facts_net()
    scenes = [scene_at(2, "test", i) for i in range(count)]
    truth = facts_of([s.facts for s in scenes])
    real = np.stack([Scenes("test", count, SIZE, SIZE, seed=2)[i]["image"] for i in range(count)])
    drawn = sample(pipe, [s.caption for s in scenes]).permute(0, 2, 3, 1).numpy()
    right = {"captions": f"of Scenes('test', {count}, seed=2)", **RECIPE["sampling"]}
    for name, images, wanted in (
        ("samples", drawn, truth),
        ("real_scenes", real, truth),
        ("samples_of_other_captions", drawn, {k: np.roll(v, 1) for k, v in truth.items()}),
    ):
        found = net.predict(images.reshape(count, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4)))
        right[name] = {k: round(float((found[k] == wanted[k]).mean()), 4) for k in wanted}
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    claim(args.work, RECIPE)
    images, captions = render_all("train", RECIPE["images"], args.work / "train.npz")
    held_out, _ = render_all("test", 256, args.work / "test.npz")
    vae, vae_log = train_vae(images, held_out, args.work)
    tokenizer = build_tokenizer(args.work / "tokenizer")
    text, unet, unet_log = train_unet(vae, tokenizer, images, captions, args.work)
    pipeline(vae.half(), text.half(), tokenizer, unet.half()).save_pretrained(args.out)
    for name in ("vocab.json", "merges.txt"):  # for readers of Stable Diffusion folders other than transformers
        (args.out / "tokenizer" / name).write_bytes((args.work / "tokenizer" / name).read_bytes())
    for weights in args.out.rglob("*.safetensors"):  # saved so that only their owner can read them
        weights.chmod(0o644)
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in vae_log + unet_log))

    # What is measured is what was saved.
    pipe = StableDiffusionPipeline.from_pretrained(args.out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    nets = {"vae": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}
    report = {
        **RECIPE,
        "parameters": {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()},
        "held_out_psnr": round(reconstruct(pipe.vae, held_out)[1], 2),
    }
    save_sheet(sample(pipe, [p for p in PROMPTS for _ in range(8)]), args.work / "samples.png")
    try:
        report["facts_right"] = measure_facts(pipe)
    except FileNotFoundError as e:
        print(f"facts are not measured: {e}", flush=True)
    (args.out / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
