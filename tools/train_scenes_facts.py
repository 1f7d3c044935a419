"""Trains the shipped ``scenes-facts`` that judges whether generated scenes show their captions' facts, with JAX.

    python tools/train_scenes_facts.py --out=mcm_jax/assets/scenes-facts --work=runs/scenes-facts

Its scenes have another seed than the base models', so they are independent, and are drawn at 64x64 and averaged to
32x32, as samples of 64x64 are when they are judged. The training pictures are flipped, blurred, recoloured and made
noisy, because generated pictures are a little off too. About 2 minutes of processor time. The recipe below, the
accuracy on held-out scenes and the log are saved beside the weights.
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

from mcm_jax.data.scenes import Scenes
from mcm_jax.evaluation.facts import FACTS, FactsJudge, FactsNet, facts_of, load_facts_net, save_facts_net

SIZE = 32
RECIPE = {
    "images": 6_000,
    "held_out_images": 1_000,
    "data_seed": 1,
    "drawn_at": 64,
    "steps": 700,
    "batch": 48,
    "learning_rate": 4e-3,
    "warmup": 100,
    "decay": "cosine to 0",
    "weight_decay": 1e-3,
    "clip_norm": 1.0,
    "loss": "cross-entropy, summed over facts",
    "augmentation": {"flip": 0.5, "blur": 0.6, "gain": 0.05, "shift": 0.05, "noise": 0.08},
    "seed": 0,
}


def _render(split: str, size: int, index: int) -> tuple[np.ndarray, dict]:
    big = RECIPE["drawn_at"]
    scene = Scenes(split, size, big, big, seed=RECIPE["data_seed"])[index]
    image = scene["image"].reshape(SIZE, big // SIZE, SIZE, big // SIZE, 3).mean((1, 3))
    return np.round((image + 1) * 127.5).astype(np.uint8), scene["facts"]


def render_all(split: str, size: int, path: pathlib.Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images uint8 ``[N, 32, 32, 3]`` and facts ``[N]``, rendered once and kept in the work folder."""
    if not path.exists():
        context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
            images, facts = zip(
                *pool.map(_render, [split] * size, [size] * size, range(size), chunksize=100), strict=True
            )
        np.savez(path, images=np.stack(images), **facts_of(facts))
    with np.load(path) as stored:
        return stored["images"], {name: stored[name] for name in FACTS}


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Flips, blurs, recolours and adds noise, each by its own amount in every picture; ``[B, H, W, 3]`` in [-1, 1]."""
    a = RECIPE["augmentation"]
    flip, blur, gain, shift, level, noise = jax.random.split(key, 6)
    b = len(images)
    images = jnp.where(jax.random.bernoulli(flip, a["flip"], (b, 1, 1, 1)), images[:, :, ::-1], images)
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
    return jnp.clip(images, -1, 1)


def loss_fn(net: FactsNet, params: dict, images: jax.Array, facts: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy, summed over the facts."""
    logits = net.apply({"params": params}, images)
    return sum(optax.softmax_cross_entropy_with_integer_labels(v, facts[k]).mean() for k, v in logits.items())


def accuracy(judge: FactsJudge, images: np.ndarray, facts: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of each fact that is right."""
    found = judge.predict(images)
    return {name: round(float((found[name] == facts[name][: len(images)]).mean()), 4) for name in FACTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    r = RECIPE
    images, facts = render_all("train", r["images"], args.work / "train.npz")
    test_images, test_facts = render_all("test", r["held_out_images"], args.work / "test.npz")
    clean = test_images.astype(np.float32) / 127.5 - 1

    net = FactsNet()
    init_key, root = jax.random.split(jax.random.key(r["seed"]))
    params = jax.jit(net.init)(init_key, jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    count = sum(p.size for p in jax.tree.leaves(params))
    rate = optax.warmup_cosine_decay_schedule(0.0, r["learning_rate"], r["warmup"], r["steps"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(r["clip_norm"]), optax.adamw(rate, weight_decay=r["weight_decay"])
    )
    opt_state = optimizer.init(params)
    config = {"height": SIZE, "width": SIZE, "parameters": count, "recipe": r}
    print(f"{count:,} parameters", flush=True)

    @jax.jit
    def train_step(params, opt_state, step, images, facts):
        images = augment(jax.random.fold_in(root, step), images.astype(jnp.float32) / 127.5 - 1)
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(net, params, images, facts)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, began, log, losses = np.random.default_rng(r["seed"]), time.time(), [], []
    order = np.empty(0, np.int64)
    for step in range(r["steps"]):
        if len(order) < r["batch"]:
            order = np.concatenate([order, rng.permutation(len(images))])
        pick, order = order[: r["batch"]], order[r["batch"] :]
        few = {k: v[pick] for k, v in facts.items()}
        params, opt_state, loss = train_step(params, opt_state, np.int32(step), images[pick], few)
        losses.append(loss)
        if (step + 1) % 100 == 0:
            log.append(
                {
                    "step": step + 1,
                    "loss": round(float(np.mean(losses)), 5),
                    "accuracy_of_256": accuracy(FactsJudge(net, params, config), clean[:256], test_facts),
                    "seconds_per_step": round((time.time() - began) / (step + 1), 3),
                }
            )
            print(log[-1], flush=True)
            losses = []

    save_facts_net(args.out, net, params, config)
    judge = load_facts_net(args.out)  # the score is that of the float16 weights
    noisy = np.clip(clean + 0.05 * np.random.default_rng(0).standard_normal(clean.shape, np.float32), -1, 1)
    score = {
        "accuracy": accuracy(judge, clean, test_facts),
        "accuracy_at_noise_0.05": accuracy(judge, noisy, test_facts),
        "images": r["held_out_images"],
        "scenes": f"Scenes('test', {r['held_out_images']}, 64, 64, seed={r['data_seed']}), averaged to 32x32",
    }
    print(json.dumps(score, indent=1), flush=True)
    save_facts_net(args.out, net, params, {**config, "held_out": score})
    (args.out / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


if __name__ == "__main__":
    main()
