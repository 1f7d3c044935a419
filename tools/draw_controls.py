"""Draws docs/controls.png: what each control of sampling does, with the shipped MCMs.

python -m tools.draw_controls --out=docs/controls.png
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mcm_jax import Pipeline, sampling
from mcm_jax.modalities import read_png
from mcm_jax.pictures import save_png, to_uint8

EXAMPLES = pathlib.Path("docs/examples")
CELL, LEFT, TOP = 96, 190, 14
PROMPT = "a mountain lake at sunset with three trees and a sun"


def conditions_of(pipeline: Pipeline, count: int, **size: int) -> dict[str, np.ndarray]:
    """The examples' conditions, the same for each sample."""
    grid = pipeline.grid_for(pipeline.sized(**size))
    found = {m.name: m.fit(read_png(EXAMPLES / f"{m.name}.png", m), *grid) for m in pipeline.modalities}
    return {name: np.repeat(value[None], count, axis=0) for name, value in found.items()}


def rows_of_scenes() -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Of scenes-mcm, five samples of one noise a row, each with its words."""
    pipeline = Pipeline.from_folder("scenes-mcm")
    count, rows = 5, []
    keys = jnp.repeat(sampling.sample_keys(4, 1), count)
    both = conditions_of(pipeline, count)
    map_alone = {"segmentation": both["segmentation"]}
    how = dict(batch_size=count, sampler="dpm++2m", steps=16, spacing="trailing")

    def add(title: str, words: list[str], given: dict[str, np.ndarray], **more: object) -> np.ndarray:
        images = pipeline(given, keys, **how | more)
        rows.append((title, list(zip(words, images, strict=True))))
        return images

    add("guidance", ["0", "0.5", "1", "2", "4"], both, guidance=[0, 0.5, 1, 2, 4])
    strengths = np.array([0, 0.25, 0.5, 1, 1.5])
    words = [f"{s:g}" for s in strengths]
    add("strength of the segmentation\n(by itself)", words, map_alone, strength={"segmentation": strengths})
    windows = [(0, 0.25), (0, 0.5), (0.25, 0.75), (0.5, 1), (0, 1)]
    words = [f"{a:g} to {b:g}" for a, b in windows]
    add("start, end", words, both, start=[a for a, _ in windows], end=[b for _, b in windows])
    add("window of the segmentation\n(beside the sketch)", words, both, window={"segmentation": np.array(windows)})
    schedules = [(1.0,), (2.0, 0.0), (0.0, 2.0), (2.0, 0.0, 2.0), (0.0, 2.0, 0.0)]
    add("guidance_schedule", [",".join(f"{x:g}" for x in s) for s in schedules], both, guidance_schedule=schedules)
    mask = np.ones((count, *pipeline.base.latent_shape[:2]), np.float32)
    half = mask.shape[2] // 2
    mask[1, :, :half], mask[2, :, half:], mask[3, :half], mask[4] = 0, 0, 0, 0
    add("mask: where it acts", ["everywhere", "right", "left", "below", "nowhere"], both, mask=mask)
    picture = np.clip(pipeline(map_alone, jnp.repeat(sampling.sample_keys(9, 1), count), **how), -1, 1)
    images = [picture[0]]
    for share in (0.4, 0.6, 0.8, 1.0):
        images.append(pipeline({}, keys, guidance=0, image=picture, image_strength=share, **how)[0])
    rows.append(
        ("image, image_strength\n(the base alone)", list(zip(["image", "0.4", "0.6", "0.8", "1"], images, strict=True)))
    )
    anew = np.zeros((count, *pipeline.base.image_shape[:2]), bool)
    anew[1, :, :half], anew[2, :, half:], anew[3, :half], anew[4, 8:24, 8:24] = True, True, True, True
    painted = pipeline(both, keys, image=picture, inpaint=anew, image_strength=1.0, **how)
    rows.append(("inpaint", list(zip(["image", "left", "right", "above", "middle"], painted, strict=True))))
    noise, other = (
        sampling.initial_noise(jnp.repeat(sampling.sample_keys(s, 1), count), pipeline.base.latent_shape)
        for s in (4, 5)
    )
    shares = jnp.array([0, 0.25, 0.5, 0.75, 1])
    add(
        "variation to another seed", [f"{s:g}" for s in shares], map_alone, latents=sampling.slerp(noise, other, shares)
    )
    return rows


def rows_of_text() -> list[tuple[str, list[tuple[str, np.ndarray]]]]:
    """Of scenes-sd-mcm."""
    pipeline = Pipeline.from_folder("scenes-sd-mcm")
    count, rows = 5, []
    keys = jnp.repeat(sampling.sample_keys(4, 1), count)
    both = conditions_of(pipeline, count)
    how = dict(batch_size=count, sampler="dpm++2m", steps=16, spacing="trailing")
    scales = [1.0, 2.0, 3.0, 5.0, 7.5]
    prompts = [PROMPT] * count
    images = pipeline(both, keys, prompts=prompts, text_guidance=scales, **how)
    rows.append(("text_guidance", list(zip([f"{s:g}" for s in scales], images, strict=True))))
    images = pipeline(both, keys, prompts=prompts, text_guidance=7.5, text_rescale=[0, 0.25, 0.5, 0.75, 1], **how)
    rows.append(("text_rescale at 7.5", list(zip(["0", "0.25", "0.5", "0.75", "1"], images, strict=True))))
    images = [
        pipeline(both, keys, prompts=[text] * count, modulate=where, guidance=g, **how)[0]
        for where, text, g in (
            ("before_cfg", PROMPT, 1.0),
            ("after_cfg", PROMPT, 1.0),
            ("before_cfg", "", 1.0),
            ("prompt_only", "", 0.5),
            ("prompt_only", "", 1.0),
        )
    ]
    words = ["before_cfg", "after_cfg", "before, no prompt", "prompt_only 0.5,\nno prompt", "prompt_only 1,\nno prompt"]
    rows.append(("modulate", list(zip(words, images, strict=True))))
    return rows


def sheet(rows: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> np.ndarray:
    """All rows with their words, uint8 ``[H, W, 3]``."""
    height = CELL + 2 * TOP
    canvas = Image.new("RGB", (LEFT + 5 * (CELL + 6), len(rows) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (title, cells) in enumerate(rows):
        pen.multiline_text((4, i * height + 40), title, fill="black")
        for j, (words, image) in enumerate(cells):
            place = LEFT + j * (CELL + 6), i * height
            pen.multiline_text((place[0], place[1] + 1), words, fill="black")
            picture = Image.fromarray(to_uint8(image)).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(picture, (place[0], place[1] + 2 * TOP - 2))
    return np.asarray(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    save_png(args.out, sheet(rows_of_scenes() + rows_of_text()))


if __name__ == "__main__":
    main()
