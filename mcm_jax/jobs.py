"""Lists of jobs, each one picture: files in, pictures out that say how they were made.

Jobs of one list differ in conditions, prompts, seeds, strengths and windows and share batches of one compiled program
(two, where some have text guidance and some have not). Sampler and steps are the command's.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mcm_jax import assets, config, pictures
from mcm_jax.data import DataSettings
from mcm_jax.data.reading import read_caption, read_condition
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable
from mcm_jax.modalities import Modality, read_png
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import PER_SAMPLE
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import WEIGHTS
from mcm_jax.version import __version__

TEXT = "mcm_jax"
"""Name of the PNG text that holds a picture's settings."""

_MASK = Modality("mask", "map", 1)
_OF_THE_COMMAND = ("sampler", "steps", "spacing", "timesteps", "eta", "modulate")
_OF_TEXT = ("prompt", "negative_prompt", "text_guidance")
_KEYS = ("name", "conditions", "seed", "sample", "prompt", "strength", "mask", *PER_SAMPLE)
_PLACE = ("workdir", "base_path", "versions", "device", "file")  # of a record: where and by what, but not which picture


@dataclasses.dataclass(frozen=True)
class _RunSettings:
    """What is read of a run's config beside its model: the data set, for the colours of its classes."""

    data: DataSettings


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture to draw.

    Attributes:
      name: the file's, without ending.
      conditions: picture file of each modality that is given, any subset.
      settings: how it is drawn; batches share all but :data:`mcm_jax.request.PER_SAMPLE`.
      seed: of the noise, 0..4294967295.
      sample: which of the seed's samples, as sample.py numbers them.
      prompt: for a text-conditional base; None is the empty one.
      strength: of modalities, at least 0; 1 where left out.
      mask: picture file, white where the conditions hold; None is everywhere.
      source: where the job is from, for messages.
    """

    name: str
    conditions: Mapping[str, str]
    settings: SamplingSettings
    seed: int = 0
    sample: int = 0
    prompt: str | None = None
    strength: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mask: str | None = None
    source: str = ""

    def __post_init__(self):
        plain = isinstance(self.name, str) and re.fullmatch(r"[^/\\\0.][^/\\\0]{0,200}", self.name)
        expect(bool(plain), "name", "a file name without folder and ending, not beginning with a dot", self.name)
        for key in ("seed", "sample"):
            value = getattr(self, key)
            expect(type(value) is int and 0 <= value < 2**32, key, "a whole number in 0..4294967295", value)
        expect(isinstance(self.prompt, str | None), "prompt", "a text", self.prompt)


def sha256(path: str | os.PathLike) -> str:
    """Of a file's content. Raises UserError where it cannot be read."""
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """The settings that a picture carries. Raises UserError where it is no such picture."""
    try:
        with Image.open(path) as picture:
            return json.loads(picture.info[TEXT])
    except (KeyError, ValueError, TypeError, UnidentifiedImageError, OSError, SyntaxError) as e:
        raise UserError(
            f"{path}: carries no settings ({e or type(e).__name__}); expected a PNG that sample.py wrote, unchanged"
        ) from e


def _essence(value: Any) -> Any:
    """A record without what does not decide the picture."""
    if isinstance(value, Mapping):
        return {k: _essence(v) for k, v in value.items() if k not in _PLACE}
    return list(value) if isinstance(value, tuple) else value


class Drawer:
    """Draws jobs from a base under an MCM's control; of one process.

    Args:
      workdir: of a training run, or the name of a shipped MCM.
      base: another place of the base, and whether it may be a fine-tune of the MCM's own (``accept_base``): see
        :meth:`mcm_jax.pipeline.Pipeline.from_folder`.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from the config's, the default of every
        job; None is as there.

    Raises:
      UserError: no such MCM, another base, a wrong setting, or one of text for a base without.
    """

    def __init__(self, workdir: str, base: str | None = None, accept_base: bool = False, **changes: Any):
        self.workdir, self.pipeline = workdir, Pipeline.from_folder(workdir, base=base, accept_base=accept_base)
        self.settings = self.pipeline.settings.but(**changes)
        self.check_text({k: v for k, v in changes.items() if v is not None}, "--")
        self.settings.check_for(self.pipeline.base.schedule)
        self.known = {m.name: m for m in self.pipeline.modalities}
        self.data = config.load(_RunSettings, assets.resolve(workdir), others=True).data
        self._condition = functools.lru_cache(256)(self._fitted)
        self._sha256 = functools.lru_cache(4096)(sha256)
        self._facts = {
            "workdir": workdir,
            "mcm_sha256": sha256(assets.resolve(workdir) / WEIGHTS),
            "mcm_step": self.pipeline.mcms[0].step,
            "base": self.pipeline.base.name,
            "fingerprint": self.pipeline.base.fingerprint,
            **({} if base is None else {"base_path": base}),
            "device": jax.devices()[0].device_kind,
            "versions": {"mcm_jax": __version__, "jax": jax.__version__},
        }

    def check_text(self, given: Iterable[str], prefix: str = "") -> None:
        """Raises UserError where settings of text are given and the base has none."""
        found = [prefix + k for k in _OF_TEXT if k in given]
        if found and not self.pipeline.base.is_text_conditional:
            raise UserError(
                f"{', '.join(found)}: the base {self.pipeline.base.name!r} is unconditional, it has no text encoder; "
                f"take an MCM of a text-conditional one, e.g. --workdir=scenes-sd-mcm"
            )

    def read(self, path: str, name: str) -> np.ndarray:
        """The condition in a picture file, at its own resolution; labels by the colours of the run's classes, too."""
        described = self.data.described(name, assets.resolve(self.workdir))
        condition = read_condition(path, self.known[name], described)
        if doubt := self.known[name].doubt(condition):
            warnings.warn(f"{path}: {doubt}", stacklevel=2)
        return condition

    def _fitted(self, path: str, name: str) -> np.ndarray:
        if name in self.known:
            return self.known[name].fit(self.read(path, name), *self.pipeline.grid)
        return _MASK.fit(read_png(path, _MASK), *self.pipeline.base.latent_shape[:2])

    def record(self, job: Job) -> dict[str, Any]:
        """All that decides a picture, and what made it; as JSON has it."""

        def file(path: str) -> dict[str, str]:
            return {"file": os.path.abspath(path), "sha256": self._sha256(path)}

        how = dataclasses.asdict(job.settings)
        text = _OF_TEXT if not self.pipeline.base.is_text_conditional else ()
        return self._facts | {
            **{k: how[k] for k in (*_OF_THE_COMMAND, *PER_SAMPLE) if k not in text},
            "timesteps": list(job.settings.timesteps),
            "conditions": {name: file(path) for name, path in sorted(job.conditions.items())},
            "strength": {name: float(s) for name, s in sorted(job.strength.items())},
            "mask": None if job.mask is None else file(job.mask),
            **{k: getattr(job, k) for k in ("seed", "sample", "prompt") if k not in text},
        }

    def sample(self, jobs: Sequence[Job], batch_size: int | None = None) -> np.ndarray:
        """Samples a picture a job, float32 ``[N, H, W, 3]``; conditions are read already or will be.

        Raises:
          UserError: a condition's file cannot be read.
        """
        maps, present, strength = {}, {}, {}
        for name, modality in self.known.items():
            null = modality.null(1, *self.pipeline.grid)[0]
            given = [self._condition(j.conditions[name], name) if name in j.conditions else null for j in jobs]
            shown = np.array([name in j.conditions for j in jobs])
            if shown.any():
                maps[name], present[name] = np.stack(given), shown
                strength[name] = np.array([j.strength.get(name, 1.0) for j in jobs])
        masks = None
        if any(j.mask for j in jobs):
            everywhere = np.ones(self.pipeline.base.latent_shape[:2], np.float32)
            masks = np.stack([self._condition(j.mask, "") if j.mask else everywhere for j in jobs])
        how = dataclasses.asdict(jobs[0].settings) | {k: [getattr(j.settings, k) for j in jobs] for k in PER_SAMPLE}
        seeds, numbers = (
            np.array(values, np.uint32) for values in zip(*((j.seed, j.sample) for j in jobs), strict=True)
        )
        keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, numbers)
        prompts = [j.prompt or "" for j in jobs] if self.pipeline.base.is_text_conditional else None
        how["batch_size"] = batch_size or how["batch_size"]
        return self.pipeline(maps, keys, prompts=prompts, present=present, strength=strength, mask=masks, **how)

    def draw(self, jobs: Sequence[Job], out: str | os.PathLike, problems: Sequence[str] = ()) -> int:
        """Draws the pictures that are not there yet, ``OUT/NAME.png``, and says how far it is and how long it takes.

        A picture that is there and carries a job's very settings stays. Jobs that cost alike are drawn together, so
        the order is not the list's. An interrupt leaves whole pictures, and the same call goes on.

        Args:
          jobs: each of another name.
          out: folder.
          problems: of other jobs, which are told at the end with those of these.

        Returns:
          How many were drawn.

        Raises:
          UserError: some could not be drawn (an unreadable condition, a NaN): which, when the others are; or the folder
            cannot be written.
        """
        if jax.process_count() > 1:  # each would look for itself which pictures are there
            raise UserError("lists of jobs are drawn by one process; start it alone, or give each a list of its own")
        out, problems, todo, drawn = pathlib.Path(out), list(problems), [], 0
        check_writable(out, "--out")
        for job in jobs:
            try:
                record = self.record(job)
                if not _is_drawn(out / f"{job.name}.png", record):
                    todo.append((self._cost(job), job, record))
            except UserError as e:
                problems.append(f"{job.source}: {e}")
        todo.sort(key=lambda item: item[0])
        size = max(1, min(self.settings.batch_size, len(jobs)))  # the same when the command goes on
        with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit=" pictures", dynamic_ncols=True) as bar:
            for _, group in itertools.groupby(todo, lambda item: item[0][0]):
                while part := list(itertools.islice(group, size)):
                    batch = [(job, record) for _, job, record in part if self._is_readable(job, problems)]
                    images = self.sample([job for job, _ in batch], size) if batch else []
                    for (job, record), image in zip(batch, images, strict=True):
                        if not np.isfinite(image).all():
                            problems.append(
                                f"{job.source} ({job.name}, seed {job.seed}): came out as NaN and was not written; "
                                f"take less guidance and strength, or float32"
                            )
                            continue
                        try:
                            path = out / f"{job.name}.png"
                            pictures.save_png(path, pictures.to_uint8(image), {TEXT: json.dumps(record)})
                        except OSError as e:
                            raise UserError(
                                f"{path}: cannot be written ({e.strerror or e}). The pictures before it are whole; the "
                                f"same command goes on"
                            ) from e
                        drawn += 1
                    bar.update(len(part))
        print(f"{drawn} pictures drawn, {len(jobs) - len(todo)} were there: {out}")
        if problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            listed = "\n".join(f"  {line}" for line in (*problems[:20], *more))
            raise UserError(f"{len(problems)} jobs failed; the other pictures are in {out}:\n{listed}")
        return drawn

    def _cost(self, job: Job) -> tuple:
        """What compiles apart first; then what a batch of the same makes cheap."""
        s = job.settings
        guided = self.pipeline.base.is_text_conditional and s.text_guidance != 1
        partly = len({job.strength.get(name, 1.0) for name in job.conditions} - {0.0, 1.0})
        return guided, s.guidance == 0, partly, s.start, s.end

    def _is_readable(self, job: Job, problems: list[str]) -> bool:
        try:
            for name, path in job.conditions.items():
                self._condition(path, name)
            if job.mask:
                self._condition(job.mask, "")
        except UserError as e:
            problems.append(f"{job.source}: {e}")
            return False
        return True


def _is_drawn(path: pathlib.Path, record: Mapping[str, Any]) -> bool:
    try:
        return path.exists() and _essence(read_record(path)) == _essence(record)
    except UserError:  # of another origin
        return False


# Where jobs come from


def _seed_of(seed: int, name: str) -> int:
    """A seed of its own for each name: other jobs that come or go leave its picture as it is."""
    return zlib.crc32(f"{seed}/{name}".encode())


def _numbers(value: Any, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(is_number, key, "a number", value)
    return float(value)


def _job_of_line(line: str, drawer: Drawer, folder: pathlib.Path, name: str, default: Mapping[str, Any]) -> Job:
    try:
        given = json.loads(line)
    except ValueError as e:
        raise UserError(f"no JSON ({e}); expected one object a line") from e
    expect(isinstance(given, dict), "a line", "an object", given)
    if unknown := sorted(given.keys() - {*_KEYS}):
        raise UserError(f"unknown {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    drawer.check_text(given)
    name, conditions, strength = given.get("name", name), given.get("conditions", {}), given.get("strength", {})
    for key, value in (("conditions", conditions), ("strength", strength)):
        expect(isinstance(value, dict), key, "an object by modality", value)
        if unknown := sorted(value.keys() - drawer.known.keys()):
            raise UserError(f"{key}: the MCM knows {', '.join(drawer.known)}, not {', '.join(unknown)}")
    files = {**conditions, "mask": given["mask"]} if given.get("mask") is not None else conditions
    for key, path in files.items():
        expect(isinstance(path, str), key, "a file", path)
        if not (folder / path).is_file():
            raise UserError(f"{key}: {folder / path}: no such file")
    for key, value in strength.items():
        expect(0 <= _numbers(value, f"strength.{key}") < float("inf"), f"strength.{key}", "at least 0", value)
    own = {k: v if k == "negative_prompt" else _numbers(v, k) for k, v in given.items() if k in PER_SAMPLE}
    return Job(
        name,
        {key: str(folder / path) for key, path in conditions.items()},
        drawer.settings.but(**own),
        seed=given.get("seed", _seed_of(default["seed"], str(name))),
        sample=given.get("sample", 0),
        prompt=given.get("prompt", default["prompt"]),
        strength=strength,
        mask=str(folder / given["mask"]) if given.get("mask") is not None else None,
    )


def read_jobs(
    path: str | os.PathLike, drawer: Drawer, seed: int = 0, prompt: str | None = None
) -> tuple[list[Job], list[str]]:
    """Jobs of a file with one JSON object a line, see docs/sampling.md.

    Args:
      path: the file; files that it names are relative to its folder.
      drawer: of the MCM.
      seed: with a job's name, decides the seeds that are not given.
      prompt: of jobs without.

    Returns:
      ``(jobs, problems)``: of the good lines, and what is wrong with each of the others.

    Raises:
      UserError: the file cannot be read, or holds nothing.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--jobs {path}: no text file in UTF-8 ({e}); expected one JSON object a line") from e
    jobs, problems, default = {}, [], {"seed": seed, "prompt": prompt}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            job = _job_of_line(line, drawer, path.parent, f"{number:06d}", default)
            if job.name in jobs:
                raise UserError(f"name {job.name!r} is that of {jobs[job.name].source}, too; give each its own")
            jobs[job.name] = dataclasses.replace(job, source=source)
        except UserError as e:
            problems.append(f"{source}: {e}")
    if not jobs and not problems:
        raise UserError(f"--jobs {path}: holds no jobs; expected one JSON object a line")
    return list(jobs.values()), problems


def jobs_of_folder(path: str | os.PathLike, drawer: Drawer, seed: int = 0, prompt: str | None = None) -> list[Job]:
    """A job for each name in a folder that is laid out as a split of a data folder.

    ``FOLDER/MODALITY/NAME.png`` are its conditions, whichever there are, and ``FOLDER/caption/NAME.txt`` its prompt.

    Args:
      path: the folder.
      drawer: of the MCM.
      seed: with a job's name, decides its seed.
      prompt: of jobs without a caption.

    Raises:
      UserError: there are no conditions, two of one name, or a caption that cannot be read.
    """
    path, found = pathlib.Path(path), {}
    for name, modality in drawer.known.items():
        for file in sorted((path / name).glob("[!.]*")):
            if file.suffix.lower() in modality.endings:
                there = found.setdefault(file.stem, {})
                if name in there:
                    raise UserError(f"{file}: {there[name]} has the same name; keep one")
                there[name] = str(file)
    if not found:
        folders = ", ".join(f"{path / name}/NAME.png" for name in drawer.known)
        raise UserError(f"--conditions {path}: holds no conditions; expected {folders}, or some of these")

    def prompt_of(name: str) -> str | None:
        file = path / "caption" / f"{name}.txt"
        return read_caption(file) if drawer.pipeline.base.is_text_conditional and file.is_file() else prompt

    return [
        Job(
            name,
            conditions,
            drawer.settings,
            seed=_seed_of(seed, name),
            prompt=prompt_of(name),
            source=f"{path}: {name}",
        )
        for name, conditions in sorted(found.items())
    ]


def replay(
    picture: str | os.PathLike,
    out: str | os.PathLike,
    workdir: str | None = None,
    base: str | None = None,
    accept_base: bool = False,
    **changes: Any,
) -> None:
    """Draws a picture again from the settings that it carries, to ``OUT/NAME.png``.

    Args:
      picture: a PNG that sample.py wrote.
      out: folder.
      workdir: where the MCM is, if no more where it was.
      base: another base than it was drawn on, as :class:`Drawer` takes it, with ``accept_base``.
      changes: what shall be otherwise: ``seed``, ``prompt``, or fields of :class:`mcm_jax.sampling.SamplingSettings`.

    Raises:
      UserError: it carries no settings, the MCM or the base is another one, or a condition's file is gone or changed.
    """
    said = read_record(picture)
    try:
        before = {k: said[k] for k in (*_OF_THE_COMMAND, *PER_SAMPLE) if k in said}
        files = {**said["conditions"], **({"": said["mask"]} if said["mask"] else {})}
        files = {name: (file["file"], file["sha256"]) for name, file in files.items()}
        place, digest, strength = said["workdir"], said["mcm_sha256"], said["strength"]
        own = {k: changes.pop(k, None) for k in ("seed", "prompt")}
        own = {k: said.get(k) if v is None else v for k, v in own.items()} | {"sample": said["sample"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"{picture}: its settings are incomplete ({e}); expected a PNG that sample.py wrote") from e
    for file, expected in files.values():
        if not os.path.isfile(file):
            raise UserError(f"{picture}: was drawn for {file}, which is gone; put it back")
        if sha256(file) != expected:
            raise UserError(f"{picture}: was drawn for another {file} (SHA-256 {expected[:16]}); put that back")
    place = place if workdir is None else workdir
    changes = before | {"timesteps": tuple(before["timesteps"])} | {k: v for k, v in changes.items() if v is not None}
    # What it was drawn on was accepted then.
    drawer = Drawer(place, said.get("base_path") if base is None else base, base is None or accept_base, **changes)
    if (found := sha256(assets.resolve(place) / WEIGHTS)) != digest:
        raise UserError(
            f"{picture}: was drawn by another MCM than {place} (SHA-256 {digest[:16]}, there {found[:16]}); "
            f"name its own with --workdir"
        )
    now = drawer.pipeline.base
    if base is None and now.fingerprint != said.get("fingerprint"):
        raise UserError(
            f"{picture}: was drawn on the base {said.get('base')!r} with fingerprint "
            f"{str(said.get('fingerprint'))[:16]}, but {now.name!r} has {now.fingerprint[:16]}; name its own, or one "
            f"to draw on instead, with --base"
        )
    conditions = {name: file for name, (file, _) in files.items() if name}
    mask = files[""][0] if "" in files else None
    name = pathlib.Path(picture).stem
    job = Job(name, conditions, drawer.settings, strength=strength, mask=mask, source=str(picture), **own)
    drawer.draw([job], out)
