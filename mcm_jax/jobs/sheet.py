"""A contact sheet of jobs: one a row, its conditions, what the base alone makes of it, its picture."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mcm_jax.data.reading import read_image
from mcm_jax.jobs.files import Files
from mcm_jax.jobs.job import Job
from mcm_jax.pipeline import Pipeline

SHEET = "sheet.png"
_MARGIN, _HEADER, _SIDE, _GAP, _LETTERS = 150, 20, 128, 4, 22


def contact_sheet(
    jobs: Sequence[Job],
    files: Files,
    pipeline: Pipeline,
    out: pathlib.Path,
    alone: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Columns the modalities that any job shows, the base alone, and the picture.

    Args:
      jobs: whose pictures are there.
      files: reads their conditions.
      pipeline: knows each job's size.
      out: folder of the pictures, ``OUT/NAME.png``.
      alone: what the base makes of each, uint8 ``[H, W, 3]`` by name.

    Returns:
      uint8 ``[H', W', 3]``, labelled; cells are 128 pixels large, grey where a job does not show a modality.
    """
    names = [name for name in files.known if any(name in job.conditions for job in jobs)]
    columns = [*names, "base alone", "picture"]
    cell = _SIDE + _GAP
    size = _MARGIN + len(columns) * cell, _HEADER + len(jobs) * cell
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(12)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((_MARGIN + column * cell, 3), title, "black", font)
    for row, job in enumerate(jobs):
        top = _HEADER + row * cell
        said = [job.name[:_LETTERS], *(job.prompt[i : i + _LETTERS] for i in range(0, len(job.prompt), _LETTERS))]
        draw.multiline_text((_GAP, top), "\n".join(said[:8]), "black", font)
        height, width = pipeline.sized(job.settings.height, job.settings.width).image_shape[:2]
        cells = [
            files.show(path, name, (height, width))[0] if (path := job.conditions.get(name)) else None for name in names
        ]
        cells += [alone[job.name], np.asarray(read_image(out / f"{job.name}.png"))]
        for column, pixels in enumerate(cells):
            left = _MARGIN + column * cell
            if pixels is None:
                draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), (160, 160, 160))
                continue
            share = _SIDE / max(height, width)
            fitted = max(1, round(width * share)), max(1, round(height * share))
            how = Image.Resampling.NEAREST if share > 1 else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(pixels).resize(fitted, how), (left, top))
    return np.asarray(sheet)
