"""Trains the shipped ``scenes-segmenter`` that judges generated 32x32 scenes, with JAX.

    python tools/train_scenes_segmenter.py --out=mcm_jax/assets/scenes-segmenter --work=runs/scenes-segmenter

Its scenes have another seed than the base model's, so the two are independent. The training pictures are flipped,
blurred, recoloured and made noisy, because generated pictures are a little off too. Expect a mean IoU of 0.97 to 0.98
on held-out scenes, after about 9 minutes of processor time. The recipe below, the score and the log are saved beside
the weights.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcm_jax.data.scenes import CLASSES, Scenes
from mcm_jax.evaluation.metrics import class_iou, confusion_matrix, mean_iou
from mcm_jax.evaluation.segmenter import SegmentationNet, Segmenter, load_segmenter, save_segmenter

SIZE = 32
RECIPE = {
    "images": 6_000,
    "held_out_images": 1_000,
    "data_seed": 1,
    "steps": 1_600,
    "batch": 48,
    "learning_rate": 4e-3,
    "warmup": 100,
    "decay": "cosine to 0",
    "weight_decay": 1e-3,
    "clip_norm": 1.0,
    "loss": "cross-entropy + soft dice over the batch",
    "augmentation": {"flip": 0.5, "blur": 0.6, "gain": 0.1, "shift": 0.1, "noise": 0.08},
    "seed": 0,
}


def _render(split: str, size: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    scene = Scenes(split, size, SIZE, SIZE, seed=RECIPE["data_seed"])[index]
    return np.round((scene["image"] + 1) * 127.5).astype(np.uint8), scene["segmentation"]


def render_all(split: str, size: int, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, uint8 ``[N, 32, 32, 3]`` and ``[N, 32, 32]``, rendered once and kept in the work folder."""
    if not path.exists():
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
            scenes = list(pool.map(_render, [split] * size, [size] * size, range(size), chunksize=100))
        images, labels = (np.stack(part) for part in zip(*scenes, strict=True))
        np.savez(path, images=images, labels=labels)
    with np.load(path) as stored:
        return stored["images"], stored["labels"]


def augment(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flips, blurs, recolours and adds noise, each by its own amount in every picture; ``[B, H, W, 3]`` in [-1, 1]."""
    a = RECIPE["augmentation"]
    flip, blur, gain, shift, level, noise = jax.random.split(key, 6)
    b = len(images)
    flipped = jax.random.bernoulli(flip, a["flip"], (b, 1, 1))
    images = jnp.where(flipped[..., None], images[:, :, ::-1], images)
    labels = jnp.where(flipped, labels[:, :, ::-1], labels)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    soft = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    images += jnp.maximum(jax.random.uniform(blur, (b, 1, 1, 1), minval=-a["blur"], maxval=a["blur"]), 0) * (
        soft - images
    )
    images *= 1 + a["gain"] * jax.random.uniform(gain, (b, 1, 1, 3), minval=-1)
    images += a["shift"] * jax.random.uniform(shift, (b, 1, 1, 3), minval=-1)
    sigma = a["noise"] * jnp.maximum(jax.random.uniform(level, (b, 1, 1, 1), minval=-1), 0)
    images += sigma * jax.random.normal(noise, images.shape)
    return jnp.clip(images, -1, 1), labels


def loss_fn(net: SegmentationNet, params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy, and one minus the classes' mean soft Dice, in which small classes weigh as much as large ones."""
    log_p = jax.nn.log_softmax(net.apply({"params": params}, images))
    truth = jax.nn.one_hot(labels, net.classes)
    p = jnp.exp(log_p)
    dice = (2 * (p * truth).sum((0, 1, 2)) + 1) / (p.sum((0, 1, 2)) + truth.sum((0, 1, 2)) + 1)
    return -(log_p * truth).sum(-1).mean() + 1 - dice.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    r = RECIPE
    images, labels = render_all("train", r["images"], args.work / "train.npz")
    test_images, test_labels = render_all("test", r["held_out_images"], args.work / "test.npz")
    clean = test_images.astype(np.float32) / 127.5 - 1

    net = SegmentationNet(classes=len(CLASSES))
    init_key, root = jax.random.split(jax.random.key(r["seed"]))
    params = jax.jit(net.init)(init_key, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    count = sum(p.size for p in jax.tree.leaves(params))
    rate = optax.warmup_cosine_decay_schedule(0.0, r["learning_rate"], r["warmup"], r["steps"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(r["clip_norm"]), optax.adamw(rate, weight_decay=r["weight_decay"])
    )
    opt_state = optimizer.init(params)
    config = {"classes": CLASSES, "height": SIZE, "width": SIZE, "parameters": count, "recipe": r}
    print(f"{count:,} parameters", flush=True)

    @jax.jit
    def train_step(params, opt_state, step, images, labels):
        images = images.astype(jnp.float32) / 127.5 - 1
        images, labels = augment(jax.random.fold_in(root, step), images, labels)
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(net, params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, began, log, losses = np.random.default_rng(r["seed"]), time.time(), [], []
    order = np.empty(0, np.int64)
    for step in range(r["steps"]):
        if len(order) < r["batch"]:
            order = np.concatenate([order, rng.permutation(len(images))])
        pick, order = order[: r["batch"]], order[r["batch"] :]
        params, opt_state, loss = train_step(params, opt_state, np.int32(step), images[pick], labels[pick])
        losses.append(loss)
        if (step + 1) % 100 == 0:
            few = Segmenter(net, params, config).predict(clean[:256])
            log.append(
                {
                    "step": step + 1,
                    "loss": round(float(np.mean(losses)), 5),
                    "mean_iou_of_256": round(mean_iou(confusion_matrix(few, test_labels[:256], len(CLASSES))), 4),
                    "seconds_per_step": round((time.time() - began) / (step + 1), 3),
                }
            )
            print(log[-1], flush=True)
            losses = []

    save_segmenter(args.out, net, params, config)
    segmenter = load_segmenter(args.out)  # the score is that of the float16 weights
    noisy = np.clip(clean + 0.05 * np.random.default_rng(0).standard_normal(clean.shape, np.float32), -1, 1)
    confusion = confusion_matrix(segmenter.predict(clean), test_labels, len(CLASSES))
    iou = {name: round(float(v), 4) for name, v in zip(CLASSES, class_iou(confusion), strict=True)}
    score = {
        "mean_iou": round(mean_iou(confusion), 4),
        "class_iou": iou,
        "mean_iou_at_noise_0.05": round(
            mean_iou(confusion_matrix(segmenter.predict(noisy), test_labels, len(CLASSES))), 4
        ),
        "images": r["held_out_images"],
        "scenes": f"Scenes('test', {r['held_out_images']}, seed={r['data_seed']})",
    }
    print(json.dumps(score, indent=1), flush=True)
    save_segmenter(args.out, net, params, {**config, "held_out": score})
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


if __name__ == "__main__":
    main()
