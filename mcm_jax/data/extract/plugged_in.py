"""A function of the user's, or a net of any framework, as an extractor: what it is shown, and what it may give."""

import functools
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from mcm_jax.errors import UserError
from mcm_jax.modalities import known
from mcm_jax.plugins import imported, open_onnx

_PROBE = 64  # height and width of the picture that tries what takes any size


def plugged_in(what: str, modality: str) -> Callable[[np.ndarray], np.ndarray]:
    """What finds a condition in a picture, by ``module:function`` or ``FILE.onnx``.

    Args:
      what: the text that names it.
      modality: whose conditions they are.

    Returns:
      A function from uint8 ``[H, W, 3]`` to uint8 ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]``, or uint16 ``[H, W]`` of
      many classes.

    Raises:
      UserError: there is none, or it gives no condition for a black picture. The function raises it, too.
    """
    checked = functools.partial(_condition_of, what, modality)
    fixed = None
    if what.endswith(".onnx"):
        read, fixed = open_onnx("extractor", what, checked)
    else:
        function, alone = imported("extractor", what, "FILE.onnx"), threading.Lock()

        def read(images: np.ndarray) -> np.ndarray:
            with alone:  # nobody promised that it can do two at a time
                out = function(images)
            return checked(out, images.shape[:3], False)

    def find(picture: np.ndarray) -> np.ndarray:
        shown = picture
        if fixed and fixed != picture.shape[:2]:
            shown = np.asarray(Image.fromarray(picture).resize(fixed[::-1], Image.Resampling.LANCZOS))
        condition = read(shown[None].astype(np.float32) / 127.5 - 1)[0]
        labels = condition.dtype == np.int32
        if condition.shape[:2] != picture.shape[:2]:  # a net of a fixed size sees the picture squeezed
            how = Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR
            condition = np.asarray(Image.fromarray(condition).resize(picture.shape[1::-1], how))
        return condition.astype(np.uint16 if condition.max() > 255 else np.uint8) if labels else condition

    find(np.zeros((*(fixed or (_PROBE, _PROBE)), 3), np.uint8))  # what is wrong shows before any picture
    return find


def _condition_of(
    what: str, modality: str, out: np.ndarray, pixels: tuple[int, int, int], channels_first: bool
) -> np.ndarray:
    """Labels, int32 ``[N, H, W]``, or maps, uint8 ``[N, H, W]`` or ``[N, H, W, C]``, from what was found."""
    n, h, w = pixels
    kind = found.kind if (found := known(modality)) else ""
    if out.ndim == 4:  # channels first, last, or none
        first, last = out.shape[::2] == (n, h) and out.shape[3] == w, out.shape[:3] == (n, h, w)
        if first and (channels_first or not last):
            out = np.moveaxis(out, 1, -1)
        floats = np.issubdtype(out.dtype, np.floating)
        if out.shape[:3] == (n, h, w) and floats and (kind == "labels" or out.shape[3] not in (1, 3, 4)):
            out = out.argmax(-1)  # logits
        elif out.shape[3] == 1:
            out = out[..., 0]
    labels, maps = np.issubdtype(out.dtype, np.integer), np.issubdtype(out.dtype, np.floating)
    if out.shape[:3] != (n, h, w) or not (labels or maps) or (labels and out.ndim != 3):
        raise UserError(
            f"the extractor {what} gave {out.dtype}{list(out.shape)} for pictures {[n, h, w, 3]}; expected labels, "
            f"integers {[n, h, w]}, or maps, floats {[n, h, w]} or {[n, h, w, 'C']} with 1, 3 or 4 channels"
        )
    most = 65535 if labels else 1
    if not np.isfinite(out).all() or out.min() < 0 or out.max() > most:
        expected = "labels in 0..65535" if labels else "maps of values in [0, 1]: scale or clip them in the extractor"
        raise UserError(f"the extractor {what} gave values from {out.min()} to {out.max()}; expected {expected}")
    return out.astype(np.int32) if labels else np.round(out * 255).astype(np.uint8)
