"""Renders a :class:`mcm_jax.data.scene.Scene` at any resolution: image, segmentation and sketch."""

import math

import numpy as np

from mcm_jax.data.scene import Scene, Tree

CLASSES = ("sky", "sun", "mountain", "water", "meadow", "tree")
"""Names of the segmentation's classes; the index is the pixel's value. ``sun`` is also the moon."""

# The colours in which tools show a label map (never stored as labels).
PALETTE = np.array(
    [(135, 190, 235), (250, 205, 60), (120, 110, 115), (45, 100, 190), (140, 190, 80), (25, 85, 45)], np.uint8
)

_SKY, _SUN, _MOUNTAIN, _WATER, _MEADOW, _TREE = range(6)

# Per time of day: sky at the zenith, sky at the horizon, disc, light on the land (all linear RGB in [0, 1]).
_SKIES = {
    "dawn": ((0.42, 0.52, 0.80), (0.99, 0.80, 0.74), (1.00, 0.93, 0.75), (0.98, 0.88, 0.88)),
    "noon": ((0.22, 0.50, 0.88), (0.76, 0.89, 0.98), (1.00, 0.96, 0.62), (1.00, 1.00, 1.00)),
    "sunset": ((0.34, 0.26, 0.52), (0.99, 0.58, 0.28), (1.00, 0.88, 0.45), (0.90, 0.68, 0.58)),
    "night": ((0.02, 0.04, 0.14), (0.13, 0.20, 0.40), (0.95, 0.95, 0.86), (0.40, 0.46, 0.64)),
}
_GRASSES = (((0.60, 0.74, 0.34), (0.36, 0.58, 0.20)), ((0.74, 0.72, 0.36), (0.56, 0.54, 0.20)))


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
        edge = np.minimum(r.skyline(x1, scene.horizon), scene.horizon)
        skyline = np.minimum(skyline, edge)
        inside = (y >= edge[None, :]) & (y < scene.horizon)
        wander = r.ridge(y1)[:, None]  # ridges and gullies wander alike, or faces would meet in straight lines
        owner = r.tents(x - 0.8 * wander, scene.horizon).argmin(-1)  # [rows, cols]: the peak a pixel belongs to
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
