"""Condition files in, samples out: what sample.py does."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mcm_jax import assets, config, pictures
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.jobs import TEXT, Drawer, Job


def generate(
    workdir: str,
    conditions: Mapping[str, str],
    out: str | os.PathLike,
    *,
    num_samples: int = 8,
    seed: int = 0,
    prompt: str | None = None,
    base: str | None = None,
    accept_base: bool = False,
    **changes: Any,
) -> np.ndarray:
    """Samples images for one set of conditions and writes them.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      conditions: picture file of each modality that is given, at least one. Labels may be in the colours of the data
        set's classes, which the workdir has.
      out: folder; gets ``sample_000.png`` ..., ``grid.png`` (the conditions, then the samples) and
        ``samples.json``, which holds every argument.
      num_samples: how many, at least 1.
      seed: of the noise, at least 0.
      prompt: for a text-conditional base; None is the empty one.
      base: another place of the base, or with ``accept_base`` a fine-tune of it, as :class:`mcm_jax.jobs.Drawer` has.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that shall differ from the config's; None is as
        there.

    Returns:
      The samples, float32 ``[num_samples, H, W, 3]``.

    Raises:
      UserError: bad input; nothing was written.
    """
    if not conditions:
        raise UserError(
            "no condition given; pass --segmentation=PNG, --sketch=PNG, --condition=NAME=PICTURE, or several"
        )
    drawer = Drawer(workdir, base, accept_base, **changes)
    if prompt is not None:
        drawer.check_text(["prompt"], "--")
    expect(num_samples >= 1, "num_samples", "at least 1", num_samples)
    expect(0 <= seed < 2**32, "seed", "in 0..4294967295", seed)
    if unknown := sorted(conditions.keys() - drawer.known.keys()):
        raise UserError(f"the MCM {workdir!r} knows {', '.join(drawer.known)}, not {', '.join(unknown)}")
    size = drawer.pipeline.base.image_shape[:2]
    shown = []
    for name, path in sorted(conditions.items()):
        large = drawer.known[name].fit(drawer.read(path, name), *size)[None]
        shown.append(pictures.show(drawer.known[name], large, drawer.data.palette(name, assets.resolve(workdir))))
    settings = drawer.settings
    if changes.get("batch_size") is None:
        settings = settings.but(batch_size=min(num_samples, settings.batch_size))
    jobs = [Job(f"sample_{i:03d}", conditions, settings, seed, i, prompt) for i in range(num_samples)]

    out = pathlib.Path(out)
    check_writable(out, "--out")
    records = [drawer.record(job) for job in jobs]
    images = drawer.sample(jobs)

    values = pictures.to_uint8(images)
    strip = np.concatenate([*shown, values])
    columns = min(len(strip), 9)
    strip = np.concatenate([strip, np.full((-len(strip) % columns, *strip.shape[1:]), 255, np.uint8)])
    record = records[0] | {
        "num_samples": num_samples,
        "prompt": prompt,
        **dataclasses.asdict(settings),
        "config": json.loads((assets.resolve(workdir) / config.FILE).read_text()),
    }
    try:
        for earlier in out.glob("sample_*.png"):  # of another run into this folder
            earlier.unlink()
        for job, image, said in zip(jobs, values, records, strict=True):
            pictures.save_png(out / f"{job.name}.png", image, {TEXT: json.dumps(said)})
        rows = [strip[i : i + columns] for i in range(0, len(strip), columns)]
        pictures.save_png(out / "grid.png", pictures.grid(rows))
        write_atomically(out / "samples.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); take another --out") from e
    print(f"{num_samples} samples, grid.png and samples.json are in {out}")
    return images
