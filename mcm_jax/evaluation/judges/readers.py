"""temporary"""

import dataclasses

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation.segmenter import load_segmenter


@dataclasses.dataclass(frozen=True)
class Reader:
    name: str
    read: object
    size: object
    classes: object
    features: object = None

    def __call__(self, images):
        return self.read(images)


def resize_images(images, height, width):
    n, h, w, _ = images.shape
    if (h, w) == (height, width):
        return images
    f = h // height
    return images.reshape(n, height, f, width, f, 3).mean(axis=(2, 4))


def open_reader(spec, *, channels, palette=None, names=None):
    if spec == "scenes":
        s = load_segmenter()
        return Reader("scenes", s.predict, (32, 32), s.classes)
    if spec == "palette":
        return Reader(
            "palette", lambda x: np.argmin((((x[..., None, :] + 1) * 127.5 - palette) ** 2).sum(-1), -1), None, names
        )
    raise UserError(spec)
