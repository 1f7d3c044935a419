r"""What training draws of each example: timesteps, noise, dropped prompts.

Draw ``d`` of example ``i`` is a function of (seed, i, d) alone, whatever the batch, the run, the device or the process:
that is why a prediction of the base for it can be made once, kept (:mod:`mcm_jax.cache`), and found again without
storing the noise. All of this module is ours.

**Stratified timesteps.** The draws of an example come in groups of K (``count``). With a permutation pi of 0..K-1 and
r ~ U[0, 1) for each draw, ``u = (pi(d mod K) + r) / K`` is uniform, and each group has one u in each K-th of [0, 1);
t is the u-quantile of the density. So every example sees early, middle and late timesteps, however few its draws.

**Density and importance.** For timesteps drawn with probability p(t), the loss is weighted by ``1 / (T p(t))``: its
mean stays that over uniform timesteps, and only its variance changes. What the loss shall stress is for its weighting
to say. Timesteps of density 0 are never drawn, so no weight can speak for them.

**Offset noise.** In training the low frequencies of x_t are the picture's own, so the base's estimate of a large area's
colour is right before the MCM acts, which has little cause to contradict it. In sampling they are the starting noise's.
With ``offset`` s above 0 the noise is ``eps + s u min(1, alpha / sigma) n``, with u ~ U[0, 1) and smooth n of variance
up to 1: where there is more noise than signal that shows x0 off by s u n, elsewhere less. The target is this noise, so
the MCM learns to lead back to what the conditions say. (After the offset noise that bases are fine-tuned with, which is
constant over the picture and does not depend on t.)
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mcm_jax.errors import UserError, expect
from mcm_jax.schedules import Schedule

_NOISE, MODALITY_DROP, _PROMPT_DROP, _TIME, _STRATUM, _OFFSET = range(6)  # streams of keys; they never share one
_GRIDS = (1, 2, 4)  # of offset noise: cells along each side


def example_keys(seed: int, stream: int, index: jax.Array, draw: jax.Array) -> jax.Array:
    """Keys ``[B]`` of examples' draws: the same (seed, stream, example, draw) is the same key, in any batch.

    Args:
      seed: 0 to 2^32 - 1.
      stream: what the key is for.
      index: which example, int32 ``[B]``.
      draw: which draw of it, int32 ``[B]``.
    """
    # Threefry, whatever JAX's default: noise that a cache was made with must come again.
    root = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), 2), stream)
    return jax.vmap(lambda i, d: jax.random.fold_in(jax.random.fold_in(root, i), d))(index, draw)


@dataclasses.dataclass(frozen=True)
class DrawsSettings:
    """What is drawn of each example: timestep, noise, view and prompt drop. The config's section ``draws``.

    Attributes:
      count: what a cache holds of each example; online, new ones come without end, and each group of so many covers all
        timesteps.
      seed: apart from the run's: a cache serves any ``config.seed``.
      density: of timesteps over equal parts of 0..T-1, relative to each other; importance weights keep the loss
        unbiased.
      offset: strength of offset noise, smooth over the picture; 0 is none. At 0.5 classes of emoji follow a
        little better without guidance, worse with it (docs/emoji.md).
    """

    count: int = 5
    seed: int = 0
    density: tuple[float, ...] = (1.0,)
    offset: float = 0.0

    def __post_init__(self):
        expect(self.count >= 1, "count", "at least 1", self.count)
        expect_seed(self.seed)
        expect(0 <= self.offset < float("inf"), "offset", "at least 0", self.offset)
        try:
            check_density(self.density, 2**31)  # how many timesteps there are is the base's to say
        except ValueError:
            wanted = "relative densities, each at least 0 and not all 0, e.g. (1,) or (1, 3)"
            expect(False, "density", wanted, self.density)

    def of(self, schedule: Schedule, prompt_drop_rate: float) -> "Draws":
        """The draws for a base. Raises UserError where the density has more parts than the base has timesteps."""
        try:
            total = schedule.num_train_timesteps
            return Draws(self.seed, self.count, self.density, total, prompt_drop_rate, self.offset)
        except ValueError as e:
            raise UserError(f"config.draws.density: {e}") from e


def expect_seed(seed: int, key: str = "seed") -> None:
    """Raises UserError unless a JAX key takes the seed: of 32 bits, more would be cut off silently."""
    expect(seed >= 0, key, "at least 0", seed)
    expect(seed < 2**32, key, f"at most {2**32 - 1}", seed)


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of all examples. Its methods are pure and work under ``jit``; index and draw are int32 ``[B]``.

    Attributes:
      seed: of all that is drawn.
      count: K, draws in a group; what a cache holds of each example.
      density: of timesteps, relative to each other, over equal parts of 0..T-1: ``(1,)`` is uniform, ``(1, 3)`` three
        times as dense in the noisier half; T numbers are any density.
      total: T.
      prompt_drop_rate: how often the empty prompt takes an example's prompt's place.
      offset: strength of offset noise.
    """

    seed: int
    count: int
    density: tuple[float, ...]
    total: int
    prompt_drop_rate: float = 0.0
    offset: float = 0.0

    def __post_init__(self):
        check_density(self.density, self.total)
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """p(t): float64 ``[T]``, sum 1."""
        part = np.arange(self.total) * len(self.density) // self.total
        weights = np.asarray(self.density, np.float64)[part]
        return weights / weights.sum()

    def timesteps(self, index: jax.Array, draw: jax.Array) -> jax.Array:
        """int32 ``[B]`` in 0..T-1."""
        group, within = draw // self.count, draw % self.count
        keys = example_keys(self.seed, _STRATUM, index, group)
        stratum = jax.vmap(lambda k, d: jax.random.permutation(k, self.count)[d])(keys, within)
        r = jax.vmap(jax.random.uniform)(example_keys(self.seed, _TIME, index, draw))
        u = (stratum.astype(jnp.float32) + r) / self.count
        edges = jnp.asarray(np.cumsum(self.probabilities)[:-1], jnp.float32)  # below them lie 1, 2, ... timesteps
        t = jnp.searchsorted(edges, u, side="right").astype(jnp.int32)
        return jnp.minimum(t, int(np.flatnonzero(self.probabilities)[-1]))  # u may round up to 1

    def noise(self, index: jax.Array, draw: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Standard normal, float32 ``[B, *shape]``."""
        keys = example_keys(self.seed, _NOISE, index, draw)
        return jax.vmap(lambda key: jax.random.normal(key, tuple(shape)))(keys)

    def smooth_noise(self, index: jax.Array, draw: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Normals on coarse grids, interpolated and summed up, each draw times its own u ~ U[0, 1): ``[B, *shape]``."""

        def one(key: jax.Array) -> jax.Array:
            amount, *grids = jax.random.split(key, 1 + len(_GRIDS))
            each = (jax.random.normal(k, (n, n, shape[-1])) for k, n in zip(grids, _GRIDS, strict=True))
            total = sum(jax.image.resize(cells, tuple(shape), "linear") for cells in each)
            return jax.random.uniform(amount) * total / math.sqrt(len(_GRIDS))

        return jax.vmap(one)(example_keys(self.seed, _OFFSET, index, draw))

    def prompt_is_dropped(self, index: jax.Array, draw: jax.Array) -> jax.Array:
        """bool ``[B]``."""
        keys = example_keys(self.seed, _PROMPT_DROP, index, draw)
        return jax.vmap(lambda key: jax.random.bernoulli(key, self.prompt_drop_rate))(keys)

    def noised(
        self, schedule: Schedule, x0: jax.Array, index: jax.Array, draw: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(x_t, noise, t)`` of clean images or latents ``[B, H, W, C]``."""
        t = self.timesteps(index, draw)
        noise = self.noise(index, draw, x0.shape[1:])
        if self.offset:
            share = jnp.minimum(1.0, schedule.alpha(t) / schedule.sigma(t))[:, None, None, None]
            noise += self.offset * share * self.smooth_noise(index, draw, x0.shape[1:])
        return schedule.add_noise(x0, noise, t), noise, t

    def importance(self, t: jax.Array) -> jax.Array:
        """``1 / (T p(t))``: float32 ``[B]``; all 1 for the uniform density."""
        with np.errstate(divide="ignore"):
            weights = np.where(self.probabilities > 0, 1 / (self.total * self.probabilities), 0)
        return jnp.asarray(weights, jnp.float32)[t]

    def fingerprint(self) -> str:
        """SHA-256, as hex, of some of the numbers that draws are made of: do they come again from this seed, here?

        Bits are compared, and a few normals, rounded: devices differ in their last digits.
        """

        @jax.jit
        def some() -> tuple[jax.Array, ...]:
            keys = example_keys(self.seed, _NOISE, jnp.arange(4), jnp.arange(4))
            strata = jax.vmap(lambda key: jax.random.permutation(key, self.count))(keys)
            normals = jax.vmap(lambda key: jax.random.normal(key, (3, 2, 1))[-1, -1])(keys)
            return jax.vmap(lambda key: jax.random.bits(key, (3, 2)))(keys), strata, jnp.round(10 * normals)

        parts = [np.asarray(part).astype("<i8").tobytes() for part in some()]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def check_density(density: Sequence[float], total: int) -> None:
    """Raises ValueError unless these are relative densities for ``total`` timesteps."""
    numbers = all(
        isinstance(d, int | float) and not isinstance(d, bool) and math.isfinite(d) and d >= 0 for d in density
    )
    if not numbers or not 1 <= len(density) <= total or sum(density) <= 0:
        raise ValueError(
            f"expected 1 to {total} relative densities, each at least 0 and not all 0, over equal parts of the "
            f"timesteps, got {list(density)[:8]}"
        )
