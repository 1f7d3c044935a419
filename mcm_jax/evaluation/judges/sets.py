"""The judge of samples as a set: are they like the training pictures, without being copies of them?"""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation import fidelity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.inception import FEATURES, inception_features
from mcm_jax.evaluation.judges.judge import Judge, Judgement, Number
from mcm_jax.evaluation.judges.readers import Reader, at_size, is_net, of_net, resize_images
from mcm_jax.plugins import imported

CAN_BE = (
    "inception:FILE.safetensors (FID proper; docs/evaluation.md says how to have the file), module:function (pictures "
    "to features, floats [N, D]), scenes or emoji (the shipped nets), the folder of a judge of labels, or none"
)

Features = Callable[[np.ndarray], np.ndarray]
"""Pictures, float32 ``[N, H, W, 3]`` in [-1, 1], to features ``[N, D]``."""


def open_features(spec: str, readers: Sequence[Reader]) -> tuple[Features, tuple[int, int] | None, str] | None:
    """The features by which sets of pictures are compared.

    Args:
      spec: see :data:`CAN_BE`; '' takes the first of `readers` that is a net of ours.
      readers: of the labels.

    Returns:
      The features, the pictures' ``(H, W)`` that they take (None for any), and a name for the report; None where sets
      are not compared.

    Raises:
      UserError: they cannot be had.
    """
    if spec == "none":
        return None
    alone = "not of Inception: they compare with each other alone"
    if not spec or is_net(spec):
        seeing = [of_net(spec)] if spec else [r for r in readers if r.features]
        return (seeing[0].features, seeing[0].size, f"the judge {seeing[0].name}, {alone}") if seeing else None
    kind, _, rest = spec.partition(":")
    if kind == "inception" and rest:
        how = (
            f"FID's Inception-v3 ({rest}), of pictures in 8 bits, resized to 299x299 as pytorch-fid does it (bilinear, "
            f"no antialias); FID is null with fewer than {FEATURES + 1:,} pictures on either side: there, read KID"
        )
        return inception_features(rest), None, how
    if not (kind and rest):
        raise UserError(f"--judge=fidelity={spec}: there are no such features; expected {CAN_BE}")
    function = imported("judge", spec, CAN_BE)

    def checked(images: np.ndarray) -> np.ndarray:
        found = function(images)
        floats = np.issubdtype(found.dtype, np.floating) and np.isfinite(found).all()
        if not floats or found.ndim != 2 or len(found) != len(images):
            raise UserError(
                f"--judge=fidelity={spec}: it gave {found.dtype}{list(found.shape)} for pictures {list(images.shape)}; "
                f"expected finite floats [{len(images)}, D]"
            )
        return found

    return checked, None, f"{spec}, {alone}"


def likeness(features: Features, size: tuple[int, int] | None, name: str, held_out: HeldOut, references: int) -> Judge:
    """How like the training pictures samples are, as sets.

    Args:
      features: of pictures.
      size: the pictures' height and width that it takes; None for those of the samples.
      name: whose features these are, for the report.
      held_out: knows the training pictures.
      references: how many of these at most.
    """
    size = size or held_out.images.shape[1:3]
    real = np.concatenate([features(resize_images(part, *size)) for part in held_out.training_images(references)])
    parts = {"fid": fidelity.fid, "kid": fidelity.kid}

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = features(resize_images(images, *size))
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
        f"FID and KID against {len(real)} training pictures, {at_size(size, held_out.images)}, and the median "
        f"distance to the nearest of these, by {real.shape[1]} features of {name}"
    )
    return Judge("fidelity", how, judge, ("fid", "kid", "nearest"), ("fid", "kid", "nearest"), conditional=False)
