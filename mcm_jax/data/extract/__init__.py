"""Extractors: conditions found in pictures. A text says which, and into which modality's folder its output goes.

::

    canny                          one of :mod:`.filters` by its own name, with the settings that its function has
    canny:sigma=2:low=0.05         the same with other settings
    fine=canny:sigma=0.5           into a folder of another name
    depth=mymodule:depth           a function of yours
    segmentation=net.onnx          a net of any framework, run by onnxruntime (the extra ``onnx``)

A function or a net is held to the judges' contract (:mod:`mcm_jax.plugins`), so one function can extract a condition
from pictures and judge samples by it. It is given one picture, float32 ``[1, H, W, 3]`` in [-1, 1], and gives integers
``[1, H, W]``, which are labels, or floats in [0, 1] of ``[1, H, W]`` or ``[1, H, W, C]`` with 1, 3 or 4 (RGBA)
channels.

Every extractor sees a picture brought to ``size`` pixels along its shorter side, if it is larger: which lines there are
depends on the scale at which one looks. For lines, smaller ones than 128 pixels are enlarged to that.
"""

import dataclasses
import hashlib
import inspect
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mcm_jax.data.extract.filters import EXTRACTORS
from mcm_jax.data.extract.plugged_in import plugged_in
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import ModalitiesSettings, Modality

VERSION = 1
"""Raised whenever an extractor gives something else for the same picture and settings."""

SIZE = 512
"""The shorter side, in pixels, at which pictures are looked at unless the text says otherwise; 0 is as they are."""

_LEAST = 128  # the shorter side at which lines are looked for: in fewer pixels they run together
_LONGEST = 16  # times as long as it is wide; a thread of pixels, enlarged, would fill the memory
_LINES = ("canny", "soft_edges", "sketch")


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Finds a condition in a picture.

    Attributes:
      modality: whose conditions it gives: the name of their folder.
      record: all that decides what it gives, as far as it is known: of a function of the user's, its name alone.
      size: of the shorter side of the pictures that :attr:`find` is given at most; 0 for any.
      find: from uint8 ``[H, W, 3]`` and the picture's name to uint8 ``[h, w]``, ``[h, w, 3]`` or ``[h, w, 4]``, or
        uint16 ``[h, w]`` of many classes; ``h:w`` is ``H:W``.
    """

    modality: str
    record: dict[str, Any]
    size: int
    find: Callable[[np.ndarray, str], np.ndarray]

    def __call__(self, picture: Image.Image, name: str) -> Image.Image:
        """The condition, to be saved as PNG.

        Args:
          picture: RGB, upright.
          name: of the picture: where an extractor draws at random, it draws the same for the same name.

        Raises:
          UserError: the user's function or net gave no condition.
        """
        if self.size and min(picture.size) > self.size:
            picture = _scaled(picture, self.size)
        return Image.fromarray(self.find(np.asarray(picture), name))


def open_extractors(text: str) -> tuple[Extractor, ...]:
    """The extractors that a text names, with commas between them.

    Args:
      text: see the top of this module.

    Raises:
      UserError: there is no such extractor, or setting, or two write into one folder.
    """
    found = [_open(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise UserError(f"--extract={text}: names no extractor; expected {_can_be()}")
    names = [e.modality for e in found]
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(
            f"--extract={text}: two extractors write into the folder {twice[0]}; give one another name, "
            f"{twice[0]}_2={twice[0]}:..."
        )
    return tuple(found)


def _can_be() -> str:
    return f"{', '.join(EXTRACTORS)}, or for any modality NAME=module:function or NAME=FILE.onnx (docs/extract.md)"


def _open(text: str) -> Extractor:
    modality, _, what = ("", "", text) if text.split(":")[0] in EXTRACTORS else text.partition("=")
    parts = what.split(":")
    cut = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    what, settings = ":".join(parts[:cut]), parts[cut:]
    modality = modality or what
    if what not in EXTRACTORS and not what.endswith(".onnx") and not (len(parts[:cut]) == 2 and all(parts[:cut])):
        raise UserError(f"--extract={text}: there is no extractor {what or text!r}; expected {_can_be()}")
    if not modality.isidentifier():
        raise UserError(f"--extract={text}: {modality!r} is no name for a modality; expected letters, digits and _")
    try:
        ModalitiesSettings((Modality(modality, "map", 1),)).check_new()  # refuses names that mean something else
        if what in EXTRACTORS:
            return _of_ours(modality, what, settings)
        return _of_users(modality, what, settings)
    except UserError as e:
        raise UserError(f"--extract={text}: {e}") from e


def _settings(texts: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    values = dict(defaults)
    for text in texts:
        key, _, value = text.partition("=")
        try:
            values[key] = type(defaults[key])(value)
            if not math.isfinite(values[key]):
                raise ValueError
        except (KeyError, ValueError, OverflowError) as e:
            known = ", ".join(f"{k}={v} ({type(v).__name__})" for k, v in defaults.items())
            raise UserError(f"found the setting {text!r}; expected of {known}") from e
    expect(values["size"] >= 0, "size", "at least 0", values["size"])
    return values


def _of_ours(modality: str, what: str, texts: Sequence[str]) -> Extractor:
    function, parameters = EXTRACTORS[what], inspect.signature(EXTRACTORS[what]).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty} | {"size": SIZE}
    if "rng" in parameters:
        defaults["seed"] = 0
    settings = _settings(texts, defaults)
    chosen = {k: v for k, v in settings.items() if k in parameters}

    def find(picture: np.ndarray, name: str) -> np.ndarray:
        shorter, longer = sorted(picture.shape[:2])
        if what in _LINES and shorter < _LEAST and longer <= _LONGEST * shorter:
            picture = np.asarray(_scaled(Image.fromarray(picture), _LEAST))
        if "rng" not in parameters:
            return function(picture, **chosen)
        digest = hashlib.sha256(f"{what}/{settings['seed']}/{name}".encode(errors="surrogateescape")).digest()
        return function(picture, rng=np.random.default_rng(list(digest)), **chosen)

    find(np.zeros((8, 8, 3), np.uint8), "")  # what is wrong with the settings shows before any picture
    return Extractor(modality, {"by": what, **settings, "version": VERSION}, settings["size"], find)


def _of_users(modality: str, what: str, texts: Sequence[str]) -> Extractor:
    size = _settings(texts, {"size": SIZE})["size"]
    find = plugged_in(what, modality)
    record: dict[str, Any] = {"by": what, "size": size}
    if what.endswith(".onnx"):
        record["sha256"] = hashlib.sha256(pathlib.Path(what).read_bytes()).hexdigest()
    return Extractor(modality, record, size, lambda picture, name: find(picture))


def _scaled(picture: Image.Image, shorter: int) -> Image.Image:
    """A picture with so many pixels along its shorter side."""
    factor = shorter / min(picture.size)
    return picture.resize(tuple(round(side * factor) for side in picture.size), Image.Resampling.BICUBIC)
