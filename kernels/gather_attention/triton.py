"""Attention over runs and pages in Triton: split over the keys, a KV head's whole group in one tile (Flash-Decoding).

A program attends one tile of folded queries (row ``g * Tq + t`` is query t of head g of the group) to one split of the
keys of their KV head. Splits are merged like any other partials.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvtier.kernels.device import MOST, logits, seen_pairs, softmax_end, softmax_fixed_step, softmax_step
from kvtier.kernels.gather_attention import blocked
from kvtier.kernels.gather_attention.extras import PLAIN, UNIFIED_TOTALS, Extras
from kvtier.kernels.gather_attention.plan import plan
from kvtier.kernels.gather_attention.table import SPLITS
from kvtier.kernels.merge_partials.triton import merge_splits
from kvtier.kernels.tiles import attention_fits, check_frames, dense_channels, launch_of, padded, processors
from kvtier.types import Partial, Visibility

__all__ = ["attend_pages", "attend_run"]


LEAST_TOTAL, MOST_TOTAL = (tl.constexpr(total) for total in UNIFIED_TOTALS)


@triton.jit
def _tile(
    p_k, p_v, p_frames, o_n, in_keys, stride_kb, stride_kn, stride_vb, stride_vn,
    P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys [DK, N] and values [N, DV] of slots ``o_n`` [N]; nothing is read where there is no key."""
    o_k, o_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    o_key, o_value = o_n * stride_kn, o_n * stride_vn
    if PAGED:
        b_frame = tl.load(p_frames + o_n // P, mask=in_keys, other=0)
        o_key = b_frame * stride_kb + (o_n % P) * stride_kn
        o_value = b_frame * stride_vb + (o_n % P) * stride_vn
    b_k = tl.load(p_k + o_key[None, :] + o_k[:, None], mask=in_keys[None, :] & (o_k < DK)[:, None], other=0.0)
    b_v = tl.load(p_v + o_value[:, None] + o_v[None, :], mask=in_keys[:, None] & (o_v < DV)[None, :], other=0.0)
    if UPCAST:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    return b_k, b_v


@triton.jit
def _over_keys(
    b_q, b_at, b_bits, in_rows, p_k, p_v, p_frames, p_place, p_bias, start, stop,
    scale, softcap, window, first_draft, base, stride_kb, stride_kn, stride_vb, stride_vn,
    P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr, POSITIONS: tl.constexpr, SKIP: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, TREE: tl.constexpr, UNIFIED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Greatest logit [M], or ``base`` for it, with sum [M] and output [M, DV] of queries [M, DK] over a split."""
    b_m, b_l = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    newest, oldest = tl.max(b_at, 0), tl.min(tl.where(in_rows, b_at, MOST), 0)
    # Two words of 32 bit: half the registers.
    b_low, b_high = b_bits.to(tl.int32), (b_bits >> 32).to(tl.int32)
    for at in range(start, stop, BLOCK_N):
        o_n = at + tl.arange(0, BLOCK_N).to(tl.int64)
        in_keys = o_n < stop
        wanted = True
        if POSITIONS:
            b_place = tl.minimum(tl.load(p_place + o_n, mask=in_keys, other=MOST), MOST).to(tl.int32)
            if SKIP:
                wanted = tl.min(b_place, 0) <= newest
                if WINDOWED:
                    wanted = wanted & (tl.max(tl.where(in_keys, b_place, -1), 0) > oldest - window)
        if wanted:
            b_k, b_v = _tile(
                p_k, p_v, p_frames, o_n, in_keys, stride_kb, stride_kn, stride_vb, stride_vn,
                P, DK, DV, BLOCK_DK, BLOCK_DV, PAGED, UPCAST,
            )  # fmt: skip
            b_s = logits(b_q, b_k, scale, softcap, CAPPED, PRECISION)
            seen = in_keys[None, :] & in_rows[:, None]
            if POSITIONS:
                seen = seen & seen_pairs(b_at, b_place, window, WINDOWED)
            if BIASED:
                b_s += tl.load(p_bias[:, None] + o_n[None, :], mask=seen, other=0.0)
            if TREE:
                o_draft = (o_n - first_draft).to(tl.int32)[None, :]
                b_word = tl.where(o_draft < 32, b_low[:, None], b_high[:, None])
                seen = seen & ((o_draft < 0) | ((b_word >> (o_draft & 31)) & 1 == 1))
            b_s = tl.where(seen, b_s, float("-inf"))
            if UNIFIED:
                b_l, b_o = softmax_fixed_step(b_s, b_v, base, b_l, b_o, PRECISION)
            else:
                b_m, b_l, b_o = softmax_step(b_s, b_v, b_m, b_l, b_o, PRECISION)
    if UNIFIED:
        b_m = tl.zeros([BLOCK_M], tl.float32) + base
    return b_m, b_l, b_o


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, frames_ptr, q_pos_ptr, k_pos_ptr, bias_ptr, lengths_ptr, ancestors_ptr, out_ptr, lse_ptr,
    scale, softcap, window, kv_heads, group, queries, keys, split_keys, pages, heads_with_positions, heads_with_bias,
    first_draft, base,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    P: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr, POSITIONS: tl.constexpr, SKIP: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BIASED: tl.constexpr, RAGGED: tl.constexpr, TREE: tl.constexpr, UNIFIED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries [BLOCK_M] over keys ``split * split_keys`` on; out [S, B, Hq, Tq, DV], lse [S, B, Hq, Tq]."""
    i_m, i_s, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < group * queries
    i_q, i_t = (i_h * group + row // queries).to(tl.int64), (row % queries).to(tl.int64)
    o_k, o_v = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV)
    p_q = q_ptr + i_b * stride_qb + i_q[:, None] * stride_qh + i_t[:, None] * stride_qt + o_k[None, :]
    b_q = tl.load(p_q, mask=in_rows[:, None] & (o_k < DK)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_at, b_bits = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int64)
    if POSITIONS:
        b_at = tl.minimum(tl.load(q_pos_ptr + i_b * queries + i_t, mask=in_rows, other=-1), MOST - 1).to(tl.int32)
    if TREE:
        b_bits = tl.load(ancestors_ptr + i_b * queries + i_t, mask=in_rows, other=0)
    p_place = k_pos_ptr + (i_b * heads_with_positions + i_h * (heads_with_positions > 1)) * keys
    p_bias = bias_ptr + (i_b * heads_with_bias + tl.where(heads_with_bias > kv_heads, i_q, i_h)) * keys
    p_frames, p_k, p_v = frames_ptr + i_bh * pages, k_ptr, v_ptr
    if not PAGED:
        p_k, p_v = k_ptr + i_b * stride_kb + i_h * stride_kh, v_ptr + i_b * stride_vb + i_h * stride_vh
    start = i_s.to(tl.int64) * split_keys
    stop = tl.minimum(start + split_keys, keys)
    if RAGGED:
        stop = tl.minimum(stop, tl.load(lengths_ptr + i_bh))

    b_m, b_l, b_o = _over_keys(
        b_q, b_at, b_bits, in_rows, p_k, p_v, p_frames, p_place, p_bias, start, stop,
        scale, softcap, window, first_draft, base, stride_kb, stride_kn, stride_vb, stride_vn,
        P, DK, DV, BLOCK_DK, BLOCK_DV, BLOCK_M, BLOCK_N,
        PAGED, POSITIONS, SKIP, WINDOWED, CAPPED, BIASED, TREE, UNIFIED, UPCAST, PRECISION,
    )  # fmt: skip
    if UNIFIED:
        # Too far from the greatest logit: this program starts again, with the greatest itself.
        far = in_rows & ((b_l < LEAST_TOTAL) | (b_l > MOST_TOTAL) | (b_l != b_l))
        if tl.max(far.to(tl.int32), 0) > 0:
            b_m, b_l, b_o = _over_keys(
                b_q, b_at, b_bits, in_rows, p_k, p_v, p_frames, p_place, p_bias, start, stop,
                scale, softcap, window, first_draft, base, stride_kb, stride_kn, stride_vb, stride_vn,
                P, DK, DV, BLOCK_DK, BLOCK_DV, BLOCK_M, BLOCK_N,
                PAGED, POSITIONS, SKIP, WINDOWED, CAPPED, BIASED, TREE, False, UPCAST, PRECISION,
            )  # fmt: skip
    b_o, b_lse = softmax_end(b_m, b_l, b_o)
    o_out = ((i_s.to(tl.int64) * (tl.num_programs(2) // kv_heads) + i_b) * (kv_heads * group) + i_q) * queries + i_t
    tl.store(out_ptr + o_out[:, None] * DV + o_v[None, :], b_o, mask=in_rows[:, None] & (o_v < DV)[None, :])
    tl.store(lse_ptr + o_out, b_lse, mask=in_rows)


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over views k [B, Hk, N, Dk], v [B, Hk, N, Dv], whose last stride must be 1 or they are copied."""
    if not attention_fits(q, k, v):
        return blocked.attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible, extras=extras)
    k, v = dense_channels(k), dense_channels(v)
    keys = _Keys(k, v, None, k.shape[1], k.shape[2], 1, k.stride()[:3], v.stride()[:3])
    return _attend(q, keys, scale, softcap, visible, extras)


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over the pages [B, Hk, N] of arenas [F, P, Dk] and [F, P, Dv], read where they lie."""
    if not attention_fits(q, k_arena, v_arena):
        return blocked.attend_pages(
            q, k_arena, v_arena, frames, scale=scale, softcap=softcap, visible=visible, extras=extras
        )
    check_frames(frames, k_arena.shape[0], slots=k_arena.shape[1], lengths=extras.lengths)
    k, v = dense_channels(k_arena), dense_channels(v_arena)
    slots = k.shape[1]
    k_strides, v_strides = (k.stride(0), 0, k.stride(1)), (v.stride(0), 0, v.stride(1))
    keys = _Keys(k, v, frames.contiguous(), frames.shape[1], frames.shape[2] * slots, slots, k_strides, v_strides)
    return _attend(q, keys, scale, softcap, visible, extras)


class _Keys(NamedTuple):
    """Keys and values of a run, or of the pages that ``frames`` names; strides of (batch or frame, head, slot)."""

    k: torch.Tensor
    v: torch.Tensor
    frames: torch.Tensor | None
    heads: int
    length: int
    slots: int
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]


def _attend(
    q: torch.Tensor, keys: _Keys, scale: float, softcap: float | None, visible: Visibility | None, extras: Extras
) -> Partial:
    batch, query_heads, queries, key_dim = q.shape
    value_dim = keys.v.shape[-1]
    if not q.numel() or not keys.length:
        out = q.new_zeros(*q.shape[:3], value_dim, dtype=torch.float32)
        return Partial(out, q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32))
    launch = launch_of(q.device)
    group = query_heads // keys.heads
    rows = group * queries
    cut = plan(
        heads=batch * keys.heads,
        rows=rows,
        keys=keys.length,
        dim=max(key_dim, value_dim),
        element_bytes=max(q.element_size(), keys.k.element_size(), keys.v.element_size()),
        processors=processors(q.device),
        splits=SPLITS,
    )
    tile = cut.tile
    q = dense_channels(q)
    out = q.new_empty(cut.splits, *q.shape[:3], value_dim, dtype=torch.float32)
    lse = q.new_empty(cut.splits, *q.shape[:3], dtype=torch.float32)
    # Triton takes no None for a pointer: the queries stand in for what this call does not read.
    q_pos, k_pos = (q, q) if visible is None else (visible.q_pos.contiguous(), visible.k_pos.contiguous())
    window = 0 if visible is None or visible.window is None else visible.window
    bias, lengths, tree = extras.bias, extras.lengths, extras.tree
    grid = (-(-rows // tile.rows), cut.splits, batch * keys.heads)
    attend_kernel[grid](
        q, keys.k, keys.v, q if keys.frames is None else keys.frames, q_pos, k_pos,
        q if bias is None else bias.float().contiguous(), q if lengths is None else lengths.contiguous(),
        q if tree is None else tree.ancestors.contiguous(), out, lse,
        scale, softcap or 1.0, window,
        keys.heads, group, queries, keys.length, cut.split_keys, keys.length // keys.slots,
        1 if visible is None else visible.k_pos.shape[1], 1 if bias is None else bias.shape[1],
        0 if tree is None else tree.first, float(extras.unified_max or 0.0),
        *q.stride()[:3], *keys.k_strides, *keys.v_strides,
        P=keys.slots, DK=key_dim, DV=value_dim, BLOCK_DK=padded(key_dim), BLOCK_DV=padded(value_dim),
        BLOCK_M=tile.rows, BLOCK_N=tile.keys,
        PAGED=keys.frames is not None, POSITIONS=visible is not None, SKIP=tile.skip,
        WINDOWED=window > 0, CAPPED=softcap is not None,
        BIASED=bias is not None, RAGGED=lengths is not None, TREE=tree is not None,
        # The weights of fp16 values are multiplied in fp16, whose exponents do not reach that far.
        UNIFIED=extras.unified_max is not None and keys.v.dtype != torch.float16,
        UPCAST=launch.upcast or not q.dtype == keys.k.dtype == keys.v.dtype, PRECISION=launch.precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if cut.splits == 1:
        return Partial(out[0], lse[0])
    return merge_splits(out, lse)
