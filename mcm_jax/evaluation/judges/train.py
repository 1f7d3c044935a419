"""Trains a judge of labels on pairs: a small U-Net that reads label maps out of pictures (:class:`SegmentationNet`).

Its mean IoU on held-out real pairs is the upper bound of what samples can reach by it. Pictures are flipped, blurred,
recoloured and made noisy, because generated pictures are a little off too.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcm_jax.data import DataSettings
from mcm_jax.data.tfds.records import prepared
from mcm_jax.errors import UserError, expect
from mcm_jax.evaluation.metrics import class_iou, confusion_matrix, mean_iou
from mcm_jax.evaluation.segmenter import SegmentationNet, Segmenter, load_segmenter, save_segmenter
from mcm_jax.files import check_writable, user_path
from mcm_jax.mcm import parameter_count
from mcm_jax.modalities import Modality
from mcm_jax.version import __version__

RECIPE = {
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
"""How a judge is trained: about 10 minutes of processor time at 32x32, and four times that at twice the size."""

LOG = "training_log.jsonl"

_NAMED = {"size": 6_000, "seed": 1}  # of a data set that is drawn: not the pairs that bases (0) and MCMs (2) learn from
_LEAST = 10  # pairs; fewer teach nothing, and leave no tenth to hold out
_WATCHED = 256  # held-out pairs that are looked at while training
_LOG_EVERY = 100  # steps
_GUESSED = 64  # classes; more than that are more likely a map's grey values
_MOST_CLASSES = 2**16


def augment(key: jax.Array, images: jax.Array, labels: jax.Array, by: Mapping) -> tuple[jax.Array, jax.Array]:
    """Flips, blurs, recolours and adds noise, each by its own amount in every picture.

    Args:
      key: of the amounts.
      images: ``[B, H, W, 3]`` in [-1, 1].
      labels: ``[B, H, W]``, flipped with them.
      by: the greatest amounts, ``augmentation`` of :data:`RECIPE`.
    """
    flip, blur, gain, shift, level, noise = jax.random.split(key, 6)
    b = len(images)
    flipped = jax.random.bernoulli(flip, by["flip"], (b, 1, 1))
    images = jnp.where(flipped[..., None], images[:, :, ::-1], images)
    labels = jnp.where(flipped, labels[:, :, ::-1], labels)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    soft = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    amount = jnp.maximum(jax.random.uniform(blur, (b, 1, 1, 1), minval=-by["blur"], maxval=by["blur"]), 0)
    images += amount * (soft - images)
    images *= 1 + by["gain"] * jax.random.uniform(gain, (b, 1, 1, 3), minval=-1)
    images += by["shift"] * jax.random.uniform(shift, (b, 1, 1, 3), minval=-1)
    sigma = by["noise"] * jnp.maximum(jax.random.uniform(level, (b, 1, 1, 1), minval=-1), 0)
    images += sigma * jax.random.normal(noise, images.shape)
    return jnp.clip(images, -1, 1), labels


def loss_fn(net: SegmentationNet, params: Mapping, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy, and one minus the classes' mean soft Dice, in which small classes weigh as much as large ones.

    Both are over the pixels whose label is a class: any other value means unknown.
    """
    log_p = jax.nn.log_softmax(net.apply({"params": params}, images))
    truth = jax.nn.one_hot(labels, net.classes)  # zeros where it is unknown
    known = truth.sum(-1, keepdims=True)
    p = jnp.exp(log_p) * known
    dice = (2 * (p * truth).sum((0, 1, 2)) + 1) / (p.sum((0, 1, 2)) + truth.sum((0, 1, 2)) + 1)
    return -(log_p * truth).sum() / jnp.maximum(known.sum(), 1) + 1 - dice.mean()


def fit(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    watched: tuple[np.ndarray, np.ndarray],
    recipe: Mapping[str, Any] = RECIPE,
    ignore: int = -1,
) -> tuple[Segmenter, list[dict]]:
    """Trains a net.

    Args:
      images: uint8 ``[N, H, W, 3]``.
      labels: integers ``[N, H, W]``.
      classes: their names.
      watched: held-out images and labels, whose mean IoU is printed and logged while training.
      recipe: as :data:`RECIPE`; more in it is kept.
      ignore: the label that means unknown, which is no class; -1 for none.

    Returns:
      The net, whose config has its ``classes``, sizes and the recipe; and the log.
    """
    r = recipe
    height, width = images.shape[1:3]
    net = SegmentationNet(classes=len(classes))
    init_key, root = jax.random.split(jax.random.key(r["seed"]))
    params = jax.jit(net.init)(init_key, jnp.zeros((1, height, width, 3)))["params"]
    warmup = min(r["warmup"], r["steps"] // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, r["learning_rate"], warmup, r["steps"])
    optimizer = optax.chain(
        optax.clip_by_global_norm(r["clip_norm"]), optax.adamw(rate, weight_decay=r["weight_decay"])
    )
    opt_state = optimizer.init(params)
    count = parameter_count(params)
    config = {"classes": list(classes), "height": height, "width": width, "parameters": count, "recipe": dict(r)}
    print(f"{count:,} parameters, {r['steps']} steps", flush=True)

    @jax.jit
    def train_step(params, opt_state, step, images, labels):
        images = images.astype(jnp.float32) / 127.5 - 1
        images, labels = augment(jax.random.fold_in(root, step), images, labels, r["augmentation"])
        loss, grads = jax.value_and_grad(loss_fn, argnums=1)(net, params, images, labels)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with float32
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, began, log, losses = np.random.default_rng(r["seed"]), time.perf_counter(), [], []
    order, shown = np.empty(0, np.int64), as_float(watched[0])
    for step in range(r["steps"]):
        while len(order) < r["batch"]:
            order = np.concatenate([order, rng.permutation(len(images))])
        pick, order = order[: r["batch"]], order[r["batch"] :]
        params, opt_state, loss = train_step(params, opt_state, np.int32(step), images[pick], labels[pick])
        losses.append(loss)
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == r["steps"]:
            seen = score(Segmenter(net, params, config), shown, watched[1], ignore)
            per_step = (time.perf_counter() - began) / (step + 1)
            log.append(
                {
                    "step": step + 1,
                    "loss": round(float(np.mean(losses)), 5),
                    f"mean_iou_of_{len(watched[0])}": seen["mean_iou"],
                    "seconds_per_step": round(per_step, 3),
                }
            )
            print(
                f"step {step + 1} of {r['steps']}: loss {log[-1]['loss']:.3f}, mean IoU of {len(watched[0])} held-out "
                f"pairs {seen['mean_iou']:.3f}, {per_step * (r['steps'] - step - 1) / 60:.1f} minutes left",
                flush=True,
            )
            losses = []
    return Segmenter(net, params, config), log


def as_float(images: np.ndarray) -> np.ndarray:
    """Pictures of 8 bits a value as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def score(segmenter: Segmenter, images: np.ndarray, labels: np.ndarray, ignore: int = -1) -> dict[str, Any]:
    """``mean_iou`` over all pixels of pictures in [-1, 1], and ``class_iou`` by class; None for one that is nowhere.

    Pixels of the label `ignore` are left out.
    """
    found, known = segmenter.predict(images), labels != ignore
    confusion = confusion_matrix(found[known], labels[known], len(segmenter.classes))
    values = zip(segmenter.classes, class_iou(confusion), strict=True)
    return {
        "mean_iou": round(mean_iou(confusion), 4),
        "class_iou": {name: None if np.isnan(v) else round(float(v), 4) for name, v in values},
    }


def save(folder: pathlib.Path, segmenter: Segmenter, log: list[dict]) -> None:
    """Writes a net's folder: its weights, ``config.json`` and the log."""
    save_segmenter(folder, segmenter.net, segmenter.params, segmenter.config)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in log))


def data_of(text: str) -> DataSettings:
    """The data set that a command line names: a folder of pairs or of TFDS, or a name. Raises UserError for others."""
    if (path := user_path(text)).is_dir():
        return DataSettings("tfds" if not (path / "train").exists() and prepared(path) else "folder", text)
    try:
        return DataSettings(text, **_NAMED)
    except UserError as e:
        raise UserError(f"{text}: no such folder of pairs (docs/data.md), nor a data set of this name ({e})") from e


def train(
    data: DataSettings,
    out: str | os.PathLike,
    *,
    modality: str = "segmentation",
    classes: int | Sequence[str] | None = None,
    size: int = 32,
    steps: int = RECIPE["steps"],
    seed: int = RECIPE["seed"],
    flip: bool = True,
    ignore: int = -1,
) -> dict[str, Any]:
    """Trains a judge and writes its folder, whole or not at all.

    Held out are the pairs of the test split; where there is none, those that training an MCM holds out, too.

    Args:
      data: the pairs.
      out: the judge's folder, new or empty.
      modality: which labels.
      classes: how many there are, or their names; None takes what the data set says, or else as many as are found.
      size: pictures are brought to ``size`` x ``size``, by which the judge judges; a multiple of 4.
      steps: of training.
      seed: of the weights, the order and the augmentation.
      flip: whether pictures are mirrored; not where classes know left from right.
      ignore: the label that means unknown, above all classes; such pixels neither teach nor count. -1 for none.

    Returns:
      What ``config.json`` holds; ``held_out`` is the upper bound: ``mean_iou``, ``class_iou``, of how many pairs.

    Raises:
      UserError: bad input; nothing was written.
    """
    expect(size >= 8 and size % 4 == 0, "size", "a multiple of 4, at least 8", size)
    expect(steps >= 1, "steps", "at least 1", steps)
    expect(0 <= seed < 2**32, "seed", "in 0..4294967295", seed)
    out = pathlib.Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; expected a new or an empty folder. Remove it or take another")
    check_writable(out.parent, "--out")
    labels_of = _labels_of(data, modality, classes, ignore)
    ignore = labels_of.ignore
    pairs, test, how = _split(data, labels_of, size)
    names = _class_names(data, modality, classes, [p.labels[p.labels != ignore] for p in (pairs, test)])

    recipe = {**RECIPE, "steps": steps, "seed": seed}
    recipe["augmentation"] = {**RECIPE["augmentation"], **({} if flip else {"flip": 0.0})}
    print(f"{len(pairs.names)} pairs to train on, {len(test.names)} held out ({how}), {len(names)} classes", flush=True)
    watched = test.images[:_WATCHED], test.labels[:_WATCHED]
    if (pairs.labels == ignore).all() or (watched[1] == ignore).all():
        raise UserError(
            f"{data.path or data.name}: no pixel of {modality} has a label, to train on or held out: all are --ignore="
            f"{ignore}"
        )
    segmenter, log = fit(pairs.images, pairs.labels, names, watched, recipe, ignore)
    about = {
        "modality": modality,
        "data": {
            "name": data.name,
            "pairs": len(pairs.names),
            "held_out": how,
            "ignore": ignore,
            "sha256": {"train": pairs.digest(), "held_out": test.digest()},
        },
        "versions": {"mcm_jax": __version__, "jax": jax.__version__},
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        new = pathlib.Path(work) / "judge"
        save(new, segmenter, log)
        segmenter = load_segmenter(new)  # the score is that of the float16 weights
        bound = {**score(segmenter, as_float(test.images), test.labels, ignore), "images": len(test.names)}
        save(new, dataclasses.replace(segmenter, config={**segmenter.config, **about, "held_out": bound}), log)
        new.rename(out)  # an empty folder is replaced
    print(_table(bound))
    return load_segmenter(out).config


def _table(bound: Mapping[str, Any]) -> str:
    lines = [f"mean IoU {bound['mean_iou']:.3f} on {bound['images']} held-out real pairs: the upper bound"]
    for name, value in bound["class_iou"].items():
        lines.append(f"  {name:16}{'in none of these' if value is None else format(value, '.3f')}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What a data set is opened for in place of a base: pictures of one size, no prompts."""

    image_shape: tuple[int, int, int]
    is_text_conditional: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """Pictures uint8 ``[N, H, W, 3]``, labels ``[N, H, W]`` and what each pair is called."""

    names: Sequence[str]
    images: np.ndarray
    labels: np.ndarray

    def digest(self) -> str:
        """SHA-256 of the names and of what the net is shown."""
        sha = hashlib.sha256(json.dumps(list(self.names)).encode())
        for array in (self.images, self.labels.astype(np.int32)):
            sha.update(np.ascontiguousarray(array))
        return sha.hexdigest()


def _labels_of(data: DataSettings, modality: str, classes: int | Sequence[str] | None, ignore: int = -1) -> Modality:
    """The modality that is read; of a folder whose classes are not told with as many as a file can hold."""
    if holds := {m.name: m for m in data.holds}:
        known = {name: m for name, m in holds.items() if m.kind == "labels"}
        if modality not in known:
            raise UserError(
                f"--modality={modality}: {data.name} has no such labels; expected {', '.join(known) or 'other data'}"
            )
        own = known[modality]
        return dataclasses.replace(own, ignore=own.ignore if ignore == -1 else ignore)
    split = pathlib.Path(data.path) / "train"
    if data.name == "folder" and split.is_dir() and not (split / modality).is_dir():
        others = [p.name for p in sorted(split.iterdir()) if p.is_dir() and p.name not in ("image", "caption")]
        raise UserError(
            f"{split / modality}: no such folder, so there are no label maps called {modality!r}; {split} has "
            f"{', '.join(others) or 'none'}. Expected {split / modality / 'NAME.png'} for each picture (docs/data.md), "
            f"or the name of another folder, --modality=NAME"
        )
    expect(ignore == -1 or ignore >= 2, "ignore", "-1 for none, or a value above all classes", ignore)
    if known := data.described(modality):
        ignore = known.ignore if ignore == -1 else ignore
        classes = known.names if classes is None else classes
    most = _MOST_CLASSES if ignore == -1 else ignore
    count = most if classes is None else classes if isinstance(classes, int) else len(classes)
    expect(2 <= count <= _MOST_CLASSES, "classes", f"2 to {_MOST_CLASSES}", count)
    return Modality(modality, "labels", count, ignore)


def _class_names(
    data: DataSettings, modality: str, classes: int | Sequence[str] | None, labels: Sequence[np.ndarray]
) -> tuple[str, ...]:
    known = data.classes(modality)
    if isinstance(classes, int):
        classes = tuple(map(str, range(classes)))
    if known and classes is not None and len(classes) != len(known):
        raise UserError(f"--classes: found {len(classes)}, but {modality} of {data.name} has {len(known)}")
    if classes is not None or known:
        return tuple(classes or known)
    found = np.unique(np.concatenate([np.unique(part) for part in labels]))
    count = int(found.max(initial=0)) + 1
    if count > _GUESSED or count > 2 * len(found) or len(found) < 2:
        shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise UserError(
            f"{data.path}: the pixels of {modality} have {len(found)} values, {shown} (at most {count - 1}), which do "
            f"not look like classes 0, 1, 2, ...; if they are, say how many there are, --classes={max(count, 2)}; if "
            f"one of them means unknown, say which, --ignore=VALUE"
        )
    return tuple(map(str, range(count)))


def _split(data: DataSettings, labels: Modality, size: int) -> tuple[_Pairs, _Pairs, str]:
    """Pairs to train on, those held out, and how they were chosen."""
    pairs = _read(data, "train", labels, size)
    if len(pairs.names) < _LEAST:
        raise UserError(
            f"{data.path or data.name}: {len(pairs.names)} pair(s) are left to train on, expected at least {_LEAST}, "
            f"better some hundreds"
        )
    how = f"{data.held_out_share:.0%}, by a hash of the names" if data.splits_itself() else "the test split"
    return pairs, _read(data, "test", labels, size), how


def _read(data: DataSettings, split: str, labels: Modality, size: int) -> _Pairs:
    card = _Grid((size, size, 3))
    count = max(1, data.size // 6) if split == "test" and data.name != "folder" else None
    source = data.open(split, (labels,), card, size=count)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        examples = list(pool.map(source.__getitem__, range(len(source))))
    names = getattr(source, "names", None) or list(map(str, range(len(examples))))
    images, maps = (np.stack([e[key] for e in examples]) for key in ("image", labels.name))
    return _Pairs(names, images, maps)
