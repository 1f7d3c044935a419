"""Jobs to pictures: what is drawn together, by which base and MCMs."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
from mcm_jax.jobs.record import TEXT, Recorder, check_target, inputs_of, is_drawn, is_ours
from mcm_jax.jobs.sheet import SHEET, contact_sheet
from mcm_jax.jobs.watch import PREVIEW, Watch, write_picture
from mcm_jax.pipeline import Pipeline
from mcm_jax.request import PER_SAMPLE, check_text
from mcm_jax.sampling import SamplingSettings

_DEFAULTS = dataclasses.asdict(SamplingSettings())
_EACH = {key: _DEFAULTS[key] for key in PER_SAMPLE}


class Drawn(NamedTuple):
    """What became of jobs.

    Attributes:
      new: names of the pictures that were drawn.
      kept: of those that were there.
      problems: what is wrong with the others, and with what no job came of.
    """

    new: list[str]
    kept: list[str]
    problems: list[str]


class Drawer:
    """Draws jobs from a base under MCMs' control; of one process.

    Args:
      workdir: of a training run, or the name of a shipped MCM; or several, of MCMs of one base that act together.
      base: another place of the base; and whether it may be a fine-tune of the MCM's own (``accept_base``), and what is
        computed in (``dtype``): see :meth:`mcm_jax.pipeline.Pipeline.from_folder`.
      changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from the config's, the default of every
        job; None is as there.

    Raises:
      UserError: no such MCM, another base, MCMs of different bases, a wrong setting, or one of text for a base without.
    """

    def __init__(
        self,
        workdir: str | Sequence[str],
        base: str | None = None,
        accept_base: bool = False,
        dtype: str | None = None,
        **changes: Any,
    ):
        self.workdirs = (workdir,) if isinstance(workdir, str) else tuple(workdir)
        self.pipeline = Pipeline.from_folder(*self.workdirs, base=base, accept_base=accept_base, dtype=dtype)
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
        self,
        jobs: Sequence[Job],
        out: str | os.PathLike,
        problems: Sequence[str] = (),
        preview_every: int = 0,
        sheet: int = 0,
    ) -> int:
        """:meth:`attempt`, and says how many pictures there are.

        Args:
          jobs: and the next three: see there.
          out: folder.
          problems: of other jobs.
          preview_every: steps.
          sheet: so many of the jobs are shown in ``OUT/sheet.png`` (:mod:`mcm_jax.jobs.sheet`), each with what the base
            alone makes of the same noise; 0 for none.

        Returns:
          How many were drawn.

        Raises:
          UserError: some could not be drawn: which, when the others and the sheet are there; or see :meth:`attempt`.
        """
        out = pathlib.Path(out).expanduser()
        expect(sheet >= 0, "sheet", "a number of pictures, or 0 (none)", sheet)
        if sheet:
            self._check_own(SHEET, "--sheet", jobs, out)
        done = self.attempt(jobs, out, problems, preview_every)
        print(f"{len(done.new)} pictures drawn, {len(done.kept)} were there: {out}")
        whole = {*done.new, *done.kept}
        if sheet and (shown := [job for job in jobs if job.name in whole][:sheet]):
            alone = self.alone(shown, self.batch_size(len(jobs)))
            write_picture(out / SHEET, contact_sheet(shown, self.files, self.pipeline, out, alone))
        if problems := done.problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            listed = "\n".join(f"  {line}" for line in (*problems[:20], *more))
            raise UserError(f"{len(problems)} jobs failed; the other pictures are in {out}:\n{listed}")
        return len(done.new)

    def attempt(
        self, jobs: Sequence[Job], out: str | os.PathLike, problems: Sequence[str] = (), preview_every: int = 0
    ) -> Drawn:
        """Draws the pictures that are not there yet, ``OUT/NAME.png``, and shows how far it is and how long it takes.

        A picture that is there and carries a job's very settings stays. Jobs that cost alike are drawn together, so
        the order is not the list's. An interrupt leaves whole pictures, and the same call goes on.

        Args:
          jobs: each of another name.
          out: folder.
          problems: of other jobs, which come with those of these.
          preview_every: steps after which ``OUT/preview.png`` shows the batch as it stands; 0 for none.

        Returns:
          What became of them: an unreadable condition or a NaN is a problem of its job alone.

        Raises:
          UserError: the folder cannot be written.
        """
        if jax.process_count() > 1:  # each would look for itself which pictures are there
            raise UserError("jobs are drawn by one process; start it alone, or give each a list of its own")
        out, problems, todo, new, kept = pathlib.Path(out).expanduser(), list(problems), [], [], []
        expect(preview_every >= 0, "preview_every", "a number of steps, or 0 (none)", preview_every)
        check_writable(out, "--out")
        if preview_every:
            self._check_own(PREVIEW, "--preview_every", jobs, out)
        inputs = inputs_of(jobs)
        records: dict[str, dict[str, Any]] = {}
        for job in jobs:
            try:
                records[job.name] = self.record(job)
                path = out / f"{job.name}.png"
                if is_drawn(path, records[job.name]):
                    kept.append(job.name)
                else:
                    check_target(path, inputs)
                    todo.append(job)
            except UserError as e:
                problems.append(f"{job.source}: {e}")
        size = self.batch_size(len(jobs))  # the same when the command goes on
        batches = self._batches(todo, size)
        steps = [self.steps(batch[0]) for batch in batches]
        with Watch(sum(steps), (len(jobs), len(kept)), out, preview_every) as watch:
            for batch, count in zip(batches, steps, strict=True):
                readable = [job for job in batch if self._is_readable(job, problems)]
                if not readable:
                    watch.skip(count)
                    continue
                images, there = self.sample(readable, size, watch, watch.every), len(new)
                for job, image in zip(readable, images, strict=True):
                    if np.isfinite(image).all():
                        texts = {TEXT: json.dumps(records[job.name])}
                        write_picture(out / f"{job.name}.png", pictures.to_uint8(image), texts)
                        new.append(job.name)
                    else:
                        problems.append(
                            f"{job.source} ({job.name}, seed {job.seed}): came out as NaN and was not written; take "
                            f"less guidance and strength, or --dtype=float32"
                        )
                watch.drawn(len(new) - there)
        return Drawn(new, kept, problems)

    def alone(self, jobs: Sequence[Job], batch_size: int) -> dict[str, np.ndarray]:
        """What the base makes of jobs without control, uint8 ``[H, W, 3]`` by their names; their files are read."""
        free = [dataclasses.replace(job, settings=job.settings.but(guidance=0.0)) for job in jobs]
        found, batches = {}, self._batches(free, batch_size)
        with Watch(sum(self.steps(batch[0]) for batch in batches), (len(jobs), 0)) as watch:
            for batch in batches:
                images = pictures.to_uint8(np.nan_to_num(self.sample(batch, batch_size, watch, watch.every)))
                found |= {job.name: image for job, image in zip(batch, images, strict=True)}
                watch.drawn(len(batch))
        return found

    def batch_size(self, count: int) -> int:
        """Of so many jobs: the settings', or less for few, as far as the devices divide it."""
        return self.pipeline.filled(max(1, min(self.settings.batch_size, count)))

    def _batches(self, jobs: Sequence[Job], size: int) -> list[list[Job]]:
        """Jobs that share a batch, those that cost alike together."""
        sorted_ = sorted(((self._shared(job), self._cost(job), i) for i, job in enumerate(jobs)))
        groups = [[jobs[i] for *_, i in group] for _, group in itertools.groupby(sorted_, lambda item: item[0])]
        return [group[i : i + size] for group in groups for i in range(0, len(group), size)]

    def _check_own(self, name: str, flag: str, jobs: Sequence[Job], out: pathlib.Path) -> None:
        """Raises UserError where a picture beside the jobs' would replace something."""
        if any(f"{job.name}.png" == name for job in jobs):
            raise UserError(f"{flag}: {name} is a job's own picture; give that job another name")
        if is_ours(out / name):
            raise UserError(f"{flag}: {out / name} is a picture of another list; take another --out")
        check_target(out / name, inputs_of(jobs), own=True)

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
