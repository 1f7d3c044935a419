"""A landscape as numbers in unit coordinates, drawn at random: what :mod:`mcm_jax.data.render` makes pictures of."""

import dataclasses

import numpy as np

TIMES = ("dawn", "noon", "sunset", "night")
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_ROCKS = ((0.44, 0.45, 0.53), (0.52, 0.43, 0.37), (0.39, 0.43, 0.55), (0.50, 0.47, 0.45))


@dataclasses.dataclass(frozen=True)
class Waves:
    """A sum of triangle or sine waves, a jagged or smooth curve that exists at every resolution."""

    amplitude: np.ndarray
    frequency: np.ndarray
    phase: np.ndarray
    jagged: bool

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns the curve at ``x`` (any shape), within +-sum(amplitude)."""
        total = np.zeros(np.shape(x), np.float32)
        for amplitude, frequency, phase in zip(self.amplitude, self.frequency, self.phase, strict=True):
            cycles = x * frequency + phase
            wave = 4 * np.abs(cycles - np.floor(cycles + 0.5)) - 1 if self.jagged else np.sin(2 * np.pi * cycles)
            total += amplitude * wave
        return total


@dataclasses.dataclass(frozen=True)
class Range:
    """One mountain range: a tent a peak, the ridge that falls from each summit parts its light from its dark side."""

    peak_x: np.ndarray
    peak_y: np.ndarray
    slope: np.ndarray
    crag: Waves
    ridge: Waves
    snow: Waves
    snow_line: float  # how far below each summit snow reaches; 0 is none
    rock: tuple[float, float, float]
    haze: float  # 0 near, 1 as the sky at the horizon

    def tents(self, x: np.ndarray, horizon: float) -> np.ndarray:
        """Height y of each peak's own tent at x; ``[..., peaks]``. Slopes flatten towards the foot, as scree does."""
        reach = (horizon - self.peak_y) / self.slope * 1.9
        distance = np.abs(x[..., None] - self.peak_x) / reach
        return self.peak_y + (horizon - self.peak_y) * (1.25 * distance - 0.25 * np.minimum(distance, 1) ** 2)

    def skyline(self, x: np.ndarray, horizon: float) -> np.ndarray:
        """The range's upper edge y at x."""
        return self.tents(x, horizon).min(-1) + self.crag(x)


@dataclasses.dataclass(frozen=True)
class Tree:
    """One tree."""

    x: float
    y: float  # of the foot
    height: float
    conifer: bool
    shade: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """All numbers of a landscape, in unit coordinates: x to the right, y down, (0, 0) top left."""

    time: str
    horizon: float
    disc: tuple[float, float, float] | None  # x, y, radius (of the picture's height)
    cloud_cover: float
    cloud_noise: tuple[np.ndarray, ...]
    ground_noise: tuple[np.ndarray, ...]
    ranges: tuple[Range, ...]  # back to front
    ground: str  # meadow, lake, shore
    shore_y: float
    shore: Waves
    ripple: Waves
    ripple_strokes: np.ndarray  # [n, 3]: x, y, length
    grass: int
    trees: tuple[Tree, ...]
    light_from_left: bool

    @property
    def facts(self) -> dict[str, object]:
        """What the caption says, as values."""
        return {
            "time": self.time,
            "water": self.ground != "meadow",
            "trees": len(self.trees),
            "sun": self.disc is not None,
            "ranges": len(self.ranges),
        }

    @property
    def caption(self) -> str:
        """One plain English sentence, e.g. ``a mountain lake at sunset with three trees``."""
        place = "mountain meadow" if self.ground == "meadow" else "mountain lake"
        when = {"dawn": "at dawn", "noon": "by day", "sunset": "at sunset", "night": "at night"}[self.time]
        extras = []
        if self.trees:
            extras.append(f"{_NUMBERS[len(self.trees)]} tree{'s' if len(self.trees) > 1 else ''}")
        if self.disc is not None:
            extras.append("a moon" if self.time == "night" else "a sun")
        return f"a {place} {when}" + (f" with {' and '.join(extras)}" if extras else "")


def _waves(
    rng: np.random.Generator, amplitude: float, base: float, octaves: int, *, jagged: bool, fall: float = 0.5
) -> Waves:
    k = np.arange(octaves)
    return Waves(
        (amplitude * fall**k).astype(np.float32),
        (base * 2.0**k * rng.uniform(0.8, 1.25, octaves)).astype(np.float32),
        rng.uniform(0, 1, octaves).astype(np.float32),
        jagged,
    )


def _lattices(rng: np.random.Generator, sizes: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, ...]:
    return tuple(rng.uniform(0, 1, s).astype(np.float32) for s in sizes)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draws the numbers of one landscape."""
    time = str(rng.choice(TIMES))
    horizon = float(rng.uniform(0.48, 0.64))
    ranges = []
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    rock = _ROCKS[int(rng.integers(len(_ROCKS)))]
    for depth in range(count):  # 0 is the farthest
        nearness = (depth + 1) / count
        peaks = int(rng.integers(1, 4)) + (depth < count - 1)
        x = (np.arange(peaks) + rng.uniform(0.15, 0.85, peaks)) / peaks
        low, high = 0.20 + 0.16 * (1 - nearness), 0.32 + 0.16 * (1 - nearness)
        rise = rng.uniform(low, high, peaks) * (0.75 if count > 1 and depth == count - 1 else 1.0)
        ranges.append(
            Range(
                peak_x=x.astype(np.float32),
                peak_y=(horizon - rise).astype(np.float32),
                slope=rng.uniform(0.75, 1.35, peaks).astype(np.float32),
                crag=_waves(rng, 0.016, 4.0, 4, jagged=True),
                ridge=_waves(rng, 0.03, 4.0, 3, jagged=True),
                snow=_waves(rng, 0.02, 7.0, 3, jagged=True),
                snow_line=float(rng.uniform(0.09, 0.16)) if rng.random() < 0.6 else 0.0,
                rock=rock,
                haze=0.62 * (1 - nearness) + 0.08,
            )
        )
    disc = None
    if rng.random() < 0.75:
        radius = float(rng.uniform(0.055, 0.085))
        x = float(rng.uniform(0.12, 0.88))
        # The disc stands clear of the skyline at its own place, or a quarter of it behind the ridge.
        skylines = [float(r.skyline(np.array([x], np.float32), horizon)[0]) for r in ranges]
        skyline = min(*skylines, horizon)
        top = radius + 0.02
        bottom = max(top, skyline - radius * float(rng.uniform(0.4, 1.6)))
        disc = (x, float(rng.uniform(max(top, bottom - 0.18), bottom)), radius)
    ground = str(rng.choice(("meadow", "lake", "shore"), p=(0.4, 0.2, 0.4)))
    shore_y = float(horizon + (1 - horizon) * rng.uniform(0.35, 0.7))
    shore = _waves(rng, 0.06, 0.6, 3, jagged=False)
    trees = []
    if ground != "lake":
        first = horizon + 0.05 if ground == "meadow" else shore_y + 0.09
        slots = rng.permutation(6)[: int(rng.choice(6, p=(0.15, 0.2, 0.2, 0.2, 0.15, 0.1)))]
        conifer = rng.random() < 0.6
        for slot in slots:
            y = float(rng.uniform(min(first, 0.93), 0.97))
            near = (y - horizon) / (1 - horizon)
            trees.append(
                Tree(
                    x=float((slot + rng.uniform(0.2, 0.8)) / 6),
                    y=y,
                    height=float((0.17 + 0.17 * near) * rng.uniform(0.85, 1.2)),
                    conifer=bool(conifer if rng.random() < 0.85 else not conifer),
                    shade=float(rng.uniform(0.85, 1.15)),
                )
            )
    rows = rng.uniform(0.08, 0.92, 7)
    strokes = np.stack([rng.uniform(0.02, 0.8, 7), horizon + (1 - horizon) * rows, rng.uniform(0.1, 0.24, 7)], axis=-1)
    return Scene(
        time=time,
        horizon=horizon,
        disc=disc,
        cloud_cover=float(rng.uniform(0.3, 1.0)) if rng.random() < 0.6 else 0.0,
        cloud_noise=_lattices(rng, ((6, 4), (12, 7), (24, 14), (48, 28))),
        ground_noise=_lattices(rng, ((6, 6), (16, 16), (48, 48), (128, 128))),
        ranges=tuple(ranges),
        ground=ground,
        shore_y=shore_y,
        shore=shore,
        ripple=_waves(rng, 0.5, 9.0, 3, jagged=False, fall=0.7),
        ripple_strokes=strokes.astype(np.float32),
        grass=int(rng.random() < 0.25),
        trees=tuple(sorted(trees, key=lambda t: t.y)),
        light_from_left=bool(rng.random() < 0.5) if disc is None else disc[0] < 0.5,
    )
