"""Where jobs come from: a file of lines, a folder of conditions, a picture that was drawn."""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mcm_jax.data.captions import find_captions, read_lines
from mcm_jax.data.folder import list_files, stems
from mcm_jax.data.problems import Problem
from mcm_jax.data.reading import read_caption
from mcm_jax.errors import UserError, expect
from mcm_jax.jobs.drawer import Drawer
from mcm_jax.jobs.job import FILES, Job, check_typed
from mcm_jax.jobs.record import check_target, is_drawn, read_record, sha256
from mcm_jax.modalities import PICTURES
from mcm_jax.sampling import SamplingSettings

_SETTINGS = tuple(f.name for f in dataclasses.fields(SamplingSettings) if f.name != "batch_size")
_JOB = tuple(f.name for f in dataclasses.fields(Job) if f.name not in ("settings", "source"))
_KEYS = (*_JOB, "num_samples", *_SETTINGS)
_MOST = 100_000  # pictures of a line


def _seed_of(seed: int | None, name: Any) -> int:
    """A seed of its own for each name: other jobs that come or go leave its picture as it is."""
    return zlib.crc32(f"{seed or 0}/{name}".encode(errors="surrogatepass"))


def _over(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a job in place of others; by modality in place of the same one's alone, {} in place of all."""
    named = [k for k in ("strength", "window") if all(isinstance(x.get(k), dict) and x[k] for x in (default, given))]
    return {**default, **given, **{key: default[key] | given[key] for key in named}}


def _jobs_of_line(
    line: str, drawer: Drawer, folder: pathlib.Path, name: str, default: Mapping[str, Any], source: str
) -> list[Job]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"no JSON ({e}); expected one object a line") from e
    expect(isinstance(given, dict), "a line", "an object", given)
    if unknown := sorted(given.keys() - {*_KEYS}):
        raise UserError(f"unknown {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    drawer.check_text(given)
    given = {key: value for key, value in given.items() if value is not None}
    name, count = given.pop("name", name), given.pop("num_samples", None)

    def there(path: Any) -> Any:
        return str(folder / path) if path and isinstance(path, str) else path

    given |= {key: there(given[key]) for key in FILES if key in given}
    if isinstance(conditions := given.get("conditions"), dict):
        given["conditions"] = {modality: there(path) for modality, path in conditions.items()}
    own = given  # a list's defaults are for those lines that they do something for
    given = _over({**default, "seed": _seed_of(default.get("seed"), name)}, given)
    if count is None:
        job = drawer.job(name, given, source)
        check_typed([job], own)
        return [job]
    expect(type(count) is int and 1 <= count <= _MOST, "num_samples", f"a whole number in 1..{_MOST}", count)
    expect(
        "sample" not in given,
        "sample",
        "left out beside num_samples, which draws samples 0, 1, ...",
        given.get("sample"),
    )
    expect(isinstance(name, str), "name", "a text", name)
    jobs = [drawer.job(f"{name}_{i:03d}", given | {"sample": i}, source) for i in range(count)]
    check_typed(jobs[:1], own)
    return jobs


def _check_for_all(jobs: Sequence[Job], given: Mapping[str, Any], problems: Sequence[str]) -> None:
    """What was typed for all jobs. What does nothing for those that are good could be meant for those that are not."""
    check_typed(jobs, {key: given.get(key) for key in FILES} if problems else given)


def read_jobs(path: str | os.PathLike, drawer: Drawer, **given: Any) -> tuple[list[Job], list[str]]:
    """Jobs of a file with one JSON object a line, see docs/sampling.md.

    Args:
      path: the file; files that it names are relative to its folder.
      drawer: of the MCM.
      given: what was typed for all, fields of jobs that do not have their own: :data:`mcm_jax.jobs.CONTROLS`, or of
        :class:`mcm_jax.sampling.SamplingSettings`; None is not given. The seed, with a job's name, decides the seeds
        that are not given.

    Returns:
      ``(jobs, problems)``: of the good lines, and what is wrong with each of the others.

    Raises:
      UserError: the file cannot be read, or holds nothing; what was typed for all does nothing for any.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--jobs {path}: no text file in UTF-8 ({e}); expected one JSON object a line") from e
    drawer.check_text(given, "--")
    jobs: dict[str, Job] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            found = _jobs_of_line(line, drawer, path.parent, f"{number:06d}", given, source)
            for job in found:
                if job.name in jobs:
                    raise UserError(f"name {job.name!r} is that of {jobs[job.name].source}, too; give each its own")
            jobs |= {job.name: job for job in found}
        except UserError as e:
            problems.append(f"{source}: {e}")
    if not jobs and not problems:
        raise UserError(f"--jobs {path}: holds no jobs; expected one JSON object a line")
    _check_for_all(list(jobs.values()), given, problems)
    return list(jobs.values()), problems


def jobs_of_folder(path: str | os.PathLike, drawer: Drawer, **given: Any) -> tuple[list[Job], list[str]]:
    """A job for each name in a folder that is laid out as a split of a data folder.

    ``FOLDER/MODALITY/NAME.png`` are its conditions, whichever there are, and ``FOLDER/caption/NAME.txt`` its prompt, or
    a line of a file as :mod:`mcm_jax.data.captions` has it.

    Args:
      path: the folder.
      drawer: of the MCM.
      given: what was typed for all, fields of the jobs: :data:`mcm_jax.jobs.CONTROLS`, or of
        :class:`mcm_jax.sampling.SamplingSettings`; None is not given. The seed, with a job's name, decides its seed;
        the prompt is of jobs without a caption.

    Returns:
      ``(jobs, problems)``: of the names all of whose files can be what they are called, and what is wrong with others.

    Raises:
      UserError: there are no conditions, captions in several places, or a file of captions that cannot be read; what
        was typed does nothing for any.
    """
    path, found, wrong, spoilt = pathlib.Path(path), {}, [], set()
    for name, modality in drawer.files.known.items():
        if os.path.lexists(path / name):
            files, odd = _listed(path / name, modality.endings)
            wrong += odd
            twice = stems(p for p in odd if pathlib.Path(p.path).suffix.lower() in modality.endings)
            spoilt |= twice | (stems(odd) - files.keys())
            for stem, file in files.items():
                found.setdefault(stem, {})[name] = str(path / name / file)
    if not found and not wrong:
        folders = ", ".join(f"{path / name}/NAME.png" for name in drawer.files.known)
        raise UserError(f"--conditions {path}: holds no conditions; expected {folders}, or some of these")
    drawer.check_text(given, "--")
    prompts, odd = _captions(path, found) if drawer.pipeline.base.is_text_conditional else ({}, [])
    wrong, spoilt = wrong + odd, spoilt | (stems(odd) - prompts.keys())
    jobs, problems = [], list(map(str, wrong))
    for name in sorted(found.keys() - spoilt):  # without what is wrong it would be drawn from less
        prompt, source = prompts.get(name, given.get("prompt")), f"{path}: {name}"
        own = {"conditions": found[name], "prompt": prompt, "seed": _seed_of(given.get("seed"), name)}
        try:
            jobs.append(drawer.job(name, {**given, **own}, source))
        except UserError as e:
            problems.append(f"{source}: {e}")
    _check_for_all(jobs, given, problems)
    return jobs, problems


def _listed(folder: pathlib.Path, endings: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Files of a folder, which raises UserError where it cannot be read: all pictures would be drawn without it."""
    files, problems = list_files(folder, endings)
    if unreadable := [p for p in problems if p.path == str(folder)]:
        raise UserError(f"--conditions {unreadable[0]}")
    return files, problems


def _captions(path: pathlib.Path, names: Collection[str]) -> tuple[dict[str, str], list[Problem]]:
    """The prompts that a folder has for some names, wherever it has them, and what is wrong with those of others."""
    places = find_captions(path)
    if len(places) > 1:
        where = " and in ".join(map(str, places))
        raise UserError(f"--conditions {path}: prompts are in {where}; keep those that count")
    if not places:
        return {}, []
    if places[0].is_dir():
        files, wrong = _listed(places[0], (".txt",))
        prompts = {}
        for name in sorted(files.keys() & {*names}):
            try:
                prompts[name] = read_caption(places[0] / files[name])
            except UserError as e:
                wrong.append(Problem.of(e, places[0] / files[name]))
        return prompts, wrong
    prompts, problems = read_lines(places[0], PICTURES, names)
    # Lines of other pictures, and pictures without a line, are no mistake here; nor is metadata that says no prompts.
    wrong = [p for p in problems if "there is no picture" not in p.found and not p.found.startswith("no line for")]
    if wrong and (prompts or not all("expected one of caption, text" in p.found for p in wrong)):
        raise UserError(f"--conditions {path}: {wrong[0]}")
    return prompts, []


def replay(
    picture: str | os.PathLike,
    out: str | os.PathLike,
    workdir: str | Sequence[str] | None = None,
    preview_every: int = 0,
    base: str | None = None,
    accept_base: bool = False,
    dtype: str | None = None,
    **changes: Any,
) -> None:
    """Draws a picture again from the settings that it carries, to ``OUT/NAME.png``.

    Args:
      picture: a PNG that sample.py wrote.
      out: folder.
      workdir: where the MCM is, or the MCMs are, if no more where they were.
      preview_every: see :meth:`Drawer.draw`.
      base: another base than it was drawn on, as :class:`Drawer` takes it, with ``accept_base``.
      dtype: another one than it was computed in.
      changes: what shall be otherwise: :data:`mcm_jax.jobs.CONTROLS`, or fields of
        :class:`mcm_jax.sampling.SamplingSettings`; None is as it was, and so are modalities that are not named.

    Raises:
      UserError: it carries no settings, the MCM or the base is another one, a file of it is gone or changed, or a
        change does nothing.
    """
    said, changes = read_record(picture), {k: v for k, v in changes.items() if v is not None}
    try:
        given = _over({k: said[k] for k in (*_JOB, *_SETTINGS) if said.get(k) is not None}, changes)
        files = {f"conditions.{name}": file for name, file in said["conditions"].items()}
        files |= {key: said[key] for key in FILES if key in given and key not in changes}
        for file, expected in ((file["file"], file["sha256"]) for file in files.values()):
            if not os.path.isfile(file):
                raise UserError(f"{picture}: was drawn for {file}, which is gone; put it back")
            if sha256(file) != expected:
                raise UserError(f"{picture}: was drawn for another {file} (SHA-256 {expected[:16]}); put that back")
        given |= {key: file["file"] for key, file in files.items() if key in FILES}
        given["conditions"] = {name: file["file"] for name, file in said["conditions"].items()}
        place, digest = said["workdir"] if workdir is None else workdir, said["mcm_sha256"]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{picture}: its settings are incomplete ({e}); expected a PNG that sample.py wrote") from e
    # What it was drawn on was accepted then. What is typed is checked with what the picture says, not with the run's.
    batch_size = changes.get("batch_size")
    place_of_base = said.get("base_path") if base is None else base
    drawer = Drawer(
        place, place_of_base, base is None or accept_base, dtype or said.get("dtype"), batch_size=batch_size
    )
    drawer.check_text(changes, "--")
    digests, found = ([d] if isinstance(d, str) else d for d in (digest, drawer.recorder.facts["mcm_sha256"]))
    if digests != found:
        short = [", ".join(d[:16] for d in each) for each in (digests, found)]
        raise UserError(
            f"{picture}: was drawn by another MCM than {', '.join(drawer.workdirs)} (SHA-256 {short[0]}, there "
            f"{short[1]}); name its own with --workdir"
        )
    now = drawer.pipeline.base
    if base is None and now.fingerprint != said.get("fingerprint"):
        raise UserError(
            f"{picture}: was drawn on the base {said.get('base')!r} with fingerprint "
            f"{str(said.get('fingerprint'))[:16]}, but {now.name!r} has {now.fingerprint[:16]}; name its own, or one "
            f"to draw on instead, with --base"
        )
    options = now.schedule.options
    if base is None and (was := said.get("schedule", options)) != options:
        odd = "; ".join(f"{k}: {v} then, {options.get(k)} now" for k, v in was.items() if v != options.get(k))
        raise UserError(f"{picture}: was drawn by another scheduler_config.json of {now.name!r} ({odd}); put that back")
    # What a picture does not say is the default, not the run's.
    job = drawer.job(pathlib.Path(picture).stem, given, str(picture), SamplingSettings())
    check_typed([job], changes)
    target = pathlib.Path(out).expanduser() / f"{job.name}.png"
    if not is_drawn(target, drawer.record(job)):
        check_target(target, {os.path.realpath(picture): "--replay"})
    drawer.draw([job], out, preview_every=preview_every)
