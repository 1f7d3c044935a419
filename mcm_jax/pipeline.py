"""A frozen base and trained MCMs together: what samples, from arrays to arrays."""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mcm_jax import assets, control, pictures, sampling, sharding
from mcm_jax import config as config_lib
from mcm_jax.base import Base
from mcm_jax.data import DataSettings
from mcm_jax.data.classes import Classes
from mcm_jax.data.reading import condition_of, read_condition
from mcm_jax.engine import Batch, Engine, Progress
from mcm_jax.errors import UserError, expect
from mcm_jax.mcm import DTYPES
from mcm_jax.modalities import Modality
from mcm_jax.modalities.files import note_grey_step
from mcm_jax.request import Conditions, read_conditions, read_places, read_texts, settings_of_each
from mcm_jax.samplers import Table
from mcm_jax.sampling import SamplingSettings
from mcm_jax.trained import WEIGHTS, ModelSettings, Trained, read_mcm

_OF_SAMPLING = {field.name for field in dataclasses.fields(SamplingSettings)}


class Pipeline:
    """Samples from a base under the control of MCMs.

    Args:
      base: the frozen model.
      mcms: one, or several that were trained apart on this base, whose changes of the prediction are added up.
      settings: how samples are drawn, unless :meth:`__call__` is told otherwise.
      mesh: the devices that share the work, which the base's params are put on unless they are there; those of this
        process if left out. One of several processes' devices has all of these processes make the same calls.
      dtype: what base and MCMs compute in, where that is not what they were trained with: said of what is drawn.

    Raises:
      UserError: two MCMs mean different things by a modality's name.
    """

    def __init__(
        self,
        base: Base,
        mcms: Trained | Sequence[Trained],
        settings: SamplingSettings | None = None,
        mesh: jax.sharding.Mesh | None = None,
        dtype: str | None = None,
    ):
        self.mesh = sharding.local_mesh() if mesh is None else mesh
        self.dtype = dtype
        self.base = dataclasses.replace(base, params=sharding.place(base.params, self.mesh))
        self.mcms = (mcms,) if isinstance(mcms, Trained) else tuple(mcms)
        self.settings = settings or SamplingSettings()
        known: dict[str, Modality] = {}
        for mcm in self.mcms:
            for modality in mcm.modulator.modalities:
                other = known.setdefault(modality.name, modality)
                if other != modality:
                    raise UserError(
                        f"the MCMs mean different things by {modality.name!r}: {_meaning(other)} and "
                        f"{_meaning(modality)}; sample with one of them at a time"
                    )
        self.modalities = tuple(known.values())
        self._check_classes()
        self.engine = Engine(self.base, tuple(mcm.modulator for mcm in self.mcms), self.mesh)
        self._sizes: dict[Any, set[int]] = {}  # of batches, by what else decides the program

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike,
        *others: str | os.PathLike,
        base: str | os.PathLike | None = None,
        accept_base: bool = False,
        dtype: str | None = None,
    ) -> "Pipeline":
        """Loads a workdir, or a shipped MCM by its name, with its base; several MCMs of one base act together.

        Settings of sampling are the first one's.

        Args:
          folder: of the MCM.
          others: of further ones.
          base: where the base is, as a config's ``base.path`` says it; None is as in the first one's.
          accept_base: also takes a base that an MCM was not trained on, a fine-tune of its own: the same noise
            schedule and latents, other weights. With a warning.
          dtype: what base and MCMs compute in, ``float32``, ``bfloat16``, ``float16``; None is as the configs say, in
            which they were trained. The MCMs' params stay float32.

        Raises:
          UserError: something is missing, corrupt, or does not belong together.
        """
        folders = (folder, *others)
        paths = [assets.resolve(os.fspath(folder)) for folder in folders]
        found = [config_lib.load(ModelSettings, path, others=True) for path in paths]
        mesh = sharding.local_mesh(found[0].mesh)
        own = found[0].base
        expect(dtype is None or dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", dtype)
        loaded = (own if base is None else dataclasses.replace(own, path=os.fspath(base))).load(mesh)
        if dtype and dtype != loaded.dtype:
            loaded = loaded.cast(dtype)
        mcms = []
        for folder, path, one in zip(folders, paths, found, strict=True):
            settings = dataclasses.replace(one.mcm, dtype=dtype or one.mcm.dtype)
            modulator = settings.modulator(one.modalities.shown, loaded)
            accept, whose = one.base if accept_base else None, os.fspath(folders[0]) if mcms and base is None else ""
            params, step = read_mcm(path / WEIGHTS, modulator.shapes(loaded), loaded, accept, whose)
            mcms.append(Trained(modulator, params, step, os.fspath(folder), one.data))
        as_trained = {own.dtype, *(one.mcm.dtype for one in found)} == {dtype}
        return cls(loaded, mcms, found[0].sampling, mesh, None if as_trained else dtype)

    def update(self, params: Any) -> None:
        """Takes other params for its one MCM: those of a training's moment."""
        (mcm,) = self.mcms
        self.mcms = (mcm._replace(params=params),)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of conditions for pictures of the base's size; see :meth:`grid_for`."""
        return self.grid_for(self.base)

    def grid_for(self, base: Base) -> tuple[int, int]:
        """Height and width of conditions: the finest that an MCM asks for (:meth:`mcm_jax.mcm.Modulator.grid`)."""
        return max((mcm.modulator.grid(base) for mcm in self.mcms), default=base.latent_shape[:2])

    def sized(self, height: int = 0, width: int = 0) -> Base:
        """The base for pictures of a size, 0 for its own. Raises UserError where base or MCMs do not take it."""
        return self.base.sized(height, width, self.base.factor * max([m.modulator.multiple for m in self.mcms] or [1]))

    def _runs_of(self, name: str) -> Iterator[tuple[DataSettings, pathlib.Path]]:
        """Data set and folder of each MCM that knows a modality."""
        for mcm in self.mcms:
            if mcm.data and name in {m.name for m in mcm.modulator.modalities}:
                yield mcm.data, assets.resolve(mcm.name)

    def _check_classes(self) -> None:
        for m in self.modalities if len(self.mcms) > 1 else ():
            if m.kind != "labels":
                continue
            found = [classes for data, folder in self._runs_of(m.name) if (classes := data.described(m.name, folder))]
            if len({classes.names for classes in found}) > 1:
                raise UserError(
                    f"the MCMs mean different things by {m.name!r}: the classes {', '.join(found[0].names)} and "
                    f"{', '.join(found[1].names)}; sample with one of them at a time"
                )

    def classes(self, name: str) -> Classes | None:
        """What the data set of the first MCM that knows a modality of labels says of its classes."""
        return next((data.described(name, folder) for data, folder in self._runs_of(name)), None)

    def palette(self, name: str) -> np.ndarray | None:
        """The colours of a modality's classes, uint8 ``[C, 3]``, where they are known."""
        return next((data.palette(name, folder) for data, folder in self._runs_of(name)), None)

    def read(self, source: str | os.PathLike | Image.Image, name: str) -> np.ndarray:
        """The condition in a picture or its file, at its own resolution; labels by the colours of their classes, too.

        Raises:
          UserError: it cannot be read, or holds something else than it should.
        """
        (modality,) = (m for m in self.modalities if m.name == name)
        classes = self.classes(name) if modality.kind == "labels" else None
        if isinstance(source, Image.Image):
            return condition_of(note_grey_step(source), name, modality, classes)
        return read_condition(source, modality, classes)

    def is_guided(self, settings: SamplingSettings) -> bool:
        """Whether the base is asked about the negative prompt, too."""
        return self.base.is_text_conditional and settings.text_guidance != 1

    def sampling_bytes(self, batch_size: int) -> int:
        """Memory that sampling a batch takes on each device, parameters and all, by the compiler's own count.

        The base's params may be shapes alone (:func:`mcm_jax.base.outline`). Takes as long as compiling does.

        Args:
          batch_size: images, over all devices.
        """
        base, shape, batch_size = self.base, jax.ShapeDtypeStruct, self.filled(batch_size)
        guided, context = self.is_guided(self.settings), None
        if base.is_text_conditional:
            ids = shape((batch_size, base.tokenizer.length), jnp.int32)
            context = jax.eval_shape(base.encode_tokens, base.params, ids)
        table = self.settings.table(base.schedule)
        names = [""] * len(self.mcms)
        nothing = {m.name: m.null(batch_size, *self.grid) for m in self.modalities}
        given = read_conditions(batch_size, self.grid, self.modalities, names, nothing, None, None, None, None)
        controls, calls = self._controls(base, given, [self.settings] * batch_size, np.arange(batch_size), table)
        latent, plane = ((batch_size, *base.latent_shape[:2], n) for n in (base.latent_shape[2], 1))
        rows = sharding.batch_sharding(self.mesh)
        noise, mask, per = (shape(s, jnp.float32) for s in (latent, plane, (batch_size,)))
        batch = Batch(controls, mask, per, per, sampling.sample_keys(0, batch_size), noise, noise, shape(plane, bool))
        batch = batch._replace(context=context, negative=context if guided else None)
        state = jax.eval_shape(sampling.begin, noise, table)
        batch, state = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=rows), (batch, state))
        params = sharding.replicate(tuple(mcm.modulator.shapes(base) for mcm in self.mcms), self.mesh)
        zero = np.int32(0)
        run = self.engine.advance(guided, self.settings.modulate)
        programs = (
            run.lower(base.params, params, state, batch, table, calls, zero, zero),
            self.engine.finish.lower(base.params, state.x, batch),
        )
        plans = [program.compile().memory_analysis() for program in programs]
        return max(
            p.temp_size_in_bytes + p.argument_size_in_bytes + p.output_size_in_bytes - p.alias_size_in_bytes
            for p in plans
        )

    def filled(self, batch_size: int) -> int:
        """The next batch size that the devices divide: what a batch is filled up to."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def _controls(
        self, base: Base, given: Conditions, each: Sequence[SamplingSettings], rows: np.ndarray, table: Table
    ) -> tuple[tuple[control.Control, ...], tuple[np.ndarray, ...]]:
        """Of each MCM, for some rows of what was given."""
        controls, calls = [], []
        each = [each[i] for i in rows]
        for mcm, weights in zip(self.mcms, given.weights, strict=True):
            modalities, grid = mcm.modulator.modalities, mcm.modulator.grid(base)
            conditions = {}
            for m in modalities:
                values = given.values[m.name][rows]
                conditions[m.name] = values if values.shape[1:3] == grid else m.resize_all(values, *grid)
            strengths = np.stack([given.strengths[m.name][rows] for m in modalities], 1)
            windows = np.stack([given.windows[m.name][rows] for m in modalities], 1)
            rests = len(self.mcms) > 1
            one, asked = control.plan(conditions, strengths, windows, weights[rows], each, table, rests)
            controls.append(one)
            calls.append(asked)
        return tuple(controls), tuple(calls)

    def __call__(
        self,
        conditions: Mapping[str, np.ndarray],
        keys: jax.Array,
        *,
        prompts: Sequence[str] | None = None,
        present: Mapping[str, np.ndarray] | None = None,
        strength: Mapping[str, np.ndarray | float] | None = None,
        window: Mapping[str, np.ndarray | Sequence[float]] | None = None,
        weights: Sequence[np.ndarray | float] | None = None,
        mask: np.ndarray | None = None,
        image: np.ndarray | None = None,
        inpaint: np.ndarray | None = None,
        latents: np.ndarray | None = None,
        context: np.ndarray | None = None,
        negative_context: np.ndarray | None = None,
        callback: Callable[[Progress], object] | None = None,
        every: int = 1,
        **changes: Any,
    ) -> np.ndarray:
        """Samples one image a key.

        Args:
          conditions: for each modality that is given, ``[N, H, W]`` on :meth:`grid_for` the size, or ``[N, H, W,
            planes]`` (labels int, others in [0, 1]); any subset. One MCM that is given none acts as it does unasked;
            of several, each rests for samples that show it nothing.
          keys: ``[N]``, see :func:`mcm_jax.sampling.sample_keys`.
          prompts: N texts, for a text-conditional base; None is the empty prompt for each.
          present: of modalities that are given, bool ``[N]``: which samples are shown them; all where left out.
          strength: of modalities, ``[N]`` or one for all, at least 0: how much each counts, see
            :func:`mcm_jax.control.subsets_of`; 0 is absent, 1 (where left out) shown. Each that is neither costs a
            further call of the MCM in its batch's steps.
          window: of modalities, two shares of the steps between which each is shown, ``[2]`` or ``[N, 2]``; besides the
            settings' start and end. An MCM whose given modalities are all outside theirs does not run.
          weights: of each MCM, ``[N]`` or one for all, at least 0: ``eps + guidance * sum_i w_i (eps'_i - eps)``; 1
            where left out.
          mask: ``[N, h, w]`` in [0, 1] on the latents' grid: where the conditions hold; elsewhere the base is alone.
          image: pictures to begin with, ``[N, H, W, 3]`` in [-1, 1] of the size that is sampled; as far as
            ``image_strength`` says.
          inpaint: bool ``[N, H, W]``: which pixels of ``image`` are drawn anew; the others stay exactly.
          latents: noise to begin with in place of the keys', standard normal, ``[N, h, w, C]``.
          context: ``[N, L, D]``, in place of prompts.
          negative_context: ``[N, L, D]``, in place of negative prompts, where there is text guidance.
          callback: is told how far each batch is, after every ``every`` steps and the last.
          every: steps.
          changes: fields of :class:`mcm_jax.sampling.SamplingSettings` that differ from :attr:`settings`, e.g.
            ``guidance=2.0``; those in :data:`mcm_jax.request.PER_SAMPLE` one for all or N. Batches are filled up to
            what the devices divide, the last one too: one compiled function serves any N. Where any sample has text
            guidance, all are drawn by the program that has it, which calls the base for both prompts.

        Returns:
          float32 ``[N, H, W, 3]`` in about [-1, 1].

        Raises:
          UserError: something is unknown, out of range or of another shape; names it.
        """
        if not len(keys):
            raise UserError("no keys given: at least one sample is drawn")
        expect(every >= 1, "every", "a number of steps, at least 1", every)
        count, each = len(keys), settings_of_each(self.settings, len(keys), changes)
        settings = each[0]
        base = self.sized(settings.height, settings.width)
        table = settings.table(self.base.schedule, image is not None)
        names, grid = [mcm.name or "the MCM" for mcm in self.mcms], self.grid_for(base)
        given = read_conditions(count, grid, self.modalities, names, conditions, present, strength, window, weights)
        places = read_places(base, count, mask=mask, image=image, inpaint=inpaint, latents=latents)
        guided = any(self.is_guided(s) for s in each)
        if negative_context is not None and changes.get("negative_prompt") is not None:
            raise UserError("negative_prompt and negative_context are the same thing twice; give one of them")
        negatives = [s.negative_prompt for s in each] if guided else None
        texts = read_texts(self.base, count, prompts, negatives, context, negative_context)
        batch_size = self.filled(settings.batch_size)
        self._note(batch_size, (base.latent_shape, guided, settings.modulate))
        own, images = sharding.local_rows(self.mesh, batch_size), []
        params = sharding.replicate(tuple(mcm.params for mcm in self.mcms), self.mesh)
        for start in range(0, count, batch_size):
            everyone = np.arange(start, start + batch_size) % count  # the last batch starts over to fill up
            controls, calls = self._controls(base, given, each, everyone, table)
            rows = everyone[own]
            batch = Batch(
                jax.tree.map(lambda value: value[own], controls),
                places.mask[rows],
                np.array([each[i].text_guidance for i in rows], np.float32),
                np.array([each[i].text_rescale for i in rows], np.float32),
                keys[rows],
                None if latents is None else places.latents[rows],
                None,
                places.known[rows],
                *(text[rows] if text is not None else None for text in texts),
            )
            samples = range(start, min(start + batch_size, count))
            tell = None if callback is None else functools.partial(_tell, callback, samples)
            with sharding.memory_errors(
                f"the base and a batch of {batch_size} samples",
                "Fewer at a time: --batch_size (batch_size; while training config.sampling.batch_size); or smaller "
                "numbers: --dtype=bfloat16",
            ):
                batch = sharding.split_batch(batch, self.mesh)
                noise = self.engine.noise(batch.keys, base.latent_shape) if latents is None else batch.noise
                if image is None:
                    picture = self.engine.nothing(noise)
                else:
                    shown = sharding.split_batch(places.image[rows], self.mesh)
                    picture = self.engine.encode(self.base.params, shown)
                batch = batch._replace(noise=noise, picture=picture)
                what, how = (self.base.params, params, batch), (table, calls, guided, settings.modulate)
                images.append(self.engine.draw(*what, *how, tell, every)[: len(samples)])
        images = np.concatenate(images)
        return images if inpaint is None else np.where(np.asarray(inpaint, bool)[..., None], images, places.image)

    def draw(
        self,
        conditions: Mapping[str, str | os.PathLike | Image.Image | np.ndarray | jax.Array | Sequence],
        count: int = 1,
        *,
        seed: int = 0,
        prompt: str | None = None,
        **how: Any,
    ) -> list[Image.Image]:
        """Samples pictures for one set of conditions: what a notebook wants.

        Args:
          conditions: for each modality that is given, a picture file, a picture, or an array (or lists) ``[H, W]`` or
            ``[H, W, planes]``, of any size: brought to the grid, its middle where the aspect ratio is another. Pictures
            of labels may be in the colours of the run's classes, arrays are of classes.
          count: of the pictures, at least 1.
          seed: of the noise; picture i is the same whatever ``count`` is.
          prompt: for a text-conditional base.
          how: as in :meth:`__call__`, e.g. ``guidance=2.0``.

        Raises:
          UserError: as :meth:`__call__`; a file that cannot be read.
        """
        expect(count >= 1, "count", "at least 1", count)
        base = self.sized(how.get("height") or self.settings.height, how.get("width") or self.settings.width)
        known, grid, maps = {m.name: m for m in self.modalities}, self.grid_for(base), {}
        for name, value in conditions.items():
            if name not in known:
                raise UserError(f"this MCM knows the modalities {', '.join(known)}, got {name}")
            if isinstance(value, str | os.PathLike | Image.Image):
                value = self.read(value, name)
            else:
                value = np.asarray(value)
                known[name].check(value, name)
            maps[name] = np.repeat(known[name].fit(value, *grid)[None], count, axis=0)
        prompts = None if prompt is None else [prompt] * count
        # Of the sizes that this program is compiled for already, the smallest that will do, unless it is far too large.
        each = settings_of_each(self.settings, count, {k: v for k, v in how.items() if k in _OF_SAMPLING})
        program = base.latent_shape, any(map(self.is_guided, each)), each[0].modulate
        most = min(self.filled(self.settings.batch_size), 4 * count)
        sizes = [size for size in self._sizes.get(program, ()) if count <= size <= most]
        how = {"batch_size": min(sizes, default=min(count, self.settings.batch_size))} | how
        images = self(maps, sampling.sample_keys(seed, count), prompts=prompts, **how)
        return [Image.fromarray(picture) for picture in pictures.to_uint8(images)]

    def _note(self, batch_size: int, program: Any) -> None:
        """Says so where one batch size after the other is compiled."""
        seen = self._sizes.setdefault(program, set())
        if batch_size not in seen and len(seen) >= 2:
            warnings.warn(
                f"a batch of {batch_size} is compiled anew (before: {', '.join(map(str, sorted(seen)))}); batches are "
                f"filled up, so one batch_size serves any number of samples",
                stacklevel=3,
            )
        seen.add(batch_size)


def _meaning(modality: Modality) -> str:
    unknown = "" if modality.ignore == -1 else f", of which {modality.ignore} is unknown"
    return f"{modality.kind} of {modality.channels} channel(s){unknown}"


def _tell(callback: Callable[[Progress], object], samples: range, now: Progress) -> None:
    """Tells of the samples of a batch without those that it was filled up with."""

    def cut(ask: Callable[[], Any]) -> Any:
        return jax.tree.map(lambda x: x[: len(samples)], ask())

    look = None if now.look is None else functools.partial(cut, now.look)
    callback(now._replace(samples=samples, preview=functools.partial(cut, now.preview), look=look))
