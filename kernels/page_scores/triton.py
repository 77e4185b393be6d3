"""Scores of pages in Triton: a program reads the bounds of a tile of pages once and scores them for all its queries."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.page_scores import blocked
from kvtier.kernels.tiles import dense_channels, padded
from kvtier.types import GroupReduce

__all__ = ["box_scores"]

TILE_BYTES: Final = 16384
_REDUCTIONS: Final = {"sum": 0, "mean": 1, "max": 2}


@triton.jit
def box_scores_kernel(
    q_ptr, kmin_ptr, kmax_ptr, scores_ptr,
    kv_heads, queries, pages,
    stride_qb, stride_qh, stride_qt, stride_lb, stride_lh, stride_ln, stride_gb, stride_gh, stride_gn,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Pages [BLOCK_N] of one KV head: the group's bounds reduced, and of the queries the greatest."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b = (i_bh // kv_heads).to(tl.int64)
    i_h = (i_bh % kv_heads).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    in_pages, in_dim = o_n < pages, o_d < D
    mask = in_pages[:, None] & in_dim[None, :]
    p_low = kmin_ptr + i_b * stride_lb + i_h * stride_lh + o_n[:, None] * stride_ln + o_d[None, :]
    p_high = kmax_ptr + i_b * stride_gb + i_h * stride_gh + o_n[:, None] * stride_gn + o_d[None, :]
    b_low = tl.load(p_low, mask=mask, other=0.0).to(tl.float32)
    b_high = tl.load(p_high, mask=mask, other=0.0).to(tl.float32)
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for t in range(queries):
        b_group = tl.full([BLOCK_N], float("-inf") if REDUCTION == 2 else 0.0, tl.float32)
        for g in tl.static_range(G):
            p_q = q_ptr + i_b * stride_qb + (i_h * G + g) * stride_qh + t * stride_qt + o_d
            b_q = tl.load(p_q, mask=in_dim, other=0.0).to(tl.float32)
            b_bound = tl.sum(tl.maximum(b_q[None, :] * b_low, b_q[None, :] * b_high), 1)
            if REDUCTION == 2:
                b_group = tl.maximum(b_group, b_bound)
            else:
                b_group += b_bound
        if REDUCTION == 1:
            b_group = b_group / G
        b_best = tl.maximum(b_best, b_group)
    tl.store(scores_ptr + (i_b * kv_heads + i_h) * pages + o_n, b_best, mask=in_pages)


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] of pages for q [B, Hq, Tq, Dk] from kmin, kmax [B, Hk, N, Dk]."""
    if torch.float64 in (q.dtype, kmin.dtype, kmax.dtype) or not kmin.numel():
        return blocked.box_scores(q, kmin, kmax, group_reduce)
    batch, kv_heads, pages, dim = kmin.shape
    q, low, high = dense_channels(q), dense_channels(kmin), dense_channels(kmax)
    scores = q.new_empty(batch, kv_heads, pages, dtype=torch.float32)
    block = max(16, TILE_BYTES // (4 * padded(dim)))
    box_scores_kernel[(-(-pages // block), batch * kv_heads)](
        q, low, high, scores, kv_heads, q.shape[2], pages,
        *q.stride()[:3], *low.stride()[:3], *high.stride()[:3],
        G=q.shape[1] // kv_heads, D=dim, BLOCK_D=padded(dim), BLOCK_N=block, REDUCTION=_REDUCTIONS[group_reduce],
        num_warps=4,
    )  # fmt: skip
    return scores
