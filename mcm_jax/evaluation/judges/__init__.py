"""Judges: a name and a function from pictures and conditions to numbers. Nothing else knows which there are.

Which judge a modality has is said by a text (``evaluation.judges`` in a config, ``--judge`` of evaluate.py):

* labels: a reader of label maps (:mod:`.readers`): ``scenes``, ``palette:FILE.json``, ``module:function``,
  ``FILE.onnx``, or a folder of ``python -m mcm_jax.evaluation.judges train``. Judged by intersection over union.
* lines: ``edges``, or with its settings, ``edges:size=64,threshold=0.2,tolerance=2``. Judged by F1.
* ``none``: the modality is not judged.

A judge compares on the grid that its reader takes, with conditions that were read or drawn anew for it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mcm_jax.data.scenes import scene_at
from mcm_jax.errors import UserError
from mcm_jax.evaluation import fidelity, metrics
from mcm_jax.evaluation.facts import facts_of, load_facts_net
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.readers import CAN_BE, Reader, open_reader, resize_images
from mcm_jax.modalities import Modality

Number = float | str
"""A number, or in its place a text that says why it is undefined."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge says of some pictures.

    Attributes:
      numbers: by name; a section of numbers, too.
      scores: of each picture, ``[N]``, more is better; NaN where undefined. None where a judge has none.
      within: half of the 95% interval of a number by the pictures at hand, by its name, where it is known.
    """

    numbers: Mapping[str, Number | Mapping[str, Number]]
    scores: np.ndarray | None = None
    within: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges how well pictures follow what they were drawn for.

    Attributes:
      name: of what it judges, e.g. a modality.
      how: by what, for the report.
      judge: gives a :class:`Judgement` of pictures ``[N, H, W, 3]`` in [-1, 1] and, int ``[N]``, the held-out example
        that each was drawn for.
      headline: names of the numbers that stand for all, the most important first, e.g. ``edge_f1.f1``.
      watched: what training's log calls them.
    """

    name: str
    how: str
    judge: Callable[[np.ndarray, np.ndarray], Judgement]
    headline: tuple[str, ...]
    watched: tuple[str, ...]

    def __call__(self, images: np.ndarray, which: np.ndarray) -> Judgement:
        """See :attr:`judge`."""
        return self.judge(images, which)

    def watch(self, images: np.ndarray, which: np.ndarray) -> dict[str, float]:
        """The headline's numbers, as training logs them; what is undefined is NaN."""
        found = flatten(self(images, which).numbers)
        return {
            name: np.nan if isinstance(found[path], str) else found[path]
            for name, path in zip(self.watched, self.headline, strict=True)
        }


def flatten(numbers: Mapping[str, Any]) -> dict[str, Number]:
    """``{"edge_f1.f1": 0.9, ...}`` of numbers in sections."""
    flat = {}
    for name, value in numbers.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def judges_of(held_out: HeldOut, specs: Mapping[str, str], references: int = 0) -> list[Judge]:
    """The judges of a data set's modalities, and of how like its training pictures samples are.

    Args:
      held_out: the examples, whose data set says which judges its modalities have by themselves.
      specs: others, by modality.
      references: training pictures that samples are compared with; 0 for no such comparison.

    Raises:
      UserError: a modality without a judge, or a judge that cannot be had: lists what can be given.
    """
    known = {m.name: m for m in held_out.judged}
    specs = {name: spec for name, spec in specs.items() if spec}
    if unknown := sorted(set(specs) - set(known)):
        raise UserError(
            f"evaluation.judges: {', '.join(unknown)} is no modality here; expected one of {', '.join(known)}"
        )
    chosen = {name: specs.get(name) or held_out.data.judges.get(name, "") for name in known}
    chosen |= {name: "edges" for name, m in known.items() if m.kind == "lines" and not chosen[name]}
    made, readers = [], []
    for name, spec in chosen.items():
        modality = known[name]
        if spec == "none":
            continue
        if not spec:
            raise UserError(
                f"there is no judge of the {modality.kind} {name!r}. Give one, --judge={name}=HOW (while training, "
                f"config.evaluation.judges.{name}): "
                f"{_can_be(modality)}; or --judge={name}=none to leave it out"
            )
        if spec.partition(":")[0] == "edges":
            made.append(_edges(modality, spec, held_out))
        elif modality.kind == "labels":
            reader = open_reader(
                spec,
                channels=modality.channels,
                palette=held_out.data.palette(name),
                names=held_out.data.classes(name),
            )
            readers.append(reader)
            made.append(_labels(modality, reader, held_out))
        else:
            raise UserError(f"--judge={name}={spec}: no judge of {modality.kind}; expected {_can_be(modality)}")
    if held_out.card.is_text_conditional and held_out.data.name == "scenes":
        made.append(_facts(held_out))
    if references and (seeing := [reader for reader in readers if reader.features]):
        made.append(_fidelity(seeing[0], held_out, references))
    return _distinct(made)


def _can_be(modality: Modality) -> str:
    if modality.kind == "labels":
        return CAN_BE
    return "edges (its lines against the edges of the picture)"


def _distinct(judges: list[Judge]) -> list[Judge]:
    """Where two judges give numbers of one name, each has its modality's name before it."""
    names = [judge.headline[0] for judge in judges]
    out = []
    for judge in judges:
        if names.count(judge.headline[0]) == 1:
            out.append(judge)
            continue

        def renamed(images: np.ndarray, which: np.ndarray, judge: Judge = judge) -> Judgement:
            found = judge(images, which)
            return Judgement({f"{judge.name}/{k}": v for k, v in found.numbers.items()}, found.scores)

        more = {key: tuple(f"{judge.name}/{n}" for n in getattr(judge, key)) for key in ("headline", "watched")}
        out.append(dataclasses.replace(judge, judge=renamed, **more))
    return out


def _labels(modality: Modality, reader: Reader, held_out: HeldOut) -> Judge:
    """Intersection over union of the labels that a reader finds."""
    names = reader.classes or tuple(map(str, range(modality.channels)))
    size = reader.size or held_out.images.shape[1:3]
    targets = held_out.at(*size)[modality.name]

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = reader(resize_images(images, *size))
        each = [
            metrics.confusion_matrix(labels, targets[i], modality.channels)
            for labels, i in zip(found, which, strict=True)
        ]
        total = np.sum(each, axis=0)
        values = zip(names, metrics.class_iou(total), strict=True)
        numbers = {
            "miou": float(metrics.mean_iou(total)),
            "class_iou": {n: "in no map and in no picture" if np.isnan(v) else float(v) for n, v in values},
        }
        return Judgement(numbers, np.array([metrics.mean_iou(confusion) for confusion in each]))

    how = f"mean IoU of {modality.channels} classes, read by {reader.name} at {size[0]}x{size[1]}"
    return Judge(modality.name, how, judge, ("miou",), ("mean_iou",))


_EDGES = {"size": 0, "threshold": metrics.EDGE_THRESHOLD, "tolerance": 1}


def _edges(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """F1 of the pictures' edges against the lines."""
    how = dict(_EDGES)
    for part in filter(None, spec.partition(":")[2].split(",")):
        key, _, value = part.partition("=")
        try:
            how[key] = type(_EDGES[key])(value)
        except (KeyError, ValueError) as e:
            raise UserError(
                f"--judge={modality.name}={spec}: found {part!r}, expected size (of the shorter side, in pixels), "
                f"threshold (least gradient of an edge) or tolerance (pixels), as in edges:size=64,threshold=0.2"
            ) from e
    height, width = held_out.images.shape[1:3]
    if how["size"]:
        factor = how["size"] / min(height, width)
        height, width = round(height * factor), round(width * factor)
    lines = held_out.at(height, width)[modality.name]
    measure = functools.partial(metrics.edge_f1, tolerance=how["tolerance"], threshold=how["threshold"])

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        images = resize_images(images, height, width)
        numbers = {k: float(v) for k, v in measure(images, lines[which]).items()}
        scores = [measure(images[i : i + 1], lines[j : j + 1])["f1"] for i, j in enumerate(which)]
        return Judgement({"edge_f1": numbers}, np.array(scores))

    said = (
        f"F1 of edges within {how['tolerance']} pixel(s), gradient at least {how['threshold']:g}, at {height}x{width}"
    )
    return Judge(modality.name, said, judge, ("edge_f1.f1",), ("edge_f1",))


def _facts(held_out: HeldOut) -> Judge:
    """Whether scenes show what their captions say."""
    net = load_facts_net()
    size = net.config["height"], net.config["width"]
    told = facts_of([scene_at(held_out.data.seed, "test", i).facts for i in range(len(held_out))])

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        seen = net.predict(resize_images(images, *size))
        right = {fact: seen[fact] == told[fact][which] for fact in told}
        shares = {fact: float(holds.mean()) for fact, holds in right.items()}
        numbers = shares | {"mean": sum(shares.values()) / len(shares)}
        return Judgement({"facts": numbers}, np.mean(list(right.values()), axis=0))

    return Judge("caption", "share of the caption's facts, read by a net", judge, ("facts.mean",), ("facts",))


def _fidelity(reader: Reader, held_out: HeldOut, references: int) -> Judge:
    """How like the training pictures samples are, as sets, by the features of a net that reads labels."""
    size = reader.size or held_out.images.shape[1:3]
    real = reader.features(held_out.training_images(*size, references))
    parts = {"fid": fidelity.fid, "kid": fidelity.kid}

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = reader.features(resize_images(images, *size))
        numbers: dict[str, Number] = {}
        within = {}
        for name, distance in parts.items():
            try:
                numbers[name] = distance(found, real)
            except ValueError as e:  # too few pictures: how many are needed
                numbers[name] = str(e)
                continue
            with contextlib.suppress(ValueError):  # enough for the number, but not for what a jackknife leaves
                within[name] = fidelity.interval(distance, found, real)
        numbers["nearest"] = float(np.median(fidelity.nearest(found, real)))
        return Judgement(numbers, within=within)

    how = (
        f"FID and KID against {len(real)} training pictures, and the median distance to the nearest of these, by "
        f"{real.shape[1]} features of the judge {reader.name}, not of Inception: they compare with each other alone"
    )
    return Judge("fidelity", how, judge, ("fid", "kid", "nearest"), ("fid", "kid", "nearest"))
