r"""Samplers as tables: what each solver makes of a schedule and a grid of noise levels, in float64. No network is here.

With ``x_t = alpha x_0 + sigma eps`` and ``s = sigma / alpha``, every solver below is linear in the current x, what it
remembers, the network's eps or the x0 that follows from it, and fresh noise. So a solver is a function that yields one
update for each call of the network: the new x, and the new content of three memories, each a sum with coefficients.
:func:`make_table` puts the updates into arrays, and :func:`mcm_jax.sampling.sample` runs any of them.

    ddim             Song et al. 2021, eq. 12, with eta
    ddpm             Ho et al. 2020, eq. 7; over a coarser grid alpha and beta are those between two points of it
    euler, heun      Karras et al. 2022, alg. 1 without noise: explicit Euler, Heun's second order
    euler_ancestral  Euler to a lower level, then noise back up (k-diffusion)
    dpm++2m          DPM-Solver++(2M), Lu et al. 2022, alg. 2, midpoint
    dpm++2m_sde      its SDE form
    plms             PNDM's linear multistep, Liu et al. 2022, started as Stable Diffusion 1.x does (`skip_prk_steps`)
    unipc            UniPC-2 with B_2(h), Zhao et al. 2023, alg. 1

Grids and coefficients are those of diffusers' scheduler of the same name, with two exceptions that docs/sampling.md
states.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mcm_jax.schedules import SPACINGS as GRIDS
from mcm_jax.schedules import Schedule

SPACINGS = (*GRIDS, "karras", "exponential")
_RHO = 7.0  # Karras et al. 2022, eq. 5

# What an update is a sum of, and, the first four of it, what it sets.
_X, _M1, _M2, _M3, _X0, _EPS, _NOISE = range(7)
_Sum = dict[int, float]


class Table(NamedTuple):
    """A sampler for one schedule and grid: R calls of the network, each with the update that follows it.

    Attributes:
      start: what standard normal noise is multiplied with to be the first x.
      keep: what a given picture, as x0, is multiplied with to be added to that; 0 where there is none.
      t: ``[R]``, the timestep that the network is told; may lie between two timesteps.
      alpha: ``[R]``, ``sqrt(abar)`` of the noise level that x is at.
      sigma: ``[R]``, ``sqrt(1 - abar)`` there.
      clip: ``[R]``, bound of the estimate of x0; inf for none.
      update: ``[R, 4, 7]``, the coefficients of x, three memories, x0, eps and noise in the new x and memories.
      step: int ``[R]``, which of the sampler's steps the call belongs to, from 0.
      share: ``[R]``, that over the number of steps: how much is behind it, in [0, 1).
      count: R, how many rows there are when more were filled in (:func:`padded`).
    """

    start: np.ndarray
    keep: np.ndarray
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    clip: np.ndarray
    update: np.ndarray
    step: np.ndarray
    share: np.ndarray
    count: np.ndarray


class _Levels:
    """The noise levels of a grid of N steps, and the one that the last step ends at: ``[N + 1]`` each."""

    def __init__(self, s: np.ndarray):
        self.s = s
        self.alpha = 1 / np.sqrt(1 + s**2)
        self.sigma = s * self.alpha
        self.abar = self.alpha**2
        with np.errstate(divide="ignore"):
            self.lam = -np.log(s)  # log(alpha / sigma), inf at the end
        self.steps = len(s) - 1


_Rows = Iterator[tuple[int, int, dict[int, _Sum]]]  # step, level, what is set


def _plus(*parts: tuple[float, _Sum]) -> _Sum:
    """A sum of sums with factors."""
    total: _Sum = {}
    for factor, part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + factor * value
    return total


def _ddim(p: _Levels, eta: float) -> _Rows:
    for i in range(p.steps):
        here, there = p.abar[i], p.abar[i + 1]
        std = eta * math.sqrt(max((1 - there) / (1 - here) * (1 - here / there), 0))
        yield i, i, {_X: {_X0: p.alpha[i + 1], _EPS: math.sqrt(max(1 - there - std**2, 0)), _NOISE: std}}


def _ddpm(p: _Levels, is_large: bool) -> _Rows:
    for i in range(p.steps):
        here, there = p.abar[i], p.abar[i + 1]
        alpha = here / there
        share = 1.0 if is_large else (1 - there) / (1 - here)
        std = 0.0 if i == p.steps - 1 else math.sqrt(max(share * (1 - alpha), 1e-20))
        x0 = math.sqrt(there) * (1 - alpha) / (1 - here)
        yield i, i, {_X: {_X0: x0, _X: math.sqrt(alpha) * (1 - there) / (1 - here), _NOISE: std}}


def _towards(p: _Levels, i: int, s: float, noise: float = 0.0) -> _Sum:
    """Along the straight line through x and x0 from level i to ``s``, at the scale of the level with that and noise."""
    alpha = 1 / math.sqrt(1 + s**2 + noise**2)
    return {_X: alpha * s / p.sigma[i], _X0: alpha * (1 - s / p.s[i]), _NOISE: alpha * noise}


def _euler(p: _Levels) -> _Rows:
    for i in range(p.steps):
        yield i, i, {_X: _towards(p, i, p.s[i + 1])}


def _euler_ancestral(p: _Levels) -> _Rows:
    for i in range(p.steps):
        here, there = p.s[i], p.s[i + 1]
        down = there**2 / here
        yield i, i, {_X: _towards(p, i, down, math.sqrt(max(there**2 - down**2, 0)))}


def _heun(p: _Levels) -> _Rows:
    for i in range(p.steps):
        slope = {_X: 1 / p.sigma[i], _X0: -1 / p.s[i]}  # of x / alpha by s
        yield i, i, {_X: _towards(p, i, p.s[i + 1]), _M1: {_X: 1 / p.alpha[i]}, _M2: slope}
        if i + 1 < p.steps:  # the last step, to s = 0, is Euler's
            slope = {_X: 1 / p.sigma[i + 1], _X0: -1 / p.s[i + 1]}
            half = (p.s[i + 1] - p.s[i]) / 2
            x = _plus((1, {_M1: 1.0}), (half, {_M2: 1.0}), (half, slope))
            yield i, i + 1, {_X: _plus((p.alpha[i + 1], x))}


def _dpm(p: _Levels, is_sde: bool) -> _Rows:
    for i in range(p.steps):
        h = p.lam[i + 1] - p.lam[i]
        decay = math.exp(-h)
        gain = p.alpha[i + 1] * (1 - decay ** (2 if is_sde else 1))
        data = {_X0: 1.0}
        if 0 < i < p.steps - 1 and min(h, p.lam[i] - p.lam[i - 1]) > 0:  # schedules may rest at their end
            r = (p.lam[i] - p.lam[i - 1]) / h
            data = {_X0: 1 + 0.5 / r, _M1: -0.5 / r}
        x = p.sigma[i + 1] / p.sigma[i] * (decay if is_sde else 1)
        noise = p.sigma[i + 1] * math.sqrt(1 - decay**2) if is_sde else 0.0
        yield i, i, {_X: _plus((1, {_X: x, _NOISE: noise}), (gain, data)), _M1: {_X0: 1.0}}


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _plms(p: _Levels, of_v: bool) -> _Rows:
    """Of what the network predicts, eps or v."""

    def output(level: int) -> _Sum:
        return {_EPS: 1 / p.alpha[level], _X: -p.sigma[level] / p.alpha[level]} if of_v else {_EPS: 1.0}

    def move(i: int, x: int, out: _Sum) -> _Sum:
        eps = _plus((p.alpha[i], out), (p.sigma[i], {x: 1.0})) if of_v else out
        return _plus((p.alpha[i + 1] / p.alpha[i], {x: 1.0}), (p.alpha[i + 1] * (p.s[i + 1] - p.s[i]), eps))

    yield 0, 0, {_X: move(0, _X, output(0)), _M1: output(0), _M2: {_X: 1.0}}
    if p.steps == 1:
        return
    # The first step once more, with the mean of what the network says at its two ends.
    yield 0, 1, {_X: move(0, _M2, _plus((0.5, output(1)), (0.5, {_M1: 1.0}))), _M1: {_M1: 1.0}}
    for i in range(1, p.steps):
        known = [output(i), {_M1: 1.0}, {_M2: 1.0}, {_M3: 1.0}]
        out = _plus(*zip(_ADAMS_BASHFORTH[min(i, 3)], known, strict=False))
        yield i, i, {_X: move(i, _X, out), _M1: output(i), _M2: {_M1: 1.0}, _M3: {_M2: 1.0}}


def _unipc(p: _Levels) -> _Rows:
    """The memories are the last two x0 and the last x after its correction."""
    order = 0
    for i in range(p.steps):
        x = {_X: 1.0}
        if i and p.lam[i] > p.lam[i - 1]:
            h = p.lam[i] - p.lam[i - 1]
            phi = math.expm1(-h)
            inner: list[float] = []
            weights, differences = [0.5], []
            if order == 2:
                inner = [(p.lam[i - 2] - p.lam[i - 1]) / h]
                first = phi / -h - 1
                b = np.array([first, 2 * (first / -h - 0.5)]) / phi
                weights = np.linalg.solve(np.array([[1.0, 1.0], [inner[0], 1.0]]), b).tolist()
                differences = [_plus((1 / inner[0], {_M2: 1.0, _M1: -1.0}))]
            differences.append({_X0: 1.0, _M1: -1.0})
            data = _plus((1, {_M1: 1.0}), *zip(weights, differences, strict=True))
            x = _plus((p.sigma[i] / p.sigma[i - 1], {_M3: 1.0}), (-p.alpha[i] * phi, data))
        h = p.lam[i + 1] - p.lam[i]
        order = 2 if 0 < i < p.steps - 1 and min(h, p.lam[i] - p.lam[i - 1]) > 0 else 1
        data = {_X0: 1.0}
        if order == 2:
            half = 0.5 * h / (p.lam[i - 1] - p.lam[i])
            data = {_X0: 1 - half, _M1: half}
        ahead = _plus((p.sigma[i + 1] / p.sigma[i], x), (-p.alpha[i + 1] * math.expm1(-h), data))
        yield i, i, {_X: ahead, _M1: {_X0: 1.0}, _M2: {_M1: 1.0}, _M3: x}


class _Solver(NamedTuple):
    """A solver with what diffusers' scheduler of its name does around it.

    Attributes:
      rows: levels, schedule and eta to its updates.
      grid: whose grids: ``ddim`` rounds timesteps, ``euler`` does not, ``dpm`` goes one step further and drops it.
      clips: whether x0 is clipped where the base's schedule says so.
      ends_at_first: whether the last step may end at the schedule's first noise level (`set_alpha_to_one`).
    """

    rows: Callable[[_Levels, Schedule, float], _Rows]
    grid: str
    clips: bool = False
    ends_at_first: bool = False


_SOLVERS = {
    "ddim": _Solver(lambda p, schedule, eta: _ddim(p, eta), "ddim", clips=True, ends_at_first=True),
    "ddpm": _Solver(lambda p, schedule, _: _ddpm(p, schedule.variance_type.startswith("fixed_large")), "ddim", True),
    "euler": _Solver(lambda p, *_: _euler(p), "euler"),
    "euler_ancestral": _Solver(lambda p, *_: _euler_ancestral(p), "euler"),
    "heun": _Solver(lambda p, *_: _heun(p), "euler", clips=True),
    "dpm++2m": _Solver(lambda p, *_: _dpm(p, is_sde=False), "dpm"),
    "dpm++2m_sde": _Solver(lambda p, *_: _dpm(p, is_sde=True), "dpm"),
    "plms": _Solver(
        lambda p, schedule, _: _plms(p, schedule.prediction_type == "v_prediction"), "ddim", ends_at_first=True
    ),
    "unipc": _Solver(lambda p, *_: _unipc(p), "dpm"),
}
SAMPLERS = tuple(_SOLVERS)


def _timesteps(schedule: Schedule, grid: str, steps: int, spacing: str) -> np.ndarray:
    """Falling timesteps ``[steps]`` of one of the spacings that are uniform in t."""
    total = schedule.num_train_timesteps
    if grid == "dpm" and spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    if grid == "dpm" and spacing == "leading":
        return np.arange(steps, 0, -1) * (total // (steps + 1)) + float(schedule.steps_offset)
    if grid == "euler" and spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    return schedule.timesteps(steps, spacing).astype(np.float64)


def _grid(
    schedule: Schedule, grid: str, steps: int, spacing: str, own: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and noise levels ``s``, ``[N]`` each."""
    abar = schedule.abar.astype(np.float64)
    every = np.sqrt((1 - abar) / abar)
    at = np.arange(len(every))
    if len(own):
        t = np.asarray(own, np.float64)
        ok = t.ndim == 1 and np.all(np.isfinite(t)) and t[0] <= at[-1] and t[-1] >= 0 and np.all(np.diff(t) < 0)
        if not ok:
            raise ValueError(f"timesteps: found {list(own)}, expected falling numbers in 0..{at[-1]}")
        return t, np.interp(t, at, every)
    if not 1 <= steps <= len(at):
        raise ValueError(f"num_steps: found {steps}, expected 1..{len(at)} (the timesteps the base was trained on)")
    if spacing in GRIDS:
        t = _timesteps(schedule, grid, steps, spacing)
        if t[0] > at[-1] or len(np.unique(t)) < steps:
            raise ValueError(
                f"num_steps: {steps} {spacing} steps do not fit into the base's timesteps 0..{at[-1]}: "
                f"take fewer steps or another spacing"
            )
        return t, np.interp(t, at, every)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: found {spacing!r}, expected one of {', '.join(SPACINGS)}")
    # Euler's and Heun's grids begin and end where the base's own spacing does, the others' where the schedule does.
    ends = np.interp(_timesteps(schedule, grid, steps, schedule.timestep_spacing)[[0, -1]], at, every)
    high, low = (every[-1], every[0]) if grid == "dpm" else ends
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        s = (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO
    else:
        s = np.exp(math.log(high) + ramp * math.log(low / high))
    t = np.interp(np.log(s), np.log(every), at)
    if grid == "dpm":  # the network is told whole timesteps
        t = t.round() if spacing == "karras" else np.floor(t + 1e-6)
    return t, s


def make_table(
    schedule: Schedule,
    sampler: str = "ddim",
    steps: int = 25,
    *,
    spacing: str = "",
    eta: float = 0.0,
    timesteps: Sequence[float] = (),
    strength: float | None = None,
) -> Table:
    """A sampler's table, numbers in float64.

    Args:
      schedule: the base's.
      sampler: one of :data:`SAMPLERS`.
      steps: 1..T; how often the network is called follows from the sampler.
      spacing: one of :data:`SPACINGS`; empty is the schedule's own.
      eta: DDIM's share of fresh noise, 0 (deterministic) to 1.
      timesteps: an own grid, falling, in 0..T-1, in place of steps and spacing.
      strength: share of the steps, the last ones, that are taken from a given picture with noise, in (0, 1] (SDEdit,
        Meng et al. 2022; diffusers' `strength`); None begins with noise alone.

    Raises:
      ValueError: an unknown name, or a grid that the schedule does not have.
    """
    if sampler not in _SOLVERS:
        raise ValueError(f"sampler must be one of {SAMPLERS}, got {sampler!r}")
    solver = _SOLVERS[sampler]
    t, s = _grid(schedule, solver.grid, steps, spacing or schedule.timestep_spacing, timesteps)
    if strength is not None:
        left_out = max(len(t) - max(int(len(t) * strength), 1), 0)
        t, s = t[left_out:], s[left_out:]
    last = schedule.final_alpha_cumprod if solver.ends_at_first else 1.0
    levels = _Levels(np.append(s, math.sqrt((1 - last) / last)))
    rows = list(solver.rows(levels, schedule, eta))
    step, level = (np.array([row[i] for row in rows]) for i in (0, 1))
    update = np.zeros((len(rows), 4, 7))
    for row, (_, _, sums) in zip(update, rows, strict=True):
        for target, parts in sums.items():
            for source, value in parts.items():
                row[target, source] = value
    # In k-diffusion's scale noise of deviation s is started from where the grid begins at the schedule's end.
    begins_at_end = solver.grid == "euler" and schedule.timestep_spacing in ("linspace", "trailing")
    if solver.grid == "euler" and spacing in GRIDS:
        begins_at_end = spacing in ("linspace", "trailing")
    given = strength is not None
    return Table(
        start=np.float64(levels.sigma[0] if begins_at_end or given else 1.0),
        keep=np.float64(levels.alpha[0] if given else 0.0),
        t=t[level],
        alpha=levels.alpha[level],
        sigma=levels.sigma[level],
        clip=np.full(len(rows), schedule.clip_sample_range if solver.clips and schedule.clip_sample else np.inf),
        update=update,
        step=step,
        share=step / len(t),
        count=np.int32(len(rows)),
    )


def padded(table: Table) -> Table:
    """A table in float32 with 128 rows, or the next power of two: one compiled loop serves all of a size."""
    size = max(128, 1 << (int(table.count) - 1).bit_length())

    def fill(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.int32 if np.issubdtype(np.asarray(x).dtype, np.integer) else np.float32)
        return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]) if x.ndim else x

    return Table(*map(fill, table))
