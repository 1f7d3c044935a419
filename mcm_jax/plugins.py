"""What users plug in: functions of their own, and nets of other frameworks as ONNX files.

Judges and extractors take both, with one contract: pictures in, float32 ``[N, H, W, 3]`` in [-1, 1].
"""

import importlib
import pathlib
from collections.abc import Callable

import numpy as np

from mcm_jax.errors import UserError

_BATCH = 64  # pictures a call of an ONNX net that takes any number


def imported(role: str, spec: str, can_be: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function that ``module:function`` names.

    Args:
      role: what it is here, for messages: judge, extractor.
      spec: the text.
      can_be: what else it can be, for messages.

    Returns:
      The function, whose answers are arrays.

    Raises:
      UserError: there is none. The function raises it, too, where an answer is no array.
    """
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as e:  # a module of the user's can fail in any way
        raise UserError(
            f"{role} {spec}: cannot be imported ({type(e).__name__}: {e}); expected module:function, or {can_be}. A "
            f"module of your own is found from where the command is typed if PYTHONPATH has that folder"
        ) from e
    if not callable(function):
        raise UserError(f"{role} {spec}: {name} is a {type(function).__name__}, expected a function")

    def answer(images: np.ndarray) -> np.ndarray:
        found = function(images)
        try:
            return np.asarray(found)
        except (ValueError, TypeError) as e:
            raise UserError(f"{role} {spec}: it gave a {type(found).__name__} that is no array ({e})") from e

    return answer


def open_onnx(
    role: str, spec: str, decode: Callable[[np.ndarray, tuple[int, int, int], bool], np.ndarray]
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int] | None]:
    """A net of another framework. Which axis is which is found by its shapes.

    Args:
      role: what it is here, for messages: judge, extractor.
      spec: its file.
      decode: makes what is read of the net's first output: given that, the batch's ``(N, H, W)`` and whether channels
        are first in what the net takes.

    Returns:
      What reads pictures, float32 ``[N, H, W, 3]`` in [-1, 1]; and their ``(H, W)``, None for any.

    Raises:
      UserError: it cannot be loaded, or takes something else than pictures.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError(f"{role} {spec}: ONNX files need onnxruntime; pip install 'mcm-jax[onnx]'") from e
    if not pathlib.Path(spec).is_file():
        raise UserError(f"{role} {spec}: no such file")
    try:
        session = onnxruntime.InferenceSession(spec, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has a class for each way to fail, which share no other base
        raise UserError(f"{role} {spec}: onnxruntime cannot load it ({e})") from e
    inputs = session.get_inputs()
    shape = list(inputs[0].shape) if inputs else []
    floats = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if len(inputs) != 1 or len(shape) != 4 or 3 not in (shape[1], shape[3]) or inputs[0].type not in floats:
        found = ", ".join(f"{i.name}: {i.type}{i.shape}" for i in inputs)
        raise UserError(
            f"{role} {spec}: it takes {found or 'nothing'}; expected one batch of pictures in [-1, 1], float "
            f"[N, 3, H, W] or [N, H, W, 3]"
        )
    channels_first = shape[1] == 3
    size = tuple(shape[2:] if channels_first else shape[1:3])
    fixed = tuple(isinstance(side, int) for side in size)
    if any(fixed) != all(fixed):
        raise UserError(f"{role} {spec}: it takes pictures {shape}; expected height and width both fixed, or neither")
    size = size if all(fixed) else None
    batch = shape[0] if isinstance(shape[0], int) else None  # a fixed one must be filled

    def read(images: np.ndarray) -> np.ndarray:
        if not len(images):
            return read(np.zeros((1, *images.shape[1:]), np.float32))[:0]
        found = []
        for start in range(0, len(images), batch or _BATCH):
            part = images[start : start + (batch or _BATCH)]
            padded = np.concatenate([part, np.repeat(part[-1:], (batch or len(part)) - len(part), axis=0)])
            given = padded.transpose(0, 3, 1, 2) if channels_first else padded
            try:
                out = session.run(None, {inputs[0].name: np.ascontiguousarray(given, floats[inputs[0].type])})[0]
            except Exception as e:  # as above
                raise UserError(f"{role} {spec}: it fails on pictures {list(given.shape)} ({e})") from e
            found.append(decode(np.asarray(out), padded.shape[:3], channels_first)[: len(part)])
        return np.concatenate(found)

    return read, size
