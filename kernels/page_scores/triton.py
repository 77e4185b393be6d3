"""Scores of pages in Triton: a program reads the summaries of a tile of pages once, for all its queries."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.page_scores import blocked
from kvtier.kernels.tiles import dense_channels, padded
from kvtier.types import GroupReduce

__all__ = ["box_scores", "centroid_scores", "landmark_scores", "plane_scores"]

TILE_BYTES: Final = 16384
_REDUCTIONS: Final = {"sum": 0, "mean": 1, "max": 2}


@triton.jit
def _start_of_group(BLOCK_N: tl.constexpr, REDUCTION: tl.constexpr):
    """What the scores of a group are counted up from."""
    return tl.full([BLOCK_N], float("-inf") if REDUCTION == 2 else 0.0, tl.float32)


@triton.jit
def _with_head(b_group, b_score, G: tl.constexpr, REDUCTION: tl.constexpr):
    """The scores [N] of a group with those of one more of its G heads."""
    if REDUCTION == 2:
        return tl.maximum(b_group, b_score)
    if REDUCTION == 1:
        return b_group + b_score / G
    return b_group + b_score


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
        b_group = _start_of_group(BLOCK_N, REDUCTION)
        for g in tl.static_range(G):
            p_q = q_ptr + i_b * stride_qb + (i_h * G + g) * stride_qh + t * stride_qt + o_d
            b_q = tl.load(p_q, mask=in_dim, other=0.0).to(tl.float32)
            b_bound = tl.sum(tl.maximum(b_q[None, :] * b_low, b_q[None, :] * b_high), 1)
            b_group = _with_head(b_group, b_bound, G, REDUCTION)
        b_best = tl.maximum(b_best, b_group)
    tl.store(scores_ptr + (i_b * kv_heads + i_h) * pages + o_n, b_best, mask=in_pages)


@triton.jit
def landmark_scores_kernel(
    q_ptr, marks_ptr, scores_ptr,
    kv_heads, queries, pages,
    stride_qb, stride_qh, stride_qt, stride_mb, stride_mh, stride_mn,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Landmarks [BLOCK_N] of one KV head: the group's products reduced, and of the queries the greatest."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b = (i_bh // kv_heads).to(tl.int64)
    i_h = (i_bh % kv_heads).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    in_pages, in_dim = o_n < pages, o_d < D
    p_mark = marks_ptr + i_b * stride_mb + i_h * stride_mh + o_n[:, None] * stride_mn + o_d[None, :]
    b_mark = tl.load(p_mark, mask=in_pages[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for t in range(queries):
        b_group = _start_of_group(BLOCK_N, REDUCTION)
        for g in tl.static_range(G):
            p_q = q_ptr + i_b * stride_qb + (i_h * G + g) * stride_qh + t * stride_qt + o_d
            b_q = tl.load(p_q, mask=in_dim, other=0.0).to(tl.float32)
            b_group = _with_head(b_group, tl.sum(b_q[None, :] * b_mark, 1), G, REDUCTION)
        b_best = tl.maximum(b_best, b_group)
    tl.store(scores_ptr + (i_b * kv_heads + i_h) * pages + o_n, b_best, mask=in_pages)


@triton.jit
def plane_scores_kernel(
    q_ptr, planes_ptr, kmin_ptr, kmax_ptr, scores_ptr,
    kv_heads, queries, pages,
    stride_qb, stride_qh, stride_qt, stride_lb, stride_lh, stride_ln, stride_gb, stride_gh, stride_gn,
    stride_pb, stride_ph, stride_pn, stride_pp, stride_ps,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """Pages [BLOCK_N] of one KV head: the slots' greatest bound, the group's reduced, of the queries the greatest."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b = (i_bh // kv_heads).to(tl.int64)
    i_h = (i_bh % kv_heads).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_p, o_d = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    in_pages, in_slots, in_dim = o_n < pages, o_p < P, o_d < D
    mask = in_pages[:, None] & in_dim[None, :]
    p_low = kmin_ptr + i_b * stride_lb + i_h * stride_lh + o_n[:, None] * stride_ln + o_d[None, :]
    p_high = kmax_ptr + i_b * stride_gb + i_h * stride_gh + o_n[:, None] * stride_gn + o_d[None, :]
    b_low = tl.load(p_low, mask=mask, other=0.0).to(tl.float32)
    b_span = tl.load(p_high, mask=mask, other=0.0).to(tl.float32) - b_low
    p_page = planes_ptr + i_b * stride_pb + i_h * stride_ph + o_n[:, None, None] * stride_pn
    p_bits = p_page + o_p[None, :, None] * stride_ps + (o_d // 8)[None, None, :]
    b_code = tl.zeros([BLOCK_N, BLOCK_P, BLOCK_D], tl.int32)
    for plane in tl.static_range(PLANES):
        in_plane = mask[:, None, :] & in_slots[None, :, None]
        b_bits = tl.load(p_bits + plane * stride_pp, mask=in_plane, other=0).to(tl.int32)
        b_code = b_code * 2 + ((b_bits >> (7 - o_d % 8)[None, None, :]) & 1)
    b_cell = b_span * (0.5**PLANES)
    b_offset = b_code.to(tl.float32) * b_cell[:, None, :]
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for t in range(queries):
        b_group = _start_of_group(BLOCK_N, REDUCTION)
        for g in tl.static_range(G):
            p_q = q_ptr + i_b * stride_qb + (i_h * G + g) * stride_qh + t * stride_qt + o_d
            b_q = tl.load(p_q, mask=in_dim, other=0.0).to(tl.float32)
            b_page = tl.sum(b_q[None, :] * b_low + (b_q + tl.abs(b_q))[None, :] * (0.5 * b_cell), 1)
            b_slots = tl.sum(b_q[None, None, :] * b_offset, 2)
            b_slot = tl.max(tl.where(in_slots[None, :], b_slots, float("-inf")), 1)
            b_group = _with_head(b_group, b_page + b_slot, G, REDUCTION)
        b_best = tl.maximum(b_best, b_group)
    tl.store(scores_ptr + (i_b * kv_heads + i_h) * pages + o_n, b_best, mask=in_pages)


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] of pages for q [B, Hq, Tq, Dk] from kmin, kmax [B, Hk, N, Dk]."""
    if torch.float64 in (q.dtype, kmin.dtype, kmax.dtype) or not kmin.numel():
        return blocked.box_scores(q, kmin, kmax, group_reduce)
    batch, kv_heads, pages, dim = kmin.shape
    q, low, high = dense_channels(q), dense_channels(kmin), dense_channels(kmax)
    scores = q.new_empty(batch, kv_heads, pages, dtype=torch.float32)
    block = pages_per_program(dim)
    box_scores_kernel[(-(-pages // block), batch * kv_heads)](
        q, low, high, scores, kv_heads, q.shape[2], pages,
        *q.stride()[:3], *low.stride()[:3], *high.stride()[:3],
        **_options(q, kv_heads, group_reduce), BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return scores


def plane_scores(
    q: torch.Tensor, planes: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Scores [B, Hk, N] of pages from planes [B, Hk, N, b, P, W] and bounds [B, Hk, N, Dk]."""
    if torch.float64 in (q.dtype, kmin.dtype, kmax.dtype) or not kmin.numel():
        return blocked.plane_scores(q, planes, kmin, kmax, group_reduce)
    batch, kv_heads, pages, dim = kmin.shape
    q, low, high, bits = dense_channels(q), dense_channels(kmin), dense_channels(kmax), dense_channels(planes)
    scores = q.new_empty(batch, kv_heads, pages, dtype=torch.float32)
    slots = planes.shape[4]
    block, warps = plane_tile(dim, slots)
    plane_scores_kernel[(-(-pages // block), batch * kv_heads)](
        q, bits, low, high, scores, kv_heads, q.shape[2], pages,
        *q.stride()[:3], *low.stride()[:3], *high.stride()[:3], *bits.stride()[:5],
        **_options(q, kv_heads, group_reduce), P=slots, PLANES=planes.shape[3], BLOCK_P=_power(slots), BLOCK_N=block,
        num_warps=warps,
    )  # fmt: skip
    return scores


def landmark_scores(q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] of pages for q [B, Hq, Tq, Dk] from landmarks [B, Hk, N, Dk]."""
    if torch.float64 in (q.dtype, landmarks.dtype) or not landmarks.numel():
        return blocked.landmark_scores(q, landmarks, group_reduce)
    batch, kv_heads, pages, dim = landmarks.shape
    q, marks = dense_channels(q), dense_channels(landmarks)
    scores = q.new_empty(batch, kv_heads, pages, dtype=torch.float32)
    block = pages_per_program(dim)
    landmark_scores_kernel[(-(-pages // block), batch * kv_heads)](
        q, marks, scores, kv_heads, q.shape[2], pages, *q.stride()[:3], *marks.stride()[:3],
        **_options(q, kv_heads, group_reduce), BLOCK_N=block, num_warps=4,
    )  # fmt: skip
    return scores


def centroid_scores(
    q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Centroids are scored as landmarks are; the few scores are then handed out by torch."""
    return blocked.best_of_clusters(landmark_scores(q, centroids, group_reduce), clusters)


def pages_per_program(dim: int) -> int:
    """Pages of ``dim`` channels in a tile."""
    return max(16, TILE_BYTES // (4 * padded(dim)))


def plane_tile(dim: int, slots: int) -> tuple[int, int]:
    """Pages of ``slots`` codes in a tile, as many numbers in all as a tile of bounds has, and warps for it."""
    page_numbers = padded(dim) * _power(slots)
    pages = max(1, TILE_BYTES // (4 * page_numbers))
    # At more than 16 codes a thread they do not fit into the registers of every chip.
    return pages, max(4, min(16, pages * page_numbers // (32 * 16)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _options(q: torch.Tensor, kv_heads: int, group_reduce: GroupReduce) -> dict[str, int]:
    """The constants of every kernel here."""
    dim = q.shape[3]
    return {"G": q.shape[1] // kv_heads, "D": dim, "BLOCK_D": padded(dim), "REDUCTION": _REDUCTIONS[group_reduce]}
