"""Attention: scaled dot products by what is fastest on the device, and the projections around them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_QUERIES = 256  # at a time, whose scores with some thousand keys stay in a processor's cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention of several heads, by what is fastest on the device.

    On a GPU that is cuDNN's fused kernel for half precision, on a processor a loop over heads.

    Args:
        q: queries ``[B, L, heads, D]``.
        k: keys ``[B, S, heads, D]``.
        v: values, k's shape.
        causal: position i sees positions up to i only.

    Returns:
        ``[B, L, heads, D]`` of q's dtype.
    """
    dtype, depth = q.dtype, q.shape[-1]
    on_gpu, half = jax.default_backend() == "gpu", dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN's fused kernel takes half precision and heads of up to 128 channels; jax does not choose it by itself.
    fused = on_gpu and half and depth <= 128 and depth % 8 == 0 and min(q.shape[1], k.shape[1]) > 1
    if loops_over_heads():
        return _by_heads(q, k, v, causal).astype(dtype)
    if dtype == jnp.float16 and not on_gpu:  # jax asks for a float16 product that CPUs and TPUs do not have
        q, k, v = (part.astype(jnp.float32) for part in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # jax's own softmax mixes bfloat16 and float32
        h = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if fused else None)
    return h.astype(dtype)


def loops_over_heads() -> bool:
    """Whether :func:`attend` takes one head of one example after the other.

    XLA's product of many small matrices is slow on processors, and their scores do not fit in a cache: this way a U-Net
    with 4,096 positions takes a fifth of the time (benchmarks/results/cache_build_cpu.json). Not where a batch is
    split over several devices: each would wait for the others' rows.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _by_heads(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """:func:`attend` in float32, some queries at a time."""
    batch, length, heads, depth = q.shape
    rows = max((n for n in range(1, min(length, _QUERIES) + 1) if length % n == 0), default=length)
    rows = length if causal or rows < _QUERIES // 8 else rows
    hidden = jnp.triu(jnp.full((length, k.shape[1]), -jnp.inf), 1) if causal else 0.0

    def head(parts: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = parts

        def some(q: jax.Array) -> jax.Array:
            scores = q @ k.T + hidden
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            return (weights @ v) / weights.sum(-1, keepdims=True)

        return some(q) if rows == length else jax.lax.map(some, q.reshape(-1, rows, depth)).reshape(length, depth)

    q, k, v = (jnp.moveaxis(p.astype(jnp.float32), 2, 1).reshape(batch * heads, -1, depth) for p in (q, k, v))
    found = jax.lax.map(head, (q * depth**-0.5, k, v))
    return jnp.moveaxis(found.reshape(batch, heads, length, depth), 1, 2)


def multi_head(
    x: jax.Array, context: jax.Array, heads: int, head_dim: int, dtype: Any, use_bias: bool = True
) -> jax.Array:
    """Attention of several heads with its four projections, which become parameters of the module that calls this.

    Args:
        x: what asks, ``[B, L, C]``.
        context: what is asked, ``[B, S, E]``; x itself for self-attention.
        heads: number of heads.
        head_dim: channels per head; ``heads * head_dim`` need not be C.
        dtype: what it computes in.
        use_bias: whether queries, keys and values have a bias. The projection of the output always has one.

    Returns:
        ``[B, L, C]``.
    """
    q, k, v = (
        nn.Dense(heads * head_dim, use_bias, dtype, name=name)(h).reshape(h.shape[0], -1, heads, head_dim)
        for name, h in (("to_q", x), ("to_k", context), ("to_v", context))
    )
    h = attend(q, k, v).reshape(x.shape[0], -1, heads * head_dim)
    return nn.Dense(x.shape[-1], dtype=dtype, name="to_out_0")(h)
