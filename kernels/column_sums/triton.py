"""Column sums in Triton: a program owns a tile of keys and walks over the queries of one head; no atomics."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.column_sums import blocked
from kvtier.kernels.device import MOST, logits, seen_pairs
from kvtier.kernels.tiles import dense_channels, launch_of, padded
from kvtier.types import Visibility

__all__ = ["column_sums"]

BLOCK_KEYS: Final = 64
MOST_ROWS: Final = 32


@triton.jit
def column_sums_kernel(
    q_ptr, lse_ptr, k_ptr, q_pos_ptr, k_pos_ptr, sums_ptr,
    scale, softcap, window,
    query_heads, group, queries, keys, heads_with_positions,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N] of one query head: sums [B, Hq, N] of exp(logit - lse) over the queries that see them."""
    i_n, i_bq = tl.program_id(0), tl.program_id(1)
    i_b = (i_bq // query_heads).to(tl.int64)
    i_q = (i_bq % query_heads).to(tl.int64)
    i_h = i_q // group
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    in_keys, in_dim = o_n < keys, o_d < D
    p_k = k_ptr + i_b * stride_kb + i_h * stride_kh + o_n[None, :] * stride_kn + o_d[:, None]
    b_k = tl.load(p_k, mask=in_keys[None, :] & in_dim[:, None], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    if POSITIONS:
        p_place = k_pos_ptr + (i_b * heads_with_positions + i_h * (heads_with_positions > 1)) * keys + o_n
        b_place = tl.minimum(tl.load(p_place, mask=in_keys, other=MOST), MOST).to(tl.int32)
    b_sums = tl.zeros([BLOCK_N], tl.float32)
    for at in range(0, queries, BLOCK_M):
        i_t = (at + tl.arange(0, BLOCK_M)).to(tl.int64)
        in_rows = i_t < queries
        p_q = q_ptr + i_b * stride_qb + i_q * stride_qh + i_t[:, None] * stride_qt + o_d[None, :]
        b_q = tl.load(p_q, mask=in_rows[:, None] & in_dim[None, :], other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_lse = tl.load(lse_ptr + (i_b * query_heads + i_q) * queries + i_t, mask=in_rows, other=float("-inf"))
        b_s = logits(b_q, b_k, scale, softcap, CAPPED, PRECISION)
        # A query without keys has the lse -inf and gives nothing; so do rows that are not there.
        counts = (b_lse > float("-inf"))[:, None] & in_keys[None, :]
        if POSITIONS:
            b_at = tl.minimum(tl.load(q_pos_ptr + i_b * queries + i_t, mask=in_rows, other=-1), MOST - 1)
            counts = counts & seen_pairs(b_at.to(tl.int32), b_place, window, WINDOWED)
        b_base = tl.where(b_lse > float("-inf"), b_lse, 0.0)
        b_sums += tl.sum(tl.where(counts, tl.exp(b_s - b_base[:, None]), 0.0), 0)
    tl.store(sums_ptr + (i_b * query_heads + i_q) * keys + o_n, b_sums, mask=in_keys)


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> torch.Tensor:
    """Sums [B, Hq, N] for q [B, Hq, Tq, Dk], lse [B, Hq, Tq] and k [B, Hk, N, Dk]."""
    if torch.float64 in (q.dtype, k.dtype):
        return blocked.column_sums(q, lse, k, scale=scale, softcap=softcap, visible=visible)
    batch, query_heads, queries, dim = q.shape
    keys = k.shape[2]
    if not q.numel() or not keys:
        return q.new_zeros(batch, query_heads, keys, dtype=torch.float32)
    q, k = dense_channels(q), dense_channels(k)
    launch = launch_of(q.device)
    sums = q.new_empty(batch, query_heads, keys, dtype=torch.float32)
    # Triton takes no None for a pointer: the queries stand in for positions that are not read.
    q_pos, k_pos = (q, q) if visible is None else (visible.q_pos.contiguous(), visible.k_pos.contiguous())
    window = 0 if visible is None or visible.window is None else visible.window
    column_sums_kernel[(-(-keys // BLOCK_KEYS), batch * query_heads)](
        q, lse.to(torch.float32).contiguous(), k, q_pos, k_pos, sums,
        scale, softcap or 1.0, window,
        query_heads, query_heads // k.shape[1], queries, keys, 1 if visible is None else visible.k_pos.shape[1],
        *q.stride()[:3], *k.stride()[:3],
        D=dim, BLOCK_D=padded(dim), BLOCK_M=min(MOST_ROWS, padded(queries)), BLOCK_N=BLOCK_KEYS,
        POSITIONS=visible is not None, WINDOWED=window > 0, CAPPED=softcap is not None,
        UPCAST=launch.upcast or q.dtype != k.dtype, PRECISION=launch.precision, num_warps=8, num_stages=2,
    )  # fmt: skip
    return sums
