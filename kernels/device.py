"""Pieces of kernels that several operators inline: logits, what a query sees, one step of an online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "MOST",
    "capped",
    "logits",
    "seen_pairs",
    "softmax_end",
    "softmax_fixed_step",
    "softmax_step",
    "softmax_weights",
]

MOST = tl.constexpr(2**31 - 1)
"""Positions are compared in 32 bit: half the registers, and no context is that long."""


@triton.jit
def capped(b_s, softcap):
    """``softcap * tanh(logits / softcap)``."""
    b_e = tl.exp(-2.0 * tl.abs(b_s) / softcap)
    b_tanh = (1.0 - b_e) / (1.0 + b_e)
    return softcap * tl.where(b_s < 0, -b_tanh, b_tanh)


@triton.jit
def logits(b_q, b_k, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [M, N] of queries [M, D] and keys [D, N], capped to ``softcap * tanh(logits / softcap)``."""
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
    return capped(b_s, softcap) if CAPPED else b_s


@triton.jit
def seen_pairs(b_at, b_place, window, WINDOWED: tl.constexpr):
    """Which queries at positions ``b_at`` [M] see which keys at ``b_place`` [N]: [M, N]."""
    seen = b_place[None, :] <= b_at[:, None]
    if WINDOWED:
        seen = seen & (b_place[None, :] > b_at[:, None] - window)
    return seen


@triton.jit
def softmax_weights(b_s, b_m, b_l):
    """Weights [M, N] of logits, and what earlier outputs shrink by [M]; the running maximum [M] and sum [M] again."""
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # Of a row that has seen no key yet the maximum is -inf, and -inf - -inf would be NaN.
    b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp(b_s - b_base[:, None])
    b_scale = tl.exp(b_m - b_base)
    return b_p, b_scale, b_m_new, b_l * b_scale + tl.sum(b_p, 1)


@triton.jit
def softmax_step(b_s, b_v, b_m, b_l, b_o, PRECISION: tl.constexpr):
    """Take logits [M, N] and values [N, DV] into the running maximum [M], sum [M] and output [M, DV]."""
    b_p, b_scale, b_m, b_l = softmax_weights(b_s, b_m, b_l)
    return b_m, b_l, _weighted(b_p, b_v, b_o * b_scale[:, None], PRECISION)


@triton.jit
def softmax_fixed_step(b_s, b_v, base, b_l, b_o, PRECISION: tl.constexpr):
    """Take logits [M, N] and values [N, DV] into the sum [M] and output [M, DV], all relative to one number."""
    b_p = tl.exp(b_s - base)
    return b_l + tl.sum(b_p, 1), _weighted(b_p, b_v, b_o, PRECISION)


@triton.jit
def _weighted(b_p, b_v, b_o, PRECISION: tl.constexpr):
    """Add weights [M, N] times values [N, DV] to the output [M, DV]."""
    b_high = b_p.to(b_v.dtype)
    b_o = tl.dot(b_high, b_v, b_o, input_precision=PRECISION)
    if b_v.dtype != tl.float32:
        # Weights are not rounded to 16 bit: what the first product lost is multiplied, too.
        b_o = tl.dot((b_p - b_high.to(tl.float32)).to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_o


@triton.jit
def softmax_end(b_m, b_l, b_o):
    """Output [M, DV] and lse [M] of a finished online softmax; (0, -inf) for a row without keys."""
    empty = b_l == 0.0
    b_sum = tl.where(empty, 1.0, b_l)
    return b_o / b_sum[:, None], tl.where(empty, float("-inf"), b_m + tl.log(b_sum))
