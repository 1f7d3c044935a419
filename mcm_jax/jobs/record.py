"""What a picture says of the job that it was drawn for, as PNG text."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from PIL import Image

from mcm_jax import assets
from mcm_jax.errors import UserError
from mcm_jax.jobs.job import Job
from mcm_jax.modalities.files import BROKEN
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import OF_TEXT
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import WEIGHTS
from mcm_jax.version import __version__

TEXT = "mcm_jax"
"""Name of the PNG text that holds a picture's settings."""

_PLACE = ("workdir", "base", "base_path", "versions", "device", "file")  # where and by what, but not which picture
_SETTINGS = dataclasses.asdict(SamplingSettings())
# What every picture says. Of the others it says what is not the default: they are younger than pictures that are there.
_ALWAYS = (
    *("sampler", "steps", "spacing", "timesteps", "eta", "modulate"),
    *("guidance", "start", "end", "text_guidance", "negative_prompt"),
)


class Recorder:
    """Of the pictures of one base and some MCMs.

    Args:
      workdirs: of the MCMs.
      pipeline: base and MCMs.
      base: where the base is, if not where the config says.

    Attributes:
      facts: what all its pictures say; of one MCM its folder, digest and step, of several lists of these.
    """

    def __init__(self, workdirs: Sequence[str], pipeline: Pipeline, base: str | None = None):
        self._pipeline, self._sha256 = pipeline, functools.lru_cache(4096)(sha256)
        self._is_transparent = functools.lru_cache(4096)(_is_transparent)
        self._colors = functools.cache(self._digest_of_colors)
        of_each = {
            "workdir": list(workdirs),
            "mcm_sha256": [sha256(assets.resolve(folder) / WEIGHTS) for folder in workdirs],
            "mcm_step": [mcm.step for mcm in pipeline.mcms],
        }
        self.facts = {
            **{key: values[0] if len(values) == 1 else values for key, values in of_each.items()},
            "base": pipeline.base.name,
            "fingerprint": pipeline.base.fingerprint,
            "schedule": pipeline.base.schedule.options,
            **({} if base is None else {"base_path": base}),
            **({"dtype": pipeline.dtype} if pipeline.dtype else {}),
            "device": jax.devices()[0].device_kind,
            "versions": {"mcm_jax": __version__, "jax": jax.__version__},
        }

    def record(self, job: Job) -> dict[str, Any]:
        """All that decides a picture, and what made it, as JSON has it; UserError where a file cannot be read."""

        def file(path: str) -> dict[str, str] | None:
            return {"file": os.path.abspath(path), "sha256": self._sha256(path)} if path else None

        def mask(path: str) -> dict[str, str] | None:  # earlier versions took the colours behind what is transparent
            return {**file(path), **({"alpha": "black"} if self._is_transparent(path) else {})} if path else None

        how, own = dataclasses.asdict(job.settings), self._pipeline.base
        base = self._pipeline.sized(job.settings.height, job.settings.width)
        changed = {k: v for k, v in how.items() if k not in (*_ALWAYS, "batch_size") and v != _SETTINGS[k]}
        changed.pop("image_strength" if not job.image else "", None)
        sized = base.image_shape != own.image_shape
        changed |= dict(zip(("height", "width"), base.image_shape if sized else (None, None), strict=False))
        window = {name: list(span) for name, span in sorted(job.window.items()) if tuple(span) != (0, 1)}
        varied = (job.variation_seed, job.variation) if job.variation else (None, None)
        younger = {
            **changed,
            "guidance_schedule": list(job.settings.guidance_schedule),
            "window": window,
            "colors": {name: colors for name in sorted(job.conditions) if (colors := self._colors(name))},
            "weights": list(job.weights) if {*job.weights} - {1.0} else [],
            "image": file(job.image),
            "inpaint": mask(job.inpaint),
            **dict(zip(("variation_seed", "variation"), varied, strict=True)),
        }
        said = self.facts | {
            **{k: how[k] for k in _ALWAYS},
            "timesteps": list(job.settings.timesteps),
            "conditions": {name: file(path) for name, path in sorted(job.conditions.items())},
            "strength": {name: float(s) for name, s in sorted(job.strength.items())},
            "mask": mask(job.mask),
            **{"seed": job.seed, "sample": job.sample, "prompt": job.prompt or None},
            **{k: v for k, v in younger.items() if v not in (None, [], {})},
        }
        text = {*OF_TEXT} - {"modulate"} if not own.is_text_conditional else ()  # which pictures always said
        return {k: v for k, v in said.items() if k not in text}

    def _digest_of_colors(self, name: str) -> str:
        """By which colours labels are read; '' where by none."""
        is_labels = any(m.name == name and m.kind == "labels" for m in self._pipeline.modalities)
        classes = self._pipeline.classes(name) if is_labels else None
        if classes is None or classes.colors is None:
            return ""
        said = [classes.colors.tolist(), classes.ignore_color and list(map(int, classes.ignore_color)), classes.ignore]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def sha256(path: str | os.PathLike) -> str:
    """Of a file's content. Raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _is_transparent(path: str) -> bool:
    """Whether a picture file has transparent parts; one that cannot be read is told of where it is drawn from."""
    try:
        with Image.open(path) as picture:
            return picture.has_transparency_data
    except BROKEN:
        return False


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that a picture carries. Raises UserError where it is no such picture."""
    try:
        with Image.open(path) as picture:
            return json.loads(picture.info[TEXT])
    except BROKEN as e:
        raise UserError(
            f"{path}: carries no settings ({e or type(e).__name__}); expected a PNG that sample.py wrote, unchanged"
        ) from e


def is_ours(path: str | os.PathLike) -> bool:
    """Whether sample.py wrote a picture, as far as the picture says."""
    try:
        return bool(read_record(path))
    except UserError:
        return False


def inputs_of(jobs: Iterable[Job]) -> dict[str, str]:
    """What jobs are drawn from: what messages call each file, by its real path."""
    return {os.path.realpath(path): key for job in jobs for key, path in job.files.items()}


def check_target(path: pathlib.Path, inputs: Mapping[str, str], own: bool = False) -> None:
    """Raises UserError where a picture cannot be written without losing one that sample.py did not write.

    Args:
      path: where it is going to be.
      inputs: what is drawn from, by its real path: what messages call it.
      own: whether nobody else has files of that name.
    """
    if not path.exists():
        return
    if what := inputs.get(os.path.realpath(path)):
        raise UserError(f"{path}: is what is drawn from ({what}), and would be replaced; take another --out")
    if not own and not is_ours(path):
        raise UserError(f"{path}: was not written by sample.py; move it away, or take another --out")


def is_drawn(path: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is the picture of a record, wherever its conditions and MCMs were then."""
    try:
        there = path.exists() and _essence(read_record(path))
    except UserError:  # of another origin
        return False
    wanted = _essence(record)
    # Pictures of before 2026-12 do not say how the base's file spaces and ends its steps, nor colours of classes.
    return bool(there) and {k: wanted[k] for k in ("schedule", "colors") if k in wanted} | there == wanted


def _essence(value: Any) -> Any:
    """A record without what does not decide the picture."""
    if isinstance(value, Mapping):
        return {k: _essence(v) for k, v in value.items() if k not in _PLACE}
    if isinstance(value, list | tuple):
        return [_essence(v) for v in value]
    return value or None if isinstance(value, str) else value
