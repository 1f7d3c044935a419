"""Procedural landscapes with exact conditions: data that needs no download.

Every example is a function of (seed, split, index) alone. A scene is first drawn as a set of numbers in unit
coordinates (:func:`draw_scene`) and then rendered at any resolution (:func:`render`), so the same scene can be had at
32x32 and at 512x512. Ours, in the spirit of the paper's Flickr Mountains.

An example holds

========== =================================== =====================================================================
image      float32 ``[H, W, 3]`` in [-1, 1]     the picture
segmentation uint8 ``[H, W]`` in 0..5           class of the largest area in the pixel, an index into :data:`CLASSES`
sketch     float32 ``[H, W]`` in [0, 1]         black lines (0) on white (1): outlines, main ridges, a few ripples
caption    str                                  e.g. "a mountain lake at sunset with three trees"
facts      dict                                 what the caption says: time, water, trees, sun, ranges
========== =================================== =====================================================================
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

CLASSES = ("sky", "sun", "mountain", "water", "meadow", "tree")
"""Names of the segmentation's classes; the index is the pixel's value. ``sun`` is also the moon."""

# The colours in which tools show a label map (never stored as labels).
PALETTE = np.array(
    [(135, 190, 235), (250, 205, 60), (120, 110, 115), (45, 100, 190), (140, 190, 80), (25, 85, 45)], np.uint8
)

SPLITS = ("train", "test")
TIMES = ("dawn", "noon", "sunset", "night")
_SKY, _SUN, _MOUNTAIN, _WATER, _MEADOW, _TREE = range(6)
_NUMBERS = ("no", "one", "two", "three", "four", "five")

# Per time of day: sky at the zenith, sky at the horizon, disc, light on the land (all linear RGB in [0, 1]).
_SKIES = {
    "dawn": ((0.42, 0.52, 0.80), (0.99, 0.80, 0.74), (1.00, 0.93, 0.75), (0.98, 0.88, 0.88)),
    "noon": ((0.22, 0.50, 0.88), (0.76, 0.89, 0.98), (1.00, 0.96, 0.62), (1.00, 1.00, 1.00)),
    "sunset": ((0.34, 0.26, 0.52), (0.99, 0.58, 0.28), (1.00, 0.88, 0.45), (0.90, 0.68, 0.58)),
    "night": ((0.02, 0.04, 0.14), (0.13, 0.20, 0.40), (0.95, 0.95, 0.86), (0.40, 0.46, 0.64)),
}
_ROCKS = ((0.44, 0.45, 0.53), (0.52, 0.43, 0.37), (0.39, 0.43, 0.55), (0.50, 0.47, 0.45))
_GRASSES = (((0.60, 0.74, 0.34), (0.36, 0.58, 0.20)), ((0.74, 0.72, 0.36), (0.56, 0.54, 0.20)))


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
        skylines = [float(_skyline(r, np.array([x], np.float32), horizon)[0]) for r in ranges]
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


def _tents(r: Range, x: np.ndarray, horizon: float) -> np.ndarray:
    """Height y of each peak's own tent at x; ``[..., peaks]``. Slopes flatten towards the foot, as scree does."""
    reach = (horizon - r.peak_y) / r.slope * 1.9
    distance = np.abs(x[..., None] - r.peak_x) / reach
    return r.peak_y + (horizon - r.peak_y) * (1.25 * distance - 0.25 * np.minimum(distance, 1) ** 2)


def _skyline(r: Range, x: np.ndarray, horizon: float) -> np.ndarray:
    """The range's upper edge y at x."""
    return _tents(r, x, horizon).min(-1) + r.crag(x)


def _noise(lattices: tuple[np.ndarray, ...], y: np.ndarray, x: np.ndarray, fall: float = 0.55) -> np.ndarray:
    """Value noise in [0, 1] at the grid y x x: each lattice interpolated with smooth weights."""

    def along(a: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Interpolates the first axis (by gather: a matrix product would start BLAS threads in every worker)."""
        position = np.clip(at, 0, 1) * (len(a) - 1)
        left = np.minimum(position.astype(np.int32), len(a) - 2)
        f = (position - left)[:, None]
        f = f * f * (3 - 2 * f)
        return a[left] * (1 - f) + a[left + 1] * f

    total, norm = np.zeros((len(y), len(x)), np.float32), 0.0
    for k, lattice in enumerate(lattices):
        total += fall**k * along(along(lattice, y).T, x).T
        norm += fall**k
    return total / norm


def _smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(a: np.ndarray, b: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    t = np.asarray(t, np.float32)
    return a + (b - a) * (t[..., None] if t.ndim else t)


def _tree_mask(tree: Tree, y: np.ndarray, x: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of crown and trunk, and the crown's side (-1 left .. 1 right)."""
    up = (tree.y - y) / tree.height  # 0 at the foot, 1 at the top
    side = (x - tree.x) * aspect / tree.height
    trunk = (np.abs(side) < 0.05) & (up >= 0) & (up < 0.3)
    if tree.conifer:
        tier = np.mod((1 - up) * 3, 1) * 0.09  # three drooping tiers
        half = 0.03 + 0.20 * (1 - up) + tier
        crown = (np.abs(side) < half) & (up > 0.14) & (up <= 1)
    else:
        lobe = 0.03 * np.sin(np.arctan2(up - 0.64, side) * 7 + tree.shade * 40)
        crown = np.hypot(side / 0.30, (up - 0.64) / 0.36) < 1 + lobe
        half = 0.3
    return crown, trunk, np.clip(side / half, -1, 1)


def _box(a: np.ndarray, k: int) -> np.ndarray:
    """Mean over k x k cells."""
    h, w = a.shape[0] // k, a.shape[1] // k
    return a.reshape(h, k, w, k, *a.shape[2:]).mean((1, 3))


def render(scene: Scene, height: int, width: int) -> dict[str, np.ndarray]:
    """Renders image, segmentation and sketch of a scene.

    Args:
      scene: the landscape.
      height: rows, at least 8.
      width: columns, at least 8. In a picture that is not square, discs and trees keep their shape.

    Returns:
      ``image`` float32 ``[H, W, 3]`` in [-1, 1], ``segmentation`` uint8 ``[H, W]``, ``sketch`` float32 ``[H, W]``
      in [0, 1].
    """
    if height < 8 or width < 8:
        raise ValueError(f"scenes need at least 8x8 pixels, got {height}x{width}")
    k = max(2, min(4, math.ceil(160 / min(height, width))))  # subpixels a side
    rows, cols = height * k, width * k
    y1 = ((np.arange(rows) + 0.5) / rows).astype(np.float32)
    x1 = ((np.arange(cols) + 0.5) / cols).astype(np.float32)
    y, x = y1[:, None], x1[None, :]
    aspect = width / height
    top, low, disc_colour, light = (np.array(c, np.float32) for c in _SKIES[scene.time])
    label = np.zeros((rows, cols), np.uint8)
    part = np.zeros((rows, cols), np.int16)  # which object owns the pixel: outlines lie where it changes
    facing = -1.0 if scene.light_from_left else 1.0

    # Sky, clouds, disc.
    sky_at = (np.clip(y1 / scene.horizon, 0, 1) ** 1.3)[:, None]
    sky_rows = _mix(top, low, sky_at)  # [rows, 1, 3]
    image = np.broadcast_to(sky_rows, (rows, cols, 3)).copy()
    if scene.disc is not None:
        dx, dy, radius = scene.disc
        distance = np.hypot((x - dx) * aspect, y - dy)
        glow = np.exp(-((distance / (2.6 * radius)) ** 2)) * (0.45 if scene.time != "night" else 0.18)
        image = _mix(image, disc_colour, glow)
    if scene.time == "night":
        stars = (scene.ground_noise[3] > 0.992).astype(np.float32)
        at = (y1 * 127).astype(int), (x1 * 127).astype(int)
        image += (stars[at[0][:, None], at[1][None, :]] * (0.8 * (1 - sky_at)))[..., None]
    if scene.cloud_cover:
        field = _noise(scene.cloud_noise, y1, x1)
        cloud = _smooth(0.56, 0.72, field + 0.10 * (scene.cloud_cover - 0.6)) * (1 - 0.6 * sky_at) * 0.8
        white = _mix(low, light, 0.6) if scene.time != "night" else _mix(top, low, 0.9)
        image = _mix(image, white, cloud)
    if scene.disc is not None:
        inside = distance < radius
        image[inside] = disc_colour
        label[inside], part[inside] = _SUN, 1

    # Mountains, back to front.
    ridges = np.zeros((rows, cols), bool)
    skyline = np.full(cols, scene.horizon, np.float32)
    rock_texture = _noise(scene.ground_noise[1:], y1, x1)
    for i, r in enumerate(scene.ranges):
        edge = np.minimum(_skyline(r, x1, scene.horizon), scene.horizon)
        skyline = np.minimum(skyline, edge)
        inside = (y >= edge[None, :]) & (y < scene.horizon)
        wander = r.ridge(y1)[:, None]  # ridges and gullies wander alike, or faces would meet in straight lines
        owner = _tents(r, x - 0.8 * wander, scene.horizon).argmin(-1)  # [rows, cols]: the peak a pixel belongs to
        fall_x = r.peak_x[owner] + wander - r.ridge(r.peak_y)[owner]
        offset = (x - fall_x) * facing  # > 0: the lit side
        lit = _smooth(-0.006, 0.006, offset)
        rock = np.array(r.rock, np.float32) * light
        shade = _mix(rock * 0.62, rock * 1.22, lit) * (0.86 + 0.28 * rock_texture)[..., None]
        if r.snow_line:
            depth = y - (edge[None, :] * 0.35 + r.peak_y[owner] * 0.65) + r.snow(x1)[None, :]
            snow = _smooth(0.012, -0.012, depth - r.snow_line)
            white = _mix(np.array((0.70, 0.77, 0.90), np.float32), np.array((0.98, 0.98, 1.0), np.float32), lit)
            shade = _mix(shade, white * _mix(light, np.ones(3, np.float32), 0.25), snow)
        shade = _mix(shade, low * (0.9 if scene.time != "night" else 1.0), r.haze)
        image[inside] = shade[inside]
        label[inside], part[inside] = _MOUNTAIN, 2 + i
        ridges[inside] = False
        reach = np.maximum(0.5 * (scene.horizon - r.peak_y[owner]), 0.05)
        on_ridge = inside & (np.abs(x - fall_x) * aspect < _line_width(height) / 2)
        ridges |= on_ridge & (y < r.peak_y[owner] + reach)

    # Ground: meadow, then the lake over it.
    far, near = (np.array(c, np.float32) for c in _GRASSES[scene.grass])
    deep = np.clip((y1 - scene.horizon) / (1 - scene.horizon), 0, 1)[:, None]
    texture = _noise(scene.ground_noise[1:], y1, x1, fall=0.9)
    meadow = _mix(far, near, deep) * light * (0.80 + 0.40 * texture)[..., None]
    below = np.broadcast_to(y >= scene.horizon, label.shape)
    image[below] = meadow[below]
    label[below], part[below] = _MEADOW, 10
    if scene.ground != "meadow":
        shore = np.full(cols, 2.0, np.float32)
        if scene.ground == "shore":
            shore = scene.shore_y + scene.shore(x1)
        water = below & (y < shore[None, :])
        mirror = np.clip(2 * scene.horizon - y1, 0, 1)
        sky_mirror = _mix(top, low, np.clip(mirror / scene.horizon, 0, 1) ** 1.3)[:, None, :]
        colour = _mix(np.broadcast_to(sky_mirror, image.shape), np.array((0.06, 0.26, 0.50), np.float32) * light, 0.45)
        # The mountains' mirror image, shortened, and broken by ripples that widen towards the viewer.
        wave = np.sin(2 * np.pi * 15.0 * np.sqrt(deep) + 2.0 * scene.ripple(x1)[None, :])
        mirrored = (scene.horizon + 0.7 * (scene.horizon - skyline))[None, :] + 0.012 * wave
        colour = _mix(colour, np.array(scene.ranges[-1].rock, np.float32) * light * 0.7, 0.42 * (y < mirrored))
        colour = colour * (1 + 0.10 * wave * (0.4 + 0.6 * deep))[..., None]
        if scene.disc is not None:
            column = np.exp(-(((x - scene.disc[0]) * aspect / (0.04 + 0.05 * deep)) ** 2)) * (0.35 + 0.35 * wave)
            colour = _mix(colour, disc_colour, np.clip(column, 0, 1) * 0.8)
        image[water] = colour[water]
        label[water], part[water] = _WATER, 11
        if scene.ground == "shore":  # a pale rim of sand
            rim = below & (y >= shore[None, :]) & (y < shore[None, :] + 0.012)
            image[rim] = np.array((0.80, 0.74, 0.56), np.float32) * light

    # Trees, far to near.
    for i, tree in enumerate(scene.trees):
        crown, trunk, side = _tree_mask(tree, y, x, aspect)
        green = np.array((0.07, 0.27, 0.15) if tree.conifer else (0.16, 0.33, 0.09), np.float32) * tree.shade
        leaves = _mix(green * 0.75, green * 1.45, 0.5 + 0.5 * side * facing) * (0.75 + 0.5 * texture)[..., None]
        image[trunk] = np.array((0.30, 0.20, 0.12), np.float32) * light
        image[crown] = (leaves * _mix(light, np.ones(3, np.float32), 0.15))[crown]
        both = crown | trunk
        label[both], part[both] = _TREE, 20 + i

    segmentation = np.stack([_box((label == c).astype(np.float32), k) for c in range(len(CLASSES))], -1).argmax(-1)
    lines = _outlines(part, _line_width(height) * rows / 2) | (ridges & (label == _MOUNTAIN))
    stroke = np.zeros_like(lines)
    for sx, sy, length in scene.ripple_strokes:
        stroke |= (np.abs(y - sy) < _line_width(height) / 2) & (np.abs(x - sx - length / 2) < length / 2)
    lines |= stroke & (label == _WATER)
    return {
        "image": np.clip(_box(np.clip(image, 0, 1), k) * 2 - 1, -1, 1).astype(np.float32),
        "segmentation": segmentation.astype(np.uint8),
        "sketch": np.clip(1 - _box(lines.astype(np.float32), k), 0, 1).astype(np.float32),
    }


def _line_width(height: int) -> float:
    """Pencil width as a share of the picture's height: to scale, and never under a pixel."""
    return max(0.008, 1.0 / height)


def _outlines(part: np.ndarray, radius: float) -> np.ndarray:
    """Pixels within about ``radius`` of a change of object."""
    edge = np.zeros(part.shape, bool)
    step = part[:, 1:] != part[:, :-1]
    edge[:, 1:] |= step
    edge[:, :-1] |= step
    step = part[1:] != part[:-1]
    edge[1:] |= step
    edge[:-1] |= step
    for _ in range(round(radius) - 1):  # the edge is two pixels wide already
        grown = edge.copy()
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        edge = grown
    return edge


def scene_at(seed: int, split: str, index: int) -> Scene:
    """The scene of (seed, split, index). Splits use different branches of the seed sequence: they cannot overlap."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be at least 0, got seed={seed}, index={index}")
    branch = np.random.SeedSequence((seed, index), spawn_key=(SPLITS.index(split),))
    return draw_scene(np.random.default_rng(branch))


class Scenes:
    """A random-access source of scenes.

    Args:
      split: ``train`` or ``test``.
      size: number of examples.
      height: rows of the pictures.
      width: columns of the pictures.
      seed: another seed is another data set.
    """

    def __init__(self, split: str, size: int, height: int = 32, width: int = 32, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if size < 1:
            raise ValueError(f"a data set needs at least one example, got size={size}")
        self.split, self.size, self.height, self.width, self.seed = split, size, height, width, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        scene = scene_at(self.seed, self.split, int(index))
        return render(scene, self.height, self.width) | {"caption": scene.caption, "facts": scene.facts}

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[i] for i in range(self.size))
