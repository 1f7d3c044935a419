"""Condition files in, samples out: what sample.py does."""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mcm_jax import assets, config, pictures, sampling
from mcm_jax.data import DataSettings
from mcm_jax.data.folder import read_condition
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, write_atomically
from mcm_jax.pipeline import WEIGHTS, Pipeline
from mcm_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class _RunSettings:
    """What is read of a run's config beside its model: the data set, for the colours of its classes."""

    data: DataSettings


def _sha256(path: str | os.PathLike) -> str:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def generate(
    workdir: str,
    conditions: Mapping[str, str],
    out: str | os.PathLike,
    *,
    num_samples: int = 8,
    seed: int = 0,
    prompt: str | None = None,
    **changes: Any,
) -> np.ndarray:
    """Samples images for one set of conditions and writes them.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      conditions: picture file of each modality that is given, at least one. Labels may be in the colours of the data
        set's classes, where it is at hand.
      out: folder; gets ``sample_000.png`` ..., ``grid.png`` (the conditions, then the samples) and
        ``samples.json``, which holds every argument.
      num_samples: how many, at least 1.
      seed: of the noise, at least 0.
      prompt: for a text-conditional base; None is the empty one.
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
    pipeline = Pipeline.from_folder(workdir)
    settings = pipeline.settings.but(**changes)
    if changes.get("batch_size") is None and num_samples > 0:
        settings = settings.but(batch_size=min(num_samples, settings.batch_size))
    texts = {"prompt": prompt} | {k: changes.get(k) for k in ("negative_prompt", "text_guidance")}
    if (given := [f"--{k}" for k, v in texts.items() if v is not None]) and not pipeline.base.is_text_conditional:
        raise UserError(
            f"{', '.join(given)}: the base {pipeline.base.name!r} is unconditional, it has no text encoder; "
            f"take an MCM of a text-conditional one, e.g. --workdir=scenes-sd-mcm"
        )
    expect(num_samples >= 1, "num_samples", "at least 1", num_samples)
    expect(0 <= seed < 2**32, "seed", "in 0..4294967295", seed)
    settings.check_for(pipeline.base.schedule)
    known = {m.name: m for m in pipeline.modulator.modalities}
    if unknown := sorted(conditions.keys() - known.keys()):
        raise UserError(f"the MCM {workdir!r} knows {', '.join(known)}, not {', '.join(unknown)}")
    data = config.load(_RunSettings, assets.resolve(workdir), others=True).data
    maps, shown = {}, []
    for name, path in sorted(conditions.items()):
        condition = read_condition(path, known[name], data.described(name))
        if doubt := known[name].doubt(condition):
            warnings.warn(f"{path}: {doubt}", stacklevel=2)
        maps[name] = np.repeat(known[name].fit(condition, *pipeline.grid)[None], num_samples, axis=0)
        large = known[name].fit(condition, *pipeline.base.image_shape[:2])[None]
        shown.append(pictures.show(known[name], large, data.palette(name)))

    out = pathlib.Path(out)
    check_writable(out, "--out")
    prompts = None if prompt is None else [prompt] * num_samples
    how = dataclasses.asdict(settings)
    images = pipeline(maps, sampling.sample_keys(seed, num_samples), prompts=prompts, **how)

    values = pictures.to_uint8(images)
    strip = np.concatenate([*shown, values])
    columns = min(len(strip), 9)
    strip = np.concatenate([strip, np.full((-len(strip) % columns, *strip.shape[1:]), 255, np.uint8)])
    record = {
        "workdir": workdir,
        "conditions": {
            name: {"file": os.path.abspath(path), "sha256": _sha256(path)} for name, path in conditions.items()
        },
        "num_samples": num_samples,
        "seed": seed,
        "prompt": prompt,
        **how,
        "base": pipeline.base.name,
        "fingerprint": pipeline.base.fingerprint,
        "mcm_step": pipeline.step,
        "mcm_sha256": _sha256(assets.resolve(workdir) / WEIGHTS),
        "config": json.loads((assets.resolve(workdir) / config.FILE).read_text()),
        "versions": {"mcm_jax": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    try:
        for earlier in out.glob("sample_*.png"):  # of another run into this folder
            earlier.unlink()
        for i, image in enumerate(values):
            pictures.save_png(out / f"sample_{i:03d}.png", image)
        rows = [strip[i : i + columns] for i in range(0, len(strip), columns)]
        pictures.save_png(out / "grid.png", pictures.grid(rows))
        write_atomically(out / "samples.json", (json.dumps(record, indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); take another --out") from e
    print(f"{num_samples} samples, grid.png and samples.json are in {out}")
    return images
