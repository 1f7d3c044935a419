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
from mcm_jax.data.reading import read_image
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.jobs import CONTROLS, Drawer
from mcm_jax.jobs.intermediates import Intermediates
from mcm_jax.jobs.job import check_typed
from mcm_jax.jobs.record import check_target, inputs_of, is_ours
from mcm_jax.jobs.watch import PREVIEW

_OWN = ("grid.png", "intermediates.png", PREVIEW)


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
    dtype: str | None = None,
    **changes: Any,
) -> np.ndarray:
    """Samples images for one set of conditions and writes them, each as soon as its batch is drawn.

    A sample that is there and carries these very settings stays: after an interrupt the same call goes on.

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
      base: and ``accept_base``, ``dtype``: as :class:`mcm_jax.jobs.Drawer` has them.
      changes: fields of :class:`mcm_jax.jobs.Job`, those in :data:`mcm_jax.jobs.CONTROLS`, such as ``seed``, ``prompt``
        and ``strength``; and of :class:`mcm_jax.sampling.SamplingSettings` that shall differ from the config's. None
        is as there.

    Returns:
      The samples as they are in their files, uint8 ``[num_samples, H, W, 3]``.

    Raises:
      UserError: bad input: no sample was written; or some samples came out as NaN: the others were.
    """
    if not conditions:
        raise UserError(
            "no condition given; pass --segmentation=PNG, --sketch=PNG, --condition=NAME=PICTURE, or several"
        )
    own = {key: changes.pop(key) for key in CONTROLS if key in changes}
    drawer = Drawer(workdir, base, accept_base, dtype, **changes)
    drawer.check_text(own, "--")
    expect(num_samples >= 1, "num_samples", "at least 1", num_samples)
    expect(preview_every >= 0, "preview_every", "a number of steps, or 0 (none)", preview_every)
    if changes.get("batch_size") is None:
        own["batch_size"] = min(num_samples, drawer.settings.batch_size)
    own["conditions"] = dict(conditions)
    names = [f"sample_{i:03d}" for i in range(num_samples)]
    jobs = [drawer.job(name, own | {"sample": i}, name) for i, name in enumerate(names)]
    first, settings = jobs[0], jobs[0].settings
    check_typed([first], {**changes, **own})
    look = Intermediates(intermediates, drawer.steps(first)) if intermediates else None
    sized = drawer.pipeline.sized(settings.height, settings.width)
    shown = [drawer.files.show(path, name, sized.image_shape[:2]) for name, path in sorted(conditions.items())]
    drawer.files.check(first, sized)

    out = pathlib.Path(out).expanduser()
    new = [out / f"{job.name}.png" for job in jobs]
    earlier = [path for path in out.glob("sample_*.png") if re.fullmatch(r"sample_\d{3,}", path.stem)]
    earlier = [path for path in earlier if path not in new and is_ours(path)]  # of another run into this folder
    inputs = inputs_of(jobs[:1])
    for path in {*new, *earlier, *(out / name for name in _OWN)}:
        check_target(path, inputs, own=path not in new)
        if path.name in _OWN and is_ours(path):
            raise UserError(f"{path}: is a picture of a list, and would be replaced; take another --out")
    check_writable(out, "--out")
    for name in ("grid.png", "samples.json"):  # until all are drawn they would be of other samples
        (out / name).unlink(missing_ok=True)
    done = drawer.attempt(jobs, out, preview_every=preview_every)
    whole, problems = {*done.new, *done.kept}, "\n".join(done.problems)
    if not whole:
        raise UserError(problems)
    size = drawer.batch_size(num_samples)
    if look:
        drawer.sample(jobs[:1], size, look)
    alone = drawer.alone(jobs, size) if show_base else {}

    black, failed = np.zeros(sized.image_shape, np.uint8), [path for path in new if path.stem not in whole]
    values = np.stack([black if path in failed else np.asarray(read_image(path)) for path in new])
    strip = np.concatenate([*shown, values])
    columns = min(len(strip), 9)
    rows = pictures.rows_of(strip, columns)
    if alone:
        white = np.full_like(np.concatenate(shown), 255)
        below = pictures.rows_of(np.concatenate([white, [alone[job.name] for job in jobs]]), columns)
        rows = [row for pair in zip(rows, below, strict=True) for row in pair]
    configs = [json.loads((assets.resolve(folder) / config.FILE).read_text()) for folder in drawer.workdirs]
    record = drawer.record(first) | {
        "num_samples": num_samples,
        "prompt": own.get("prompt"),
        **dataclasses.asdict(settings),
        "config": configs[0] if len(configs) == 1 else configs,
    }
    try:
        for path in (*earlier, *failed, out / "intermediates.png"):
            path.unlink(missing_ok=True)
        pictures.save_png(out / "grid.png", pictures.grid(rows))
        if look:
            pictures.save_png(out / "intermediates.png", look.picture(drawer.workdirs))
        write_atomically(out / "samples.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); the samples are there, the rest is not") from e
    kept = f" ({len(done.kept)} were there)" if done.kept else ""
    more = ", intermediates.png" if look else ""
    print(f"{len(whole)} samples{kept}, grid.png{more} and samples.json are in {out}")
    if problems:
        raise UserError(f"{problems}\nIt is black in grid.png")
    return values
