"""The judge of line drawings and edges."""

import functools

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement, settings_of
from mcm_jax.evaluation.judges.readers import at_size, resize_images
from mcm_jax.modalities import Modality

CAN_BE = "edges (its lines against the edges of the picture)"

_EDGES = {"size": 0, "threshold": metrics.EDGE_THRESHOLD, "tolerance": 1}


_MEANS = (
    "size (of the shorter side, in pixels; 0 as they are), threshold (least gradient of an edge, above 0) or tolerance "
    "(pixels, at least 0), as in edges:size=64,threshold=0.2"
)


def edges(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """F1 of the pictures' edges against the lines, or against a map of lines in one channel.

    Raises:
      UserError: a map of more channels, or a setting that there is not.
    """
    if modality.channels != 1:
        raise UserError(f"--judge={modality.name}={spec}: lines have one channel, {modality.name} {modality.channels}")
    how = settings_of(modality.name, spec, _EDGES, _MEANS)
    if how["size"] < 0 or how["tolerance"] < 0 or not 0 < how["threshold"] < np.inf:
        raise UserError(f"--judge={modality.name}={spec}: expected {_MEANS}")
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
        f"F1 of edges within {how['tolerance']} pixel(s), gradient at least {how['threshold']:g}, "
        f"{at_size((height, width), held_out.images)}"
    )
    return Judge(modality.name, said, judge, ("edge_f1.f1",), ("edge_f1",))
