"""The base's U-Net with additions, as its peers need them, without a change to its code.

Flax lets a function stand between a module and its call (:func:`flax.linen.intercept_methods`); the U-Nets' parts have
diffusers' names, so what is added where can be said by them. Both :class:`mcm_jax.base.unet2d.UNet2D` and
:class:`mcm_jax.base.unet2d_condition.UNet2DCondition` work so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from mcm_jax.base import Base
from mcm_jax.errors import UserError


def check_supported(base: Base, method: str) -> None:
    """Raises UserError where a base's U-Net is of another kind than those whose parts are known here."""
    found = type(base.unet).__name__
    if found not in ("UNet2D", "UNet2DCondition"):
        raise UserError(
            f"the peer {method!r} reaches into the base's U-Net and knows UNet2DModel and UNet2DConditionModel; the "
            f"base {base.name!r} has a {found}. Of the methods here mcm-* take any base"
        )
    if base.unet.config.mid_block_type is None:
        raise UserError(f"the peer {method!r} needs a middle block; the base {base.name!r} has none")


def widths_of(base: Base) -> tuple[int, ...]:
    """Channels of each level."""
    return base.unet.config.block_out_channels


def forward(
    unet: Any,
    params: Any,
    *arguments: jax.Array,
    hint: jax.Array | None = None,
    residuals: Sequence[jax.Array] = (),
    middle: jax.Array | None = None,
    features: Sequence[jax.Array] = (),
) -> jax.Array:
    """The U-Net's prediction with additions, which are brought to the U-Net's dtype.

    Args:
      unet: of the base.
      params: of the U-Net.
      arguments: x, t and, if it takes one, the context.
      hint: added to the first convolution's result, ``[B, H, W, widths[0]]``. A linear map of further channels here is
        the same as a first convolution that is widened to see them.
      residuals: added to the skips, the finest first, as a ControlNet gives them.
      middle: added to the middle block's result.
      features: of each level, added to the result of its last block before it is halved, as a T2I-Adapter gives them.

    Returns:
      what the U-Net predicts, ``[B, H, W, C]``.
    """
    left = list(residuals)

    def add(module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        path = module.path
        if residuals and path[0].startswith("up_blocks_") and len(path) == 1:
            skips = kwargs["skips"]
            taken = [left.pop() for _ in skips][::-1]
            kwargs = kwargs | {"skips": [s + r.astype(s.dtype) for s, r in zip(skips, taken, strict=True)]}
        out = call(*args, **kwargs)
        if path == ("conv_in",) and hint is not None:
            out = out + hint.astype(out.dtype)
        if path == ("mid_block",) and middle is not None:
            out = out + middle.astype(out.dtype)
        if features and len(path) == 2 and path[0].startswith("down_blocks_") and _is_last(module.parent, path[1]):
            out = out + features[int(path[0].rpartition("_")[2])].astype(out.dtype)
        return out

    return _with(add, unet, params, *arguments)


def encode(
    unet: Any, params: Any, *arguments: jax.Array, hint: jax.Array | None = None
) -> tuple[list[jax.Array], jax.Array]:
    """What the U-Net's encoder gives: the skips, the finest first, and the middle block's result.

    Its decoder does not run, and `params` need not hold it.

    Args:
      unet: of the base.
      params: of the encoder.
      arguments: x, t and, if it takes one, the context.
      hint: added to the first convolution's result.
    """
    skips, middle = [], []

    def note(module: nn.Module, call: Callable, args: tuple, kwargs: dict) -> Any:
        path = module.path
        if len(path) > 1:
            return call(*args, **kwargs)
        if path[0].startswith("up_blocks_"):
            return args[0], []
        if path[0] in ("conv_norm_out", "conv_out"):
            return args[0]
        out = call(*args, **kwargs)
        if path[0] == "conv_in":
            out = out if hint is None else out + hint.astype(out.dtype)
            skips.append(out)
        elif path[0].startswith("down_blocks_"):
            skips.extend(out[1])
        elif path[0] == "mid_block":
            middle.append(out)
        return out

    _with(note, unet, params, *arguments)
    return skips, middle[0]


def _with(change: Callable, unet: Any, params: Any, *arguments: jax.Array) -> Any:
    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != "__call__" or not context.module.path:
            return call(*args, **kwargs)
        return change(context.module, call, args, kwargs)

    with nn.intercept_methods(intercept):
        return unet.apply({"params": params}, *arguments)


def _is_last(level: Any, name: str) -> bool:
    """Whether a part is the last block of a level on the way down: its last attention, or residual block."""
    return name == f"{'resnets' if level.attention is None else 'attentions'}_{level.layers - 1}"
