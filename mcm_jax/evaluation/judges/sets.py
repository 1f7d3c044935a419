"""The judge of samples as a set: are they like the training pictures, without being copies of them?"""

import contextlib

import numpy as np

from mcm_jax.evaluation import fidelity
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement, Number
from mcm_jax.evaluation.judges.readers import Reader, resize_images


def likeness(reader: Reader, held_out: HeldOut, references: int) -> Judge:
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
