"""The compiled programs that sample: base and MCMs in one, a run of steps at a time.

A program knows shapes alone: batch, picture size, modalities and number of MCMs, whether there is text guidance. Which
solver, how many steps, what acts on which sample and when: all of it is in its arguments. Between two runs of steps the
state is the host's to look at; it is handed on without a copy (its buffers are donated).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax import sampling, sharding
from mcm_jax.base import Base
from mcm_jax.control import Control
from mcm_jax.mcm import Modulator
from mcm_jax.samplers import Table
from mcm_jax.sampling import Point, State

_PIXELS = 8 * 512 * 512
"""What a device's autoencoder works on at a time: its largest activations are 64 times as large as its latents."""


class Batch(NamedTuple):
    """What B samples are drawn of, ``[B, ...]`` each, split over the devices.

    Attributes:
      controls: one for each MCM.
      mask: float32 ``[B, h, w, 1]`` in [0, 1], how much the MCMs act at each place.
      text_guidance: float32 ``[B]``.
      text_rescale: float32 ``[B]``.
      keys: random keys.
      noise: float32 ``[B, h, w, C]``.
      picture: float32 ``[B, h, w, C]``, latents that are begun with, as far as the table keeps of them.
      known: bool ``[B, h, w, 1]``, where the result is to be the picture.
      context: ``[B, L, D]``, of the prompts; None for an unconditional base.
      negative: of the negative prompts; None where there is no text guidance.
    """

    controls: tuple[Control, ...]
    mask: Any
    text_guidance: Any
    text_rescale: Any
    keys: Any
    noise: Any
    picture: Any
    known: Any
    context: Any = None
    negative: Any = None


class View(NamedTuple):
    """What one call of the networks says, for people; ``[B, h, w, C]`` each.

    Attributes:
      base: the base's estimate of x0, for the prompt, without text guidance.
      x0: that estimate after the MCMs.
      maps: of each MCM, gamma and nu, of the subset of the modalities that counts most
        (:func:`mcm_jax.control.subsets_of`): of those that are shown, where all strengths are 0 or 1; zeros where it
        rests.
    """

    base: jax.Array
    x0: jax.Array
    maps: tuple[tuple[jax.Array, jax.Array], ...]


class Progress(NamedTuple):
    """How far a batch is, as a callback is told; what it gives it gives while the callback runs, not after.

    Attributes:
      step: sampling steps that are done.
      steps: of them all.
      samples: which samples of the call the batch draws.
      preview: gives the pictures as they stand, float32 ``[B, H, W, 3]``: the last estimate of x0, decoded. All
        processes of several must ask or none, as for `look`.
      look: gives what the networks say next, a :class:`View` in numpy with the base's and the modulated
        estimate as pictures; costs a step and a further call of each MCM. None after the last step.
    """

    step: int
    steps: int
    samples: range
    preview: Callable[[], np.ndarray]
    look: Callable[[], View] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """Programs for one base and its MCMs.

    Attributes:
      base: the frozen model; its params come as an argument.
      modulators: the MCMs' networks; their params come as an argument, None where there are none and it does nothing.
      mesh: the devices that share the work.
      programs: what was compiled to run steps, by whether there is text guidance and what of it is modulated.
    """

    base: Base
    modulators: tuple[Modulator, ...]
    mesh: jax.sharding.Mesh
    programs: dict[tuple[bool, str], Any] = dataclasses.field(default_factory=dict)

    @property
    def compilations(self) -> int:
        """How many programs were compiled to run steps: one for each shape of a batch, too."""
        return sum(program._cache_size() for program in self.programs.values())

    @functools.cached_property
    def begin(self) -> Any:
        """``(batch, table) -> State``."""
        begin = lambda batch, table: sampling.begin(batch.noise, table, batch.picture)  # noqa: E731
        return jax.jit(begin, out_shardings=self._split)

    @functools.cached_property
    def encode(self) -> Any:
        """``(base_params, pictures) -> latents``, the mean where an autoencoder has a spread."""

        def run(base_params, pictures):
            return self._in_slices(functools.partial(self.base.encode, base_params), pictures, pictures.shape[1:3])

        return jax.jit(run, out_shardings=self._split)

    @functools.cached_property
    def noise(self) -> Any:
        """``(keys, shape) -> [B, *shape]``."""
        return jax.jit(sampling.initial_noise, static_argnums=1, out_shardings=self._split)

    @functools.cached_property
    def nothing(self) -> Any:
        """``noise -> picture``: zeros, where no picture is begun with."""
        return jax.jit(jnp.zeros_like, out_shardings=self._split)

    @property
    def _split(self) -> jax.sharding.Sharding:
        """What is handed from program to program always lies the same, lest one compile anew for it."""
        return sharding.batch_sharding(self.mesh)

    def advance(self, guided: bool, where: str) -> Any:
        """``(base_params, params, state, batch, table, calls, first, last) -> State``: some steps.

        ``calls`` are, for each MCM, int32 ``[R]``, how many subsets are asked for in each row; ``first`` and ``last``
        rows of the table.
        """

        if (guided, where) in self.programs:
            return self.programs[guided, where]

        @functools.partial(jax.jit, donate_argnums=2, out_shardings=self._split)
        def run(base_params, params, state, batch, table, calls, first, last):
            denoise = functools.partial(self._denoise, base_params, params, batch, calls, guided, where)
            hold = functools.partial(_hold, batch)
            return sampling.advance(denoise, state, batch.keys, table, first, last, hold)

        self.programs[guided, where] = run
        return run

    @functools.cached_property
    def look(self) -> Any:
        """``(base_params, params, state, batch, table, calls, row) -> View``: what the next call says."""

        def run(base_params, params, state, batch, table, calls, row):
            table = Table(*(jnp.asarray(part) for part in table))
            alpha, sigma = table.alpha[row], table.sigma[row]
            x = _hold(batch, state.x, alpha, sigma)
            at = Point(*(jnp.full(len(x), part[row]) for part in (table.t, table.alpha, table.sigma)), row)
            eps = self._predict(base_params, x, at, batch.context)
            changed, maps = self._modulate(params, batch.controls, batch.mask, calls, x, eps, at), []
            for modulator, own, control in zip(self.modulators, params, batch.controls, strict=True):
                if own is None:
                    maps.append((jnp.zeros_like(x),) * 2)
                    continue
                most = jnp.argmax(control.weights[:, row], axis=1)
                shown = control.subsets[jnp.arange(len(x)), row, most]
                found = modulator(own, x, eps, at.t, control.conditions, shown, (at.alpha, at.sigma))[1:]
                acts = control.scale[:, row, None, None, None] * batch.mask != 0
                maps.append(tuple(jnp.where(acts, part, 0.0) for part in found))
            return View((x - sigma * eps) / alpha, (x - sigma * changed) / alpha, tuple(maps))

        whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.jit(run, out_shardings=View(self._split, self._split, whole))

    @functools.cached_property
    def finish(self) -> Any:
        """``(base_params, latents, batch) -> [B, H, W, 3]``: pictures, with what is known of the latents put in."""

        @jax.jit
        def run(base_params, latents, batch):
            latents = jnp.where(batch.known, batch.picture, latents)
            size = [pixels * self.base.factor for pixels in latents.shape[1:3]]
            images = self._in_slices(functools.partial(self.base.decode, base_params), latents, size)
            return sharding.keep_whole(images, self.mesh)  # for each process to read

        return run

    def draw(
        self,
        base_params: Any,
        params: Sequence[Any],
        batch: Batch,
        table: Table,
        calls: Sequence[np.ndarray],
        guided: bool,
        where: str,
        callback: Callable[[Progress], object] | None = None,
        every: int = 1,
    ) -> np.ndarray:
        """Draws a batch, float32 ``[B, H, W, 3]``; with a callback, ``every`` steps at a time."""
        run, state = self.advance(guided, where), self.begin(batch, table)
        step = np.asarray(table.step[: int(table.count)])
        steps, row = int(step[-1]) + 1, 0
        for done in [steps] if callback is None else sorted({*range(every, steps, every), steps}):
            last = int(np.searchsorted(step, done))  # the first row of what is not done
            state = run(base_params, params, state, batch, table, calls, np.int32(row), np.int32(last))
            row = last
            if callback is not None:
                jax.block_until_ready(state)  # devices run behind: what is told is done
                preview = functools.partial(self._pictures, base_params, batch, state.x0)
                look = functools.partial(self._view, base_params, params, state, batch, table, calls, row)
                callback(Progress(done, steps, range(len(batch.keys)), preview, look if done < steps else None))
        return self._pictures(base_params, batch, state.x)

    def _pictures(self, base_params: Any, batch: Batch, latents: jax.Array) -> np.ndarray:
        return np.asarray(self.finish(base_params, latents, batch), np.float32)

    def _view(
        self, base_params: Any, params: Any, state: State, batch: Batch, table: Table, calls: Any, row: int
    ) -> View:
        view = self.look(base_params, params, state, batch, table, calls, np.int32(row))
        base, x0 = (self._pictures(base_params, batch, estimate) for estimate in (view.base, view.x0))
        return View(base, x0, jax.tree.map(np.asarray, view.maps))

    def _in_slices(self, coder: Callable[[jax.Array], jax.Array], x: jax.Array, picture: Sequence[int]) -> jax.Array:
        """A few pictures of each device at a time, where they are large: all at once would need the most memory."""
        count, devices = len(x), self.mesh.size
        size = max(1, _PIXELS // math.prod(picture))
        while count // devices % size:
            size -= 1
        slices = count // devices // size
        if not self.base.is_latent or slices <= 1:
            return coder(x)
        split = x.reshape(devices, slices, size, *x.shape[1:]).swapaxes(0, 1)
        split = split.reshape(slices, devices * size, *x.shape[1:])
        found = jax.lax.map(lambda part: coder(sharding.keep_split(part, self.mesh)), split)
        found = found.reshape(slices, devices, size, *found.shape[2:]).swapaxes(0, 1)
        return found.reshape(count, *found.shape[3:])

    def _predict(self, base_params: Any, x: jax.Array, at: Point, context: jax.Array | None) -> jax.Array:
        return self.base.predict(base_params, x, at.t, context, (at.alpha, at.sigma)).astype(jnp.float32)

    def _denoise(
        self,
        base_params: Any,
        params: Sequence[Any],
        batch: Batch,
        calls: Sequence[jax.Array],
        guided: bool,
        where: str,
        x: jax.Array,
        at: Point,
    ) -> jax.Array:
        modulate = functools.partial(self._modulate, params, batch.controls, batch.mask, calls)
        if not guided:
            return modulate(x, self._predict(base_params, x, at, batch.context), at)
        # One call of the base for both prompts, and one of each MCM where it sees both.
        twice, twice_at = self._twice(x), Point(*map(self._twice, at[:3]), at.row)
        context = sharding.keep_split(jnp.concatenate([batch.negative, batch.context]), self.mesh)
        eps = self._predict(base_params, twice, twice_at, context)
        if where == "before_cfg":
            controls, mask = jax.tree.map(self._twice, (batch.controls, batch.mask))
            eps = self._modulate(params, controls, mask, calls, twice, eps, twice_at)
        negative, positive = jnp.split(eps, 2)
        if where == "prompt_only":
            positive = modulate(x, positive, at)
        eps = sampling.guide(negative, positive, batch.text_guidance[:, None, None, None])
        # What the network itself predicts is eps less so much of x, times a number.
        part = {"epsilon": 0.0, "v_prediction": at.sigma, "sample": 1 / at.sigma}[self.base.schedule.prediction_type]
        eps = sampling.rescale(eps, positive, batch.text_rescale, jnp.reshape(part, (-1, 1, 1, 1)) * x)
        return modulate(x, eps, at) if where == "after_cfg" else eps

    def _twice(self, x: jax.Array) -> jax.Array:
        return sharding.keep_split(jnp.concatenate([x, x]), self.mesh)

    def _modulate(
        self,
        params: Sequence[Any],
        controls: Sequence[Control],
        mask: jax.Array,
        calls: Sequence[jax.Array],
        x: jax.Array,
        eps: jax.Array,
        at: Point,
    ) -> jax.Array:
        """``eps + sum_i scale_i (eps'_i - eps)`` over the MCMs; those that rest for all of the batch do not run."""
        changed = eps
        for modulator, own, control, asked in zip(self.modulators, params, controls, calls, strict=True):
            if own is None:
                continue
            scale = control.scale[:, at.row, None, None, None] * mask

            def change(eps, modulator=modulator, own=own, control=control, asked=asked, scale=scale):
                def add(k, total):
                    shown, weight = control.subsets[:, at.row, k], control.weights[:, at.row, k, None, None, None]
                    level = at.alpha, at.sigma
                    return total + weight * modulator(own, x, eps, at.t, control.conditions, shown, level)[0]

                modulated = jax.lax.fori_loop(0, asked[at.row], add, jnp.zeros_like(eps))
                return scale * (modulated - eps)

            still = lambda eps: jnp.zeros_like(eps)  # noqa: E731
            changed = changed + jax.lax.cond(jnp.any(scale != 0), change, still, eps)
        return changed


def _hold(batch: Batch, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """x with what is known of the picture put in, at x's level of noise; always the same noise."""
    return jnp.where(batch.known, alpha * batch.picture + sigma * batch.noise, x)
