"""Jobs to pictures: what is drawn together, by which base and MCMs."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mcm_jax import config, pictures, sampling
from mcm_jax.engine import Progress
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable
from mcm_jax.jobs.files import Files
from mcm_jax.jobs.job import Job
from mcm_jax.jobs.record import TEXT, Recorder, check_target, is_drawn
from mcm_jax.jobs.watch import PREVIEW, Watch, write_picture
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import PER_SAMPLE, check_text
from mcm_jax.sampling import SamplingSettings

_DEFAULTS = dataclasses.asdict(SamplingSettings())
_EACH = {key: _DEFAULTS[key] for key in PER_SAMPLE}


class Drawer:
    """Draws jobs from a base under MCMs' control; of one process.

    Args:
      workdir: of a training run, or the name of a shipped MCM; or several, of MCMs of one base that act together.
      base: another place of the base, and whether it may be a fine-tune of the MCM's own (``accept_base``): see
        :meth:`mcm_jax.pipeline.Pipeline.from_folder`.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from the config's, the default of every
        job; None is as there.

    Raises:
      UserError: no such MCM, another base, MCMs of different bases, a wrong setting, or one of text for a base without.
    """

    def __init__(
        self, workdir: str | Sequence[str], base: str | None = None, accept_base: bool = False, **changes: Any
    ):
        self.workdirs = (workdir,) if isinstance(workdir, str) else tuple(workdir)
        self.pipeline = Pipeline.from_folder(*self.workdirs, base=base, accept_base=accept_base)
        self.settings = self.pipeline.settings.but(**changes)
        self.check_text(changes, "--")
        self.settings.check_for(self.pipeline.base.schedule)
        self.files = Files(self.pipeline)
        self.recorder = Recorder(self.workdirs, self.pipeline, base)
        self._table = functools.lru_cache(256)(self._table_of)
        self._programs: set[Any] = set()

    def check_text(self, given: Mapping[str, Any], prefix: str = "") -> None:
        """Raises UserError where settings of text are given (None is not) and the base has none."""
        check_text(self.pipeline.base, given, prefix)

    def job(
        self, name: str, given: Mapping[str, Any], source: str = "", settings: SamplingSettings | None = None
    ) -> Job:
        """A job for this base and these MCMs, checked: all but what is in its pictures.

        Args:
          name: of the picture.
          given: fields of :class:`Job` and of :class:`mcm_jax.sampling.SamplingSettings`; None is not given.
          source: where it is from, for messages.
          settings: of what is not given; None is this drawer's.

        Raises:
          UserError: something is unknown, of the wrong type or out of range, a file is not there, the base has no such
            size: names the key.
        """
        given = {"conditions": {}, **{k: v for k, v in given.items() if v is not None}}
        if "variation_seed" in given and "variation" not in given:
            raise UserError(
                "variation_seed goes with a variation: how far the noise is moved towards its own, in [0, 1]"
            )
        how = dataclasses.asdict(settings or self.settings)
        how |= {key: given.pop(key) for key in [*given] if key in how}
        try:
            job = config.read(Job, {"name": name, "source": source, "settings": how, **given}, where="")
        except UserError as e:
            raise UserError(str(e).removeprefix(".").removeprefix("settings.")) from e
        known = self.files.known
        for key in ("conditions", "strength", "window"):
            if unknown := sorted(getattr(job, key).keys() - known.keys()):
                raise UserError(f"{key}: the MCM knows {', '.join(known)}, not {', '.join(unknown)}")
        count, names = len(self.workdirs), ", ".join(self.workdirs)
        expect(len(job.weights) in (0, count), "weights", f"{count}, one an MCM ({names})", job.weights)
        for key, path in job.files.items():
            if not os.path.isfile(path):
                raise UserError(f"{key}: {path}: no such file")
        self._shared(job)
        self.steps(job)
        return job

    def record(self, job: Job) -> dict[str, Any]:
        """See :meth:`mcm_jax.jobs.record.Recorder.record`."""
        return self.recorder.record(job)

    def sample(
        self,
        jobs: Sequence[Job],
        batch_size: int | None = None,
        tell: Callable[[Progress], object] | None = None,
        every: int = 1,
    ) -> np.ndarray:
        """Samples a picture a job, float32 ``[N, H, W, 3]``; their files are read already or will be.

        Args:
          jobs: of one size and of one table: they differ in what each sample of a batch may have its own of.
          batch_size: of the compiled program; None is the settings'.
          tell: is told how far each batch is, after ``every`` steps.
          every: steps.

        Raises:
          UserError: a file cannot be read.
        """
        first, base = jobs[0], self._base(jobs[0])
        if any(self._shared(job)[1:] != self._shared(first)[1:] for job in jobs):
            raise ValueError("jobs of different sizes, solvers, steps or pictures to begin with share no batch")
        given = self.files.arrays(jobs, base)
        ones = [1.0] * len(self.workdirs)
        given["weights"] = np.array([j.weights or ones for j in jobs], np.float32).T
        if self.pipeline.base.is_text_conditional:
            given["prompts"] = [j.prompt for j in jobs]
        keys = _keys([(j.seed, j.sample) for j in jobs])
        if any(j.variation for j in jobs):
            others = _keys([(j.variation_seed if j.variation else j.seed, j.sample) for j in jobs])
            own, other = (_noise(k, base.latent_shape) for k in (keys, others))
            share = jnp.array([j.variation for j in jobs], jnp.float32)
            given["latents"] = np.asarray(sampling.slerp(own, other, share))
        how = dataclasses.asdict(first.settings) | {k: [getattr(j.settings, k) for j in jobs] for k in PER_SAMPLE}
        how["batch_size"] = batch_size or how["batch_size"]
        self._note(any(self._shared(j)[0] for j in jobs), base, first.settings.modulate, how["batch_size"])
        return self.pipeline(given.pop("conditions"), keys, callback=tell, every=every, **given, **how)

    def draw(
        self, jobs: Sequence[Job], out: str | os.PathLike, problems: Sequence[str] = (), preview_every: int = 0
    ) -> int:
        """Draws the pictures that are not there yet, ``OUT/NAME.png``, and says how far it is and how long it takes.

        A picture that is there and carries a job's very settings stays. Jobs that cost alike are drawn together, so
        the order is not the list's. An interrupt leaves whole pictures, and the same call goes on.

        Args:
          jobs: each of another name.
          out: folder.
          problems: of other jobs, which are told at the end with those of these.
          preview_every: steps after which ``OUT/preview.png`` shows the batch as it stands; 0 for none.

        Returns:
          How many were drawn.

        Raises:
          UserError: some could not be drawn (an unreadable condition, a NaN): which, when the others are; or the folder
            cannot be written.
        """
        if jax.process_count() > 1:  # each would look for itself which pictures are there
            raise UserError("lists of jobs are drawn by one process; start it alone, or give each a list of its own")
        out, problems, todo, drawn = pathlib.Path(out), list(problems), [], 0
        if preview_every and any(f"{job.name}.png" == PREVIEW for job in jobs):
            raise UserError(f"--preview_every: {PREVIEW} is a job's own picture; give that job another name")
        check_writable(out, "--out")
        inputs = {os.path.realpath(path): key for job in jobs for key, path in job.files.items()}
        if preview_every:
            check_target(out / PREVIEW, inputs, own=True)
        for job in jobs:
            try:
                record = self.record(job)
                path = out / f"{job.name}.png"
                if not is_drawn(path, record):
                    check_target(path, inputs)
                    todo.append((self._shared(job), self._cost(job), job, record))
            except UserError as e:
                problems.append(f"{job.source}: {e}")
        todo.sort(key=lambda item: item[:2])
        size = max(1, min(self.settings.batch_size, len(jobs)))  # the same when the command goes on
        size = self.pipeline.filled(size)
        groups = [list(group) for _, group in itertools.groupby(todo, lambda item: item[0])]
        batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        steps = [self.steps(batch[0][2]) for batch in batches]
        with Watch(sum(steps), (len(jobs), len(jobs) - len(todo)), out, preview_every) as watch:
            for batch, count in zip(batches, steps, strict=True):
                readable = [(job, record) for *_, job, record in batch if self._is_readable(job, problems)]
                if not readable:
                    watch.skip(count)
                    continue
                images, there = self.sample([job for job, _ in readable], size, watch, watch.every), 0
                for (job, record), image in zip(readable, images, strict=True):
                    if np.isfinite(image).all():
                        texts = {TEXT: json.dumps(record)}
                        write_picture(out / f"{job.name}.png", pictures.to_uint8(image), texts)
                        there += 1
                    else:
                        problems.append(
                            f"{job.source} ({job.name}, seed {job.seed}): came out as NaN and was not written; "
                            f"take less guidance and strength, or float32"
                        )
                drawn += there
                watch.drawn(there)
        print(f"{drawn} pictures drawn, {len(jobs) - len(todo)} were there: {out}")
        if problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            listed = "\n".join(f"  {line}" for line in (*problems[:20], *more))
            raise UserError(f"{len(problems)} jobs failed; the other pictures are in {out}:\n{listed}")
        return drawn

    def steps(self, job: Job) -> int:
        """Sampling steps that a job takes. Raises UserError where the base's schedule does not have them."""
        table = self._table(dataclasses.replace(job.settings, **_EACH), bool(job.image))
        return int(table.step[int(table.count) - 1]) + 1

    def _table_of(self, settings: SamplingSettings, from_picture: bool) -> Any:
        return settings.table(self.pipeline.base.schedule, from_picture)

    def _base(self, job: Job) -> Any:
        return self.pipeline.sized(job.settings.height, job.settings.width)

    def _shared(self, job: Job) -> tuple:
        """What the jobs of a batch have in common: first whether there is text guidance, then all that they must."""
        s, base = job.settings, self._base(job)
        begins = s.image_strength if job.image else 0.0
        same = {"height": 0, "width": 0, "batch_size": 1, "image_strength": 1.0, **_EACH}
        rest = dataclasses.astuple(dataclasses.replace(s, **same))
        return self.pipeline.is_guided(s), s.modulate, base.image_shape, begins, rest

    def _cost(self, job: Job) -> tuple:
        """What a batch of the same makes cheap."""
        s = job.settings
        partly = len({job.strength.get(name, 1.0) for name in job.conditions} - {0.0, 1.0})
        return s.guidance == 0, partly, s.start, s.end, sorted(job.window.items())

    def _is_readable(self, job: Job, problems: list[str]) -> bool:
        try:
            self.files.check(job, self._base(job))
        except UserError as e:
            problems.append(f"{job.source}: {e}")
            return False
        return True

    def _note(self, guided: bool, base: Any, modulate: str, batch_size: int) -> None:
        """Says so before the first batch of a program: the bar would stand still."""
        program = guided, base.image_shape, modulate, batch_size
        if program not in self._programs:
            self._programs.add(program)
            height, width, _ = base.image_shape
            text = " with text guidance" if guided else ""
            what = f"compiling, once: batches of {batch_size}, {width}x{height} pixels{text}"
            tqdm.write(what, file=sys.stderr)


_noise = jax.jit(sampling.initial_noise, static_argnums=1)


def _keys(numbers: Iterable[tuple[int, int]]) -> jax.Array:
    """Of each seed and sample: ``fold_in(key(seed), sample)``."""
    seeds, samples = (np.array(values, np.uint32) for values in zip(*numbers, strict=True))
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, samples)
