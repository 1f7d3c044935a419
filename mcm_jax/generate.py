"""Condition files in, samples out: what sample.py does."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mcm_jax import assets, config, pictures
from mcm_jax.engine import Progress
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.jobs import CONTROLS, TEXT, Drawer, Job
from mcm_jax.jobs.intermediates import Intermediates
from mcm_jax.jobs.job import check_typed
from mcm_jax.jobs.record import check_target, is_ours
from mcm_jax.jobs.watch import PREVIEW, Watch

_WAY_OUT = "take less guidance and strength, or float32"


def generate(
    workdir: str | Sequence[str],
    conditions: Mapping[str, str],
    out: str | os.PathLike,
    *,
    num_samples: int = 8,
    show_base: bool = False,
    intermediates: int = 0,
    preview_every: int = 0,
    base: str | None = None,
    accept_base: bool = False,
    **changes: Any,
) -> np.ndarray:
    """Samples images for one set of conditions and writes them.

    Args:
      workdir: of a training run, or the name of a shipped MCM; or several, of MCMs of one base that act together.
      conditions: picture file of each modality that is given, at least one. Labels may be in the colours of the data
        set's classes, which the workdir has.
      out: folder; gets ``sample_000.png`` ..., ``grid.png`` (the conditions, then the samples) and
        ``samples.json``, which holds every argument.
      num_samples: how many, at least 1.
      show_base: the grid has, below each sample, what the base alone makes of the same noise and prompt.
      intermediates: so many steps are shown in ``intermediates.png``
        (:class:`mcm_jax.jobs.intermediates.Intermediates`); 0 for none.
      preview_every: steps after which ``preview.png`` shows the batch as it stands, while it is drawn; 0 for none.
      base: another place of the base, or with ``accept_base`` a fine-tune of it, as :class:`mcm_jax.jobs.Drawer` has.
      changes: fields of :class:`mcm_jax.jobs.Job`, those in :data:`mcm_jax.jobs.CONTROLS`, such as ``seed``, ``prompt``
        and ``strength``; and of :class:`mcm_jax.sampling.SamplingSettings` that shall differ from the config's. None
        is as there.

    Returns:
      The samples, float32 ``[num_samples, H, W, 3]``.

    Raises:
      UserError: bad input: no sample was written; or some samples came out as NaN: the others were.
    """
    if not conditions:
        raise UserError(
            "no condition given; pass --segmentation=PNG, --sketch=PNG, --condition=NAME=PICTURE, or several"
        )
    own = {key: changes.pop(key) for key in CONTROLS if key in changes}
    drawer = Drawer(workdir, base, accept_base, **changes)
    drawer.check_text(own, "--")
    expect(num_samples >= 1, "num_samples", "at least 1", num_samples)
    if changes.get("batch_size") is None:
        own["batch_size"] = min(num_samples, drawer.settings.batch_size)
    own["conditions"] = dict(conditions)
    jobs = [drawer.job(f"sample_{i:03d}", own | {"sample": i}) for i in range(num_samples)]
    first, settings = jobs[0], jobs[0].settings
    check_typed([first], {**changes, **own})
    sized, steps = drawer.pipeline.sized(settings.height, settings.width), drawer.steps(first)
    size = sized.image_shape[:2]
    shown = [drawer.files.show(path, name, size) for name, path in sorted(conditions.items())]
    drawer.files.check(first, sized)
    look = Intermediates(intermediates, steps) if intermediates else None

    out = pathlib.Path(out)
    check_writable(out, "--out")
    earlier = [path for path in out.glob("sample_*.png") if re.fullmatch(r"sample_\d{3,}", path.stem)]
    earlier = [path for path in earlier if is_ours(path)]  # of another run into this folder
    new = [out / f"{job.name}.png" for job in jobs]
    inputs = {os.path.realpath(path): key for key, path in first.files.items()}
    for path in {*new, *earlier, out / "grid.png", out / "intermediates.png", out / PREVIEW}:
        check_target(path, inputs, own=path not in new)
    records = [drawer.record(job) for job in jobs]
    total = steps * -(-num_samples // drawer.pipeline.filled(settings.batch_size)) * (2 if show_base else 1)
    with Watch(total, (num_samples, 0), out, preview_every) as watch:

        def tell(now: Progress) -> None:
            watch(now)
            if look:
                look(now)

        images = drawer.sample(jobs, tell=tell, every=1 if look else watch.every)
        fine = np.isfinite(images).all((1, 2, 3))
        odd = ", ".join(job.name for job, is_fine in zip(jobs, fine, strict=True) if not is_fine)
        if not fine.any():
            raise UserError(f"{odd} of seed {first.seed} came out as NaN, nothing was written; {_WAY_OUT}")
        watch.drawn(int(fine.sum()))
        alone = drawer.sample([_alone(job) for job in jobs], tell=watch, every=watch.every) if show_base else None

    values = pictures.to_uint8(np.nan_to_num(images, nan=-1.0, posinf=1.0, neginf=-1.0))  # black
    strip = np.concatenate([*shown, values])
    columns = min(len(strip), 9)
    rows = pictures.rows_of(strip, columns)
    if alone is not None:
        white = np.full_like(np.concatenate(shown), 255)
        below = pictures.rows_of(np.concatenate([white, pictures.to_uint8(alone)]), columns)
        rows = [row for pair in zip(rows, below, strict=True) for row in pair]
    configs = [json.loads((assets.resolve(folder) / config.FILE).read_text()) for folder in drawer.workdirs]
    record = records[0] | {
        "num_samples": num_samples,
        "prompt": own.get("prompt"),
        **dataclasses.asdict(settings),
        "config": configs[0] if len(configs) == 1 else configs,
    }
    try:
        for path in (*earlier, out / "intermediates.png"):
            path.unlink(missing_ok=True)
        for job, image, said, is_fine in zip(jobs, values, records, fine, strict=True):
            if is_fine:
                pictures.save_png(out / f"{job.name}.png", image, {TEXT: json.dumps(said)})
        pictures.save_png(out / "grid.png", pictures.grid(rows))
        if look:
            pictures.save_png(out / "intermediates.png", look.picture(drawer.workdirs))
        write_atomically(out / "samples.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); take another --out") from e
    more = ", intermediates.png" if look else ""
    print(f"{fine.sum()} samples, grid.png{more} and samples.json are in {out}")
    if odd:
        raise UserError(f"{odd} of seed {first.seed} came out as NaN, black in grid.png and not written; {_WAY_OUT}")
    return images


def _alone(job: Job) -> Job:
    """The same without control."""
    return dataclasses.replace(job, settings=job.settings.but(guidance=0.0))
