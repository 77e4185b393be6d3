"""Attention over shared prefixes and own keys in one launch of Triton (BatchLLM, Zheng et al. 2024), prefixes split.

A program takes one task of the plan: a tile of rows over one split of one list of keys. The rows of a prefix are the
queries of all its members, of a whole group of heads. A second launch merges the splits of each request.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from kvtier.kernels.device import logits, softmax_end, softmax_step
from kvtier.kernels.prefix_attention import blocked
from kvtier.kernels.prefix_attention.plan import PrefixPlan
from kvtier.kernels.prefix_attention.programs import Task
from kvtier.kernels.tiles import attention_fits, check_frames, dense_channels, launch_of, padded
from kvtier.types import Partial

__all__ = ["merge_rows", "prefix_attention"]

MERGED_NUMBERS: Final = 2048
_FIELDS: Final = len(Task._fields)


@triton.jit
def prefix_attention_kernel(
    q_ptr, k_ptr, v_ptr, prefix_ptr, own_ptr, tasks_ptr, order_ptr, parts_ptr, out_ptr, lse_ptr,
    scale, softcap,
    group, queries, prefix_pages, own_pages,
    stride_qb, stride_qh, stride_qt, stride_kf, stride_kn, stride_vf, stride_vn,
    P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIELDS: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One task for one KV head: partials out [parts, Hq, Tq, DV] and lse [parts, Hq, Tq] of its rows."""
    p_task = tasks_ptr + tl.program_id(0) * FIELDS
    own, first, members, i_m = tl.load(p_task), tl.load(p_task + 1), tl.load(p_task + 2), tl.load(p_task + 3)
    page, start, stop = tl.load(p_task + 4), tl.load(p_task + 5), tl.load(p_task + 6)
    length, part = tl.load(p_task + 7), tl.load(p_task + 8)
    i_h = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * group

    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < members * queries * group
    b_request = tl.load(order_ptr + first + row // (queries * group), mask=in_rows, other=0).to(tl.int64)
    i_q, i_t = i_h * group + row % group, (row // group) % queries
    o_k, o_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    in_k, in_v = o_k < DK, o_v < DV
    o_q = b_request * stride_qb + i_q * stride_qh + i_t.to(tl.int64) * stride_qt
    b_q = tl.load(q_ptr + o_q[:, None] + o_k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    # Every row sees a whole prefix, but of its own keys those up to itself: queries are the last of them.
    b_stop = tl.where(in_rows, length - own * (queries - 1 - i_t), 0)
    p_frame = prefix_ptr + i_h * prefix_pages + page
    if own == 1:
        p_frame = own_ptr + i_h * own_pages + page

    b_m, b_l = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for at in range(start, stop, BLOCK_N):
        o_n = at + tl.arange(0, BLOCK_N)
        in_keys = o_n < stop
        b_frame = tl.load(p_frame + o_n // P, mask=in_keys, other=0)
        o_key, o_value = b_frame * stride_kf + (o_n % P) * stride_kn, b_frame * stride_vf + (o_n % P) * stride_vn
        b_k = tl.load(k_ptr + o_key[None, :] + o_k[:, None], mask=in_keys[None, :] & in_k[:, None], other=0.0)
        b_v = tl.load(v_ptr + o_value[:, None] + o_v[None, :], mask=in_keys[:, None] & in_v[None, :], other=0.0)
        if UPCAST:
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
        b_s = logits(b_q, b_k, scale, softcap, CAPPED, PRECISION)
        seen = in_keys[None, :] & (o_n[None, :] < b_stop[:, None])
        b_m, b_l, b_o = softmax_step(tl.where(seen, b_s, float("-inf")), b_v, b_m, b_l, b_o, PRECISION)

    b_o, b_lse = softmax_end(b_m, b_l, b_o)
    b_part = tl.load(parts_ptr + b_request, mask=in_rows, other=0).to(tl.int64) + part
    o_out = (b_part * heads + i_q) * queries + i_t
    tl.store(out_ptr + o_out[:, None] * DV + o_v[None, :], b_o, mask=in_rows[:, None] & in_v[None, :])
    tl.store(lse_ptr + o_out, b_lse, mask=in_rows)


@triton.jit
def merge_requests_kernel(
    out_ptr, lse_ptr, parts_ptr, merged_out_ptr, merged_lse_ptr, rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_R] of the Hq * Tq of one request over all its parts; (0, -inf) for a row that is empty everywhere."""
    i_b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_DV)
    in_rows = row < rows
    in_tile = in_rows[:, None] & (o_v < DV)[None, :]
    b_m, b_l = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    b_o = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    first = tl.load(parts_ptr + i_b)
    o_part = first.to(tl.int64) * rows + row
    for _ in range(first, tl.load(parts_ptr + i_b + 1)):
        b_lse = tl.load(lse_ptr + o_part, mask=in_rows, other=float("-inf"))
        b_part = tl.load(out_ptr + o_part[:, None] * DV + o_v[None, :], mask=in_tile, other=0.0)
        b_m_new = tl.maximum(b_m, b_lse)
        b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        b_before, b_weight = tl.exp(b_m - b_base), tl.exp(b_lse - b_base)
        b_o = b_o * b_before[:, None] + b_part * b_weight[:, None]
        b_l = b_l * b_before + b_weight
        b_m = b_m_new
        o_part += rows
    b_o, b_lse = softmax_end(b_m, b_l, b_o)
    o_out = i_b * rows + row
    tl.store(merged_out_ptr + o_out[:, None] * DV + o_v[None, :], b_o, mask=in_tile)
    tl.store(merged_lse_ptr + o_out, b_lse, mask=in_rows)


def prefix_attention(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    prefix_frames: torch.Tensor,
    own_frames: torch.Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of q [B, Hq, Tq, Dk] over pages of arenas [F, P, Dk] and [F, P, Dv], as the plan says."""
    arguments = (q, k_arena, v_arena, prefix_frames, own_frames, plan)
    if not attention_fits(q, k_arena, v_arena):
        return blocked.prefix_attention(*arguments, scale=scale, softcap=softcap)
    check_frames(prefix_frames, k_arena.shape[0])
    check_frames(own_frames, k_arena.shape[0])
    q, k, v = dense_channels(q), dense_channels(k_arena), dense_channels(v_arena)
    launch, programs = launch_of(q.device), plan.programs
    (batch, query_heads, queries, key_dim), value_dim, kv_heads = q.shape, v.shape[2], prefix_frames.shape[0]
    out = q.new_empty(programs.parts, query_heads, queries, value_dim, dtype=torch.float32)
    lse = q.new_empty(programs.parts, query_heads, queries, dtype=torch.float32)
    if len(programs.tasks):
        prefix_attention_kernel[(len(programs.tasks), kv_heads)](
            q, k, v, prefix_frames.contiguous(), own_frames.contiguous(),
            programs.tasks, programs.order, programs.part_starts, out, lse,
            scale, softcap or 1.0,
            query_heads // kv_heads, queries, prefix_frames.shape[1], own_frames.shape[1],
            *q.stride()[:3], *k.stride()[:2], *v.stride()[:2],
            P=k.shape[1], DK=key_dim, DV=value_dim, BLOCK_DK=padded(key_dim), BLOCK_DV=padded(value_dim),
            BLOCK_M=programs.tile.rows, BLOCK_N=programs.tile.keys, FIELDS=_FIELDS,
            CAPPED=softcap is not None,
            UPCAST=launch.upcast or not q.dtype == k.dtype == v.dtype, PRECISION=launch.precision,
            num_warps=programs.tile.warps, num_stages=programs.tile.stages,
        )  # fmt: skip
    merged = Partial(
        q.new_empty(*q.shape[:3], value_dim, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
    )
    if batch:
        block = merge_rows(value_dim)
        merge_requests_kernel[(-(-query_heads * queries // block), batch)](
            out, lse, programs.part_starts, merged.out, merged.lse, query_heads * queries,
            DV=value_dim, BLOCK_DV=padded(value_dim), BLOCK_R=block, num_warps=4,
        )  # fmt: skip
    return merged


def merge_rows(value_dim: int) -> int:
    """Rows of a request that one program merges."""
    return max(1, MERGED_NUMBERS // padded(value_dim))
