"""Judges of maps, each by the metric of its field: structure, depth, normals, colour, keypoints.

What a *reader* finds in a sample, or without one the sample itself, is compared with the map that it was drawn for.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from PIL import ImageColor

from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement, Number, settings_of
from mcm_jax.evaluation.judges.readers import at_size, resize_images
from mcm_jax.modalities import Modality
from mcm_jax.pictures import to_uint8
from mcm_jax.plugins import imported, open_onnx

CAN_BE = (
    "ms_ssim (structure), colour (distance in CIELAB), depth:reader=READER (RMSE), pck:reader=READER (keypoints), by a "
    "READER module:function or FILE.onnx (the first two: or none)"
)
OF_NORMALS = "normals:reader=READER (mean angular error), by a READER module:function or FILE.onnx"
OF_SPARSE = "colour (distance in CIELAB where there is a colour)"

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as grey maps are read from coloured files
_OF_MAPS = "[N, H, W], or [N, H, W, C] of several channels"
_OF_POINTS = "[N, K, 3]: y and x in pixels, confidence in [0, 1]"


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads pictures ``[N, H, W, 3]`` in [-1, 1] of any size at its own.

    Attributes:
      name: what is read, by what and at what size, for the report.
      size: ``(H, W)`` of what :attr:`read` takes.
      read: gives float arrays ``[N, ...]``.
    """

    name: str
    size: tuple[int, int]
    read: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.read(resize_images(images, *self.size))


def _opened(modality: Modality, spec: str, reader: str, gives: str, checked: Callable, held_out: HeldOut) -> _Reader:
    """The reader that a text names; `checked` takes what it gave, ``(N, H, W)`` and whether channels are first."""
    size, checked = held_out.images.shape[1:3], functools.partial(checked, reader)
    if reader.endswith(".onnx"):
        read, fixed = open_onnx("judge", reader, checked)
        size = fixed or size
        return _Reader(f"read by {reader} {at_size(size, held_out.images)}", size, read)
    if ":" in reader:
        function = imported("judge", reader, f"FILE.onnx, which give {gives}")
        name = f"read by {reader} {at_size(size, held_out.images)}"
        return _Reader(name, size, lambda images: checked(function(images), images.shape[:3], False))
    raise _no_reader(modality, spec, gives)


def _no_reader(modality: Modality, spec: str, gives: str) -> UserError:
    return UserError(
        f"--judge={modality.name}={spec}: expected a reader, {spec.partition(':')[0]}:reader=module:function (of "
        f"yours, pictures [N, H, W, 3] in [-1, 1] to {gives}) or reader=FILE.onnx (a net that does the same)"
    )


def _map_of(
    channels: int, bounded: bool, name: str, out: np.ndarray, pixels: tuple[int, int, int], channels_first: bool
) -> np.ndarray:
    """Float64 ``[N, H, W, C]`` from what a reader gave; refuses what is no map."""
    n, h, w = pixels
    first, last = out.shape == (n, channels, h, w), out.shape == (n, h, w, channels)
    last |= channels == 1 and out.shape == (n, h, w)
    if not np.issubdtype(out.dtype, np.floating) or not (first or last):
        raise UserError(
            f"judge {name}: it gave {out.dtype}{list(out.shape)} for pictures {[n, h, w, 3]}; expected floats "
            f"{[n, h, w] if channels == 1 else [n, h, w, channels]}"
        )
    if not np.isfinite(out).all():
        raise UserError(f"judge {name}: found NaN or infinity in what it gave, expected numbers")
    if bounded and out.size and (out.min() < 0 or out.max() > 1):
        raise UserError(
            f"judge {name}: it gave {out.min():g} to {out.max():g}, expected values in [0, 1], as the conditions have; "
            f"scale or clip them in the reader (depth of any scale: depth:align=1)"
        )
    if first and (channels_first or not last):
        out = np.moveaxis(out, 1, -1)
    return out.reshape(n, h, w, channels).astype(np.float64)


def _points_of(name: str, out: np.ndarray, pixels: tuple[int, int, int], channels_first: bool) -> np.ndarray:
    """Float64 ``[N, K, 3]`` from what a reader gave; refuses what are no keypoints."""
    floats = np.issubdtype(out.dtype, np.floating)
    if not floats or out.ndim != 3 or out.shape[0] != pixels[0] or out.shape[1] < 1 or out.shape[2] != 3:
        raise UserError(
            f"judge {name}: it gave {out.dtype}{list(out.shape)} for {pixels[0]} pictures; expected floats {_OF_POINTS}"
        )
    if not np.isfinite(out).all() or (out.size and (out[..., 2].min() < 0 or out[..., 2].max() > 1)):
        raise UserError(
            f"judge {name}: it gave confidences from {out[..., 2].min():g} to {out[..., 2].max():g}; expected "
            f"{_OF_POINTS}, all finite; a point that is not found has confidence 0"
        )
    return out.astype(np.float64)


def _map_reader(modality: Modality, spec: str, reader: str, held_out: HeldOut, bounded: bool = True) -> _Reader:
    """The reader of a map; where none is named, the picture itself, grey for one channel."""
    if reader:
        checked = functools.partial(_map_of, modality.channels, bounded)
        found = _opened(modality, spec, reader, f"floats {_OF_MAPS}", checked, held_out)
        found(held_out.images[:1])  # what is wrong with it shows before any sample
        return found
    if modality.channels not in (1, 3):
        raise _no_reader(modality, spec, f"floats {_OF_MAPS}")  # of so many channels a picture has none

    def itself(images: np.ndarray) -> np.ndarray:
        values = np.clip((images + 1) / 2, 0, 1)
        return values if modality.channels == 3 else (values @ _LUMA)[..., None]

    size = held_out.images.shape[1:3]
    what = "itself" if modality.channels == 3 else "in grey"
    return _Reader(f"of the picture {what} {at_size(size, held_out.images)}", size, itself)


def _targets(modality: Modality, reader: _Reader, held_out: HeldOut) -> np.ndarray:
    """The conditions on a reader's grid, float32 ``[N, H, W, planes]``."""
    return held_out.at(*reader.size)[modality.name].reshape(len(held_out), *reader.size, modality.planes)


def _compared_at(side: int, maps: np.ndarray) -> tuple[int, int]:
    """Where maps ``[N, H, W, C]`` are compared if the shorter side shall be `side`: 0 is as they are.

    -1 is the resolution at which they were made, if they were enlarged by repeating pixels.
    """
    size = maps.shape[1:3]
    if side == -1:
        rows, columns = (np.diff(maps, axis=axis).any(others) for axis, others in ((1, (0, 2, 3)), (2, (0, 1, 3))))
        return 1 + int(rows.sum()), 1 + int(columns.sum())
    return (round(size[0] * side / min(size)), round(size[1] * side / min(size))) if side else size


def _mean(values: np.ndarray, why: str) -> Number:
    """Of what is defined; where nothing is, why."""
    return why if np.isnan(values).all() else float(np.nanmean(values))


def ms_ssim(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """Multi-scale structural similarity of what a reader finds with the map: the mean over pictures, in [0, 1]."""
    settings = settings_of(modality.name, spec, {"reader": ""}, "reader, as in ms_ssim:reader=module:function")
    reader = _map_reader(modality, spec, settings["reader"], held_out)
    scales, everything = metrics.ms_ssim_scales(*reader.size), len(metrics.MS_SSIM_WEIGHTS)
    if not scales:
        raise UserError(
            f"--judge={modality.name}={spec}: SSIM's window is 11 pixels wide, pictures are {reader.size[0]}x"
            f"{reader.size[1]} here; expected at least 11x11, or another judge"
        )
    targets = _targets(modality, reader, held_out)

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        each = metrics.ms_ssim(reader(images), targets[which])
        return Judgement({"ms_ssim": float(each.mean())}, each)

    fewer = f" of {scales} scale(s), since {everything} do not fit," if scales < everything else ""
    return Judge(modality.name, f"MS-SSIM{fewer} {reader.name}", judge, ("ms_ssim",), ("ms_ssim",))


def depth(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """Root mean square and absolute relative error of the depth that a reader finds: means over pictures."""
    means = "reader or align (1 for depth that is known but for scale and shift), as in depth:align=1,reader=FILE.onnx"
    settings = settings_of(modality.name, spec, {"reader": "", "align": 0}, means)
    if modality.channels != 1:
        raise UserError(f"--judge={modality.name}={spec}: depth has one channel, {modality.name} {modality.channels}")
    if settings["align"] not in (0, 1):
        raise UserError(f"--judge={modality.name}={spec}: found align={settings['align']}, expected 0 or 1")
    align = bool(settings["align"])
    if not settings["reader"]:
        raise _no_reader(modality, spec, "depth [N, H, W] in [0, 1], or with align=1 of any scale,")
    reader = _map_reader(modality, spec, settings["reader"], held_out, bounded=not align)
    targets = _targets(modality, reader, held_out)

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        errors = metrics.depth_errors(reader(images), targets[which], align)
        why = f"no pixel of these maps has a depth of {metrics.LEAST_DEPTH:g} or more"
        return Judgement({"depth": {name: _mean(each, why) for name, each in errors.items()}}, -errors["rmse"])

    how = f"errors of depth {reader.name}" + (", after a fit of scale and shift to each map" if align else "")
    return Judge(modality.name, how, judge, ("depth.rmse",), ("depth_rmse",))


def colour(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """Distance of the colours in CIELAB (CIE76's Delta E): the mean over pixels, then over pictures.

    Pixels of which less than a half is known (:meth:`Modality.known_at`) do not count. With ``size``, pictures and maps
    are averaged to a grid first: what is finer than that is not asked for.
    """
    means = (
        "reader, blank (the colour of pixels that say nothing, e.g. white or #ffffff) or size (of the shorter side on "
        "which colours are compared, in pixels; -1 for that of maps of a low resolution, 0 for all), as in "
        "colour:blank=white"
    )
    settings = settings_of(modality.name, spec, {"reader": "", "blank": "", "size": 0}, means)
    if modality.channels != 3:
        raise UserError(
            f"--judge={modality.name}={spec}: {modality.name} has {modality.channels} channel(s), but colours have "
            f"three (config.modalities.{modality.name}.channels); expected ms_ssim or another judge"
        )
    try:
        blank = ImageColor.getcolor(settings["blank"], "RGB") if settings["blank"] else None
    except ValueError as e:
        raise UserError(
            f"--judge={modality.name}={spec}: found blank={settings['blank']}, expected the name of a colour (white) "
            f"or #rrggbb"
        ) from e
    reader = _map_reader(modality, spec, settings["reader"], held_out)
    if not -1 <= settings["size"] <= min(reader.size):
        raise UserError(
            f"--judge={modality.name}={spec}: pictures are {reader.size[0]}x{reader.size[1]}; expected {means}"
        )
    maps = _targets(modality, reader, held_out)
    size = _compared_at(settings["size"], maps)
    maps = modality.resize_all(maps, *size)
    known = modality.known_at(maps)
    counts = np.ones(maps.shape[:3], bool) if known is None else known >= 0.5
    targets = np.round(maps[..., :3] * 255).astype(np.uint8)
    if blank:
        counts &= (targets != blank).any(-1)

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = to_uint8(resize_images(reader(images), *size) * 2 - 1)
        each = metrics.colour_distance(found, targets[which], counts[which])
        why = f"all pixels of these maps are {settings['blank']}" if blank else "no pixel of these maps is known"
        return Judgement({"delta_e": _mean(each, why)}, -each)

    how = f"Delta E (CIE76) {reader.name}" + (f", averaged to {size[0]}x{size[1]}" if size != reader.size else "")
    how += f", where maps are not {settings['blank']}" if blank else ""
    how += f", over the {counts.mean():.0%} of the pixels that have a colour" if known is not None else ""
    return Judge(modality.name, how, judge, ("delta_e",), ("delta_e",))


def normals(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """Angle between the normals that a reader finds and the map's, in degrees: the mean over pixels, then pictures."""
    settings = settings_of(modality.name, spec, {"reader": ""}, "reader, as in normals:reader=module:function")
    if not settings["reader"]:
        raise _no_reader(modality, spec, "normals as colours, (v + 1) / 2, floats [N, H, W, 3] in [0, 1]")
    reader = _map_reader(modality, spec, settings["reader"], held_out)
    targets = _targets(modality, reader, held_out)
    counts = np.asarray(modality.known_at(targets))

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        each = metrics.angular_error(reader(images), targets[which], counts[which])
        return Judgement({"angular_error": _mean(each, "no pixel of these maps is a unit vector")}, -each)

    how = f"mean angular error in degrees {reader.name}"
    return Judge(modality.name, how, judge, ("angular_error",), ("angular_error",))


def pck(modality: Modality, spec: str, held_out: HeldOut) -> Judge:
    """Share of keypoints, of all pictures, that a reader finds where it finds them in the real picture."""
    means = "reader or alpha (share of the points' box, above 0), as in pck:alpha=0.1,reader=module:function"
    settings = settings_of(modality.name, spec, {"reader": "", "alpha": 0.1}, means)
    alpha = settings["alpha"]
    if not 0 < alpha < np.inf:
        raise UserError(f"--judge={modality.name}={spec}: found alpha={alpha:g}, expected {means}")
    reader = _opened(modality, spec, settings["reader"], f"floats {_OF_POINTS}", _points_of, held_out)
    targets = reader(held_out.images)
    points = targets.shape[1]

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = reader(images)
        if found.shape[1] != points:
            raise UserError(
                f"judge {settings['reader']}: it gave {found.shape[1]} keypoints of samples, but {points} of real "
                f"pictures; expected as many of any, with confidence 0 where one is not found"
            )
        right, of = metrics.correct_keypoints(found, targets[which], alpha)
        each = np.divide(right, of, out=np.full(len(of), np.nan), where=of > 0)
        why = "no real picture of these has two keypoints that are seen"
        return Judgement({"pck": float(right.sum() / of.sum()) if of.any() else why}, each)

    how = f"PCK at {alpha:g} of {points} keypoint(s) {reader.name}, against those of the real picture"
    return Judge(modality.name, how, judge, ("pck",), ("pck",))


JUDGES: dict[str, Callable[[Modality, str, HeldOut], Judge]] = {
    "ms_ssim": ms_ssim,
    "depth": depth,
    "colour": colour,
    "pck": pck,
}
"""By what a text begins with."""
