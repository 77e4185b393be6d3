"""Attention over encoded blocks in Triton: codes are multiplied as small exact numbers, scales are applied beside.

A program attends one tile of folded queries (row ``g * Tq + t`` is query t of head g of the group) to one split of the
blocks of their KV head, as `gather_attention` does. README.md derives where scales and minima go.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvtier.kernels.device import MOST, capped, seen_pairs, softmax_end, softmax_weights
from kvtier.kernels.encoded_attention import blocked
from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.kernels.encoded_attention.side import Side, cut_blocks
from kvtier.kernels.gather_attention.table import SPLITS
from kvtier.kernels.merge_partials.triton import merge_splits
from kvtier.kernels.tiles import check_frames, dense_channels, launch_of, processors
from kvtier.types import Partial, Visibility

__all__ = ["attend_encoded"]


@triton.jit
def _codes(p_codes, o_place, in_columns, S: tl.constexpr):
    """Bytes of a tile, a plane each."""
    b_codes = ()
    for plane in tl.static_range(tl.constexpr(S.planes)):
        p_code = p_codes + plane * S.plane_bytes + o_place
        b_codes += (tl.load(p_code, mask=in_columns, other=0) if S.masked else tl.load(p_code),)  # type: ignore[assignment]
    return b_codes


@triton.jit
def _units(b_codes, share: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr):
    """The codes of one share of each byte as whole numbers, times ``1 / S.factor``: exact in bf16."""
    b_code = b_codes[0]
    if S.kind == "signed":
        b_unit = b_code.to(tl.int8, bitcast=True)
    elif S.kind == "e4m3":
        # Sign, exponent and mantissa where fp16 has them; fp16's exponents are 8 less.
        b_wide = b_code.to(tl.uint16)
        b_unit = (((b_wide & 0x80) << 8) | ((b_wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)
    elif S.kind == "planes":
        b_size = tl.full(b_code.shape, 1, tl.int32)
        for plane in tl.static_range(1, tl.constexpr(S.planes)):
            b_size += ((b_codes[plane] >> share) & 1).to(tl.int32) << (S.stored - plane)
        # Twice the middle of what the planes that were not read leave open.
        b_size += (1 << (S.stored - S.planes)) - 2
        b_unit = tl.where(((b_code >> share) & 1) != 0, -b_size, b_size).to(tl.float32)
    elif S.bits == 8:
        b_unit = b_code.to(tl.float32)
    else:
        # From int8 to bf16 there are instructions for four at once.
        b_unit = ((b_code >> (share * S.bits)) & ((1 << S.bits) - 1)).to(tl.int8, bitcast=True)
    return b_unit.to(HALF)


@triton.jit
def _product(b_x, b_unit, b_sum, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``b_sum + b_x @ b_unit``, ``b_x`` in two parts of the type of the codes where one does not hold it."""
    b_high = b_x.to(b_unit.dtype)
    b_sum = tl.dot(b_high, b_unit, b_sum, input_precision=PRECISION)
    if not EXACT:
        b_low = (b_x.to(tl.float32) - b_high.to(tl.float32)).to(b_unit.dtype)
        b_sum = tl.dot(b_low, b_unit, b_sum, input_precision=PRECISION)
    return b_sum


@triton.jit
def _scales(p_scales, o_group, S: tl.constexpr):
    """Scales of groups, and minima."""
    b_scale = tl.load(p_scales + o_group).to(tl.float32) * S.factor
    b_minimum = b_scale
    if S.minima:
        b_minimum = tl.load(p_scales + S.minima_at + o_group).to(tl.float32)
    return b_scale, b_minimum


@triton.jit
def _channel_scales(p_scales, slot, share: tl.constexpr, o_j, S: tl.constexpr):
    """The same of channels, for slots ``slot`` on: columns beyond the last read the last."""
    o_column = tl.minimum(o_j, S.columns - 1) if S.masked else o_j
    return _scales(p_scales, slot // S.token_group * S.dim + share * S.columns + o_column, S)


@triton.jit
def _queries(p_q, in_rows, K: tl.constexpr, EXACT: tl.constexpr):
    """Queries [M, width] for each chunk of columns and share of its bytes; fp32 unless codes meet them as they are."""
    b_q = ()
    for chunk in tl.static_range(tl.constexpr(K.chunks)):
        o_j = chunk * K.width + tl.arange(0, K.width)
        for share in tl.static_range(tl.constexpr(K.shares)):
            in_tile = in_rows[:, None] & (o_j < K.columns)[None, :]
            b_part = tl.load(p_q[:, None] + (share * K.columns + o_j)[None, :], mask=in_tile, other=0.0)
            if not EXACT:
                b_part = b_part.to(tl.float32)
            b_q += (b_part,)  # type: ignore[assignment]
    return b_q


@triton.jit
def _key_products(
    b_q, p_codes, p_scales, slot, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of the queries with the keys of slots ``slot`` on."""
    o_n = slot + tl.arange(0, BLOCK_N)
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_shift = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.static_range(tl.constexpr(K.chunks)):
        o_j = chunk * K.width + tl.arange(0, K.width)
        b_codes = _codes(p_codes, o_n[None, :] * K.columns + o_j[:, None], (o_j < K.columns)[:, None], K)
        for share in tl.static_range(tl.constexpr(K.shares)):
            b_part = b_q[chunk * K.shares + share]
            b_unit = _units(b_codes, share, K, HALF)
            if K.by_channel:
                b_scale, b_minimum = _channel_scales(p_scales, slot, share, o_j, K)
                b_s = _product(b_part * b_scale[None, :], b_unit, b_s, False, PRECISION)
                if K.minima:
                    b_shift += tl.sum(b_part * b_minimum[None, :], 1)
            elif K.channel_groups > 1:
                group = (share * K.columns + chunk * K.width) // K.channel_group
                b_scale, b_minimum = _scales(p_scales, o_n // K.token_group * K.channel_groups + group, K)
                b_raw = _product(b_part, b_unit, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), EXACT, PRECISION)
                b_s += b_raw * b_scale[None, :]
                if K.minima:
                    b_s += tl.sum(b_part.to(tl.float32), 1)[:, None] * b_minimum[None, :]
            else:
                b_s = _product(b_part, b_unit, b_s, EXACT, PRECISION)
                if K.minima:
                    b_shift += tl.sum(b_part.to(tl.float32), 1)
    if K.by_channel:
        return b_s + b_shift[:, None]
    if K.channel_groups == 1:
        b_scale, b_minimum = _scales(p_scales, o_n // K.token_group, K)
        b_s = b_s * b_scale[None, :]
        if K.minima:
            b_s += b_shift[:, None] * b_minimum[None, :]
    return b_s


@triton.jit
def _add_values(
    b_p, b_shrink, b_o, p_codes, p_scales, slot, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs [M, width] of each chunk and share, shrunk, plus weights [M, N] times the values of slots ``slot`` on."""
    o_n = slot + tl.arange(0, BLOCK_N)
    b_new = ()
    for chunk in tl.static_range(tl.constexpr(V.chunks)):
        o_j = chunk * V.width + tl.arange(0, V.width)
        b_codes = _codes(p_codes, o_n[:, None] * V.columns + o_j[None, :], (o_j < V.columns)[None, :], V)
        for share in tl.static_range(tl.constexpr(V.shares)):
            b_part = b_o[chunk * V.shares + share] * b_shrink[:, None]
            b_unit = _units(b_codes, share, V, HALF)
            if V.by_channel:
                b_scale, b_minimum = _channel_scales(p_scales, slot, share, o_j, V)
                b_raw = _product(b_p, b_unit, tl.zeros([BLOCK_M, V.width], tl.float32), False, PRECISION)
                b_part += b_raw * b_scale[None, :]
                if V.minima:
                    b_part += tl.sum(b_p, 1)[:, None] * b_minimum[None, :]
            else:
                group = (share * V.columns + chunk * V.width) // V.channel_group
                b_scale, b_minimum = _scales(p_scales, o_n // V.token_group * V.channel_groups + group, V)
                b_part = _product(b_p * b_scale[None, :], b_unit, b_part, False, PRECISION)
                if V.minima:
                    b_part += tl.sum(b_p * b_minimum[None, :], 1)[:, None]
            b_new += (b_part,)  # type: ignore[assignment]
    return b_new


@triton.jit
def encoded_kernel(
    q_ptr, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, frames_ptr, q_pos_ptr, k_pos_ptr, lengths_ptr, out_ptr, lse_ptr,
    scale, softcap, window,
    kv_heads, group, queries, keys, split_keys, blocks, heads_with_positions,
    stride_qb, stride_qh, stride_qt, stride_kf, stride_ksf, stride_vf, stride_vsf,
    K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POSITIONS: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries [BLOCK_M] over keys ``split * split_keys`` on; out [S, B, Hq, Tq, DV], lse [S, B, Hq, Tq]."""
    HALF: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
    i_m, i_s, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < group * queries
    i_q, i_t = (i_h * group + row // queries).to(tl.int64), (row % queries).to(tl.int64)
    b_q = _queries(q_ptr + i_b * stride_qb + i_q * stride_qh + i_t * stride_qt, in_rows, K, EXACT)
    if POSITIONS:
        b_at = tl.minimum(tl.load(q_pos_ptr + i_b * queries + i_t, mask=in_rows, other=-1), MOST - 1).to(tl.int32)
        p_place = k_pos_ptr + (i_b * heads_with_positions + i_h * (heads_with_positions > 1)) * keys
    b_m, b_l = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    b_o = ()
    for _ in tl.static_range(V.chunks * V.shares):
        b_o += (tl.zeros([BLOCK_M, V.width], tl.float32),)  # type: ignore[assignment]
    start = i_s * split_keys
    stop = tl.minimum(start + split_keys, keys)
    if RAGGED:
        stop = tl.minimum(stop, tl.load(lengths_ptr + i_bh).to(tl.int32))
    for at in range(start, stop, BLOCK_N):
        # Tiles never cross a block, and blocks are full: loads of codes need no mask.
        i_f = tl.load(frames_ptr + i_bh.to(tl.int64) * blocks + at // P)
        slot = at % P
        p_k, p_v = k_ptr + i_f * stride_kf + K.codes_at, v_ptr + i_f * stride_vf + V.codes_at
        b_s = scale * _key_products(
            b_q, p_k, k_scales_ptr + i_f * stride_ksf, slot, K, BLOCK_M, BLOCK_N, EXACT, HALF, PRECISION
        )
        if CAPPED:
            b_s = capped(b_s, softcap)
        if POSITIONS:
            b_place = tl.minimum(tl.load(p_place + at + tl.arange(0, BLOCK_N)), MOST).to(tl.int32)
            b_s = tl.where(seen_pairs(b_at, b_place, window, WINDOWED), b_s, float("-inf"))
        if RAGGED:
            b_s = tl.where((at + tl.arange(0, BLOCK_N) < stop)[None, :], b_s, float("-inf"))
        b_p, b_shrink, b_m, b_l = softmax_weights(b_s, b_m, b_l)
        b_o = _add_values(
            b_p, b_shrink, b_o, p_v, v_scales_ptr + i_f * stride_vsf, slot, V, BLOCK_M, BLOCK_N, HALF, PRECISION
        )

    o_out = ((i_s.to(tl.int64) * (tl.num_programs(2) // kv_heads) + i_b) * (kv_heads * group) + i_q) * queries + i_t
    for chunk in tl.static_range(tl.constexpr(V.chunks)):
        o_j = chunk * V.width + tl.arange(0, V.width)
        for share in tl.static_range(tl.constexpr(V.shares)):
            b_out, b_lse = softmax_end(b_m, b_l, b_o[chunk * V.shares + share])
            p_out = out_ptr + o_out[:, None] * V.dim + (share * V.columns + o_j)[None, :]
            tl.store(p_out, b_out, mask=in_rows[:, None] & (o_j < V.columns)[None, :])
    tl.store(lse_ptr + o_out, b_lse, mask=in_rows)


def attend_encoded(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    k_format: BlockFormat,
    v_format: BlockFormat,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    lengths: torch.Tensor | None,
) -> Partial:
    """Attention over the blocks [B, Hk, N] of arenas [F, block_bytes], read where they lie."""
    k_side, v_side = Side.of(k_format), Side.of(v_format)
    if q.dtype == torch.float64 or k_side is None or v_side is None:
        return blocked.attend_encoded(
            q,
            k_arena,
            v_arena,
            frames,
            k_format=k_format,
            v_format=v_format,
            scale=scale,
            softcap=softcap,
            visible=visible,
            lengths=lengths,
        )
    check_frames(frames, k_arena.shape[0], slots=k_format.slots, lengths=lengths)
    if not q.numel() or not frames.shape[2]:
        out = q.new_zeros(*q.shape[:3], v_format.dim, dtype=torch.float32)
        return Partial(out, q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32))
    # The same bytes twice: as codes, and as scales.
    keys = _Blocks(k_arena, k_arena.view(k_format.scale_dtype), k_side)
    values = _Blocks(v_arena, v_arena.view(v_format.scale_dtype), v_side)
    return _attend(q, keys, values, frames, k_format.slots, scale, softcap, visible, lengths)


class _Blocks(NamedTuple):
    """Blocks of an arena, as bytes and as numbers of the type of their scales."""

    codes: torch.Tensor
    scales: torch.Tensor
    side: Side


def _attend(
    q: torch.Tensor,
    k: _Blocks,
    v: _Blocks,
    frames: torch.Tensor,
    slots: int,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    lengths: torch.Tensor | None,
) -> Partial:
    batch, kv_heads, blocks = frames.shape
    launch = launch_of(q.device)
    group, keys = q.shape[1] // kv_heads, blocks * slots
    rows, heads = group * q.shape[2], batch * kv_heads
    cut = cut_blocks(k.side, v.side, heads=heads, rows=rows, keys=keys, processors=processors(q.device), splits=SPLITS)
    tile = cut.tile
    q = dense_channels(q)
    out = q.new_empty(cut.splits, *q.shape[:3], v.side.dim, dtype=torch.float32)
    lse = q.new_empty(cut.splits, *q.shape[:3], dtype=torch.float32)
    # Triton takes no None for a pointer: the queries stand in for what this call does not read.
    q_pos, k_pos = (q, q) if visible is None else (visible.q_pos.contiguous(), visible.k_pos.contiguous())
    window = 0 if visible is None or visible.window is None else visible.window
    encoded_kernel[(-(-rows // tile.rows), cut.splits, heads)](
        q, k.codes, k.scales, v.codes, v.scales, frames.contiguous(), q_pos, k_pos,
        q if lengths is None else lengths.contiguous(), out, lse,
        scale, softcap or 1.0, window,
        kv_heads, group, q.shape[2], keys, cut.split_keys, blocks, 1 if visible is None else visible.k_pos.shape[1],
        *q.stride()[:3], k.codes.stride(0), k.scales.stride(0), v.codes.stride(0), v.scales.stride(0),
        K=k.side, V=v.side, P=slots, BLOCK_M=tile.rows, BLOCK_N=tile.keys,
        POSITIONS=visible is not None, WINDOWED=window > 0, RAGGED=lengths is not None, CAPPED=softcap is not None,
        EXACT=q.dtype == torch.bfloat16 and not k.side.by_channel and not launch.upcast,
        UPCAST=launch.upcast, PRECISION=launch.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return Partial(out[0], lse[0]) if cut.splits == 1 else merge_splits(out, lse)
