"""Writes docs/examples: a held-out scene's conditions as a user would have them, 256x256 PNGs.

python -m tools.make_examples
"""

import pathlib

import numpy as np
from PIL import Image

from mcm_jax.data.scenes import PALETTE, Scenes
from mcm_jax.pictures import save_png, to_uint8

INDEX = 32


def main() -> None:
    folder = pathlib.Path("docs/examples")
    example = Scenes("test", INDEX + 1, 256, 256, seed=2)[INDEX]
    folder.mkdir(parents=True, exist_ok=True)
    # A palette picture: the pixel values are the classes, and a viewer still shows colours.
    labels = Image.fromarray(example["segmentation"])
    labels.putpalette(PALETTE.tobytes())
    labels.save(folder / "segmentation.png")
    save_png(folder / "sketch.png", np.round(example["sketch"] * 255).astype(np.uint8))
    save_png(folder / "scene.png", to_uint8(example["image"]))


if __name__ == "__main__":
    main()
