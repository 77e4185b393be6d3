"""Keys from low-rank factors in Triton: a program multiplies a tile of tokens, rotates it in registers and stores it.

The halves of a head that turn together are two accumulators of one program, so keys before rotation never leave it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from kvtier.kernels.lowrank_keys import blocked
from kvtier.kernels.lowrank_keys.rotation import Rotation
from kvtier.kernels.tiles import check_rows, dense_channels, launch_of, padded

__all__ = ["Tile", "lowrank_keys", "tile"]

BLOCK_TOKENS: Final = 64
MOST_RANKS: Final = 64
WIDE_PAIRS: Final = 64
"""Pairs of channels above which tiles are halved: two accumulators of them fill the registers."""


@triton.jit
def lowrank_keys_kernel(
    u_ptr, sv_ptr, positions_ptr, pages_ptr, cos_ptr, sin_ptr, keys_ptr,
    kv_heads, tokens, pages,
    stride_ub, stride_ut, stride_sb, stride_sh, stride_sr, stride_cos, stride_sin,
    P: tl.constexpr, RANK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_N] of one KV head: pair c of channels is (c, c + HALF) if it turns, else two of the channels left."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, BLOCK_C)
    in_keys, in_pairs, turns = o_n < pages * P, o_c < D // 2, o_c < HALF
    o_first, o_second = o_c, o_c + D // 2
    if 2 * HALF < D:
        o_first = o_c + tl.where(turns, 0, HALF)
        o_second = o_c + tl.where(turns, HALF, D // 2)
    b_row = tl.load(pages_ptr + i_bh.to(tl.int64) * pages + o_n // P, mask=in_keys, other=0) * P + o_n % P
    b_place = tl.load(positions_ptr + i_b * tokens + b_row, mask=in_keys, other=0)
    b_first, b_second = (tl.zeros([BLOCK_N, BLOCK_C], tl.float32), tl.zeros([BLOCK_N, BLOCK_C], tl.float32))
    for at in range(0, RANK, BLOCK_R):
        o_r = at + tl.arange(0, BLOCK_R)
        in_rank = o_r < RANK
        p_u = u_ptr + i_b * stride_ub + b_row[:, None] * stride_ut + o_r[None, :]
        p_sv = sv_ptr + i_b * stride_sb + i_h * stride_sh + o_r[:, None] * stride_sr
        b_u = tl.load(p_u, mask=in_keys[:, None] & in_rank[None, :], other=0.0)
        b_low = tl.load(p_sv + o_first[None, :], mask=in_rank[:, None] & in_pairs[None, :], other=0.0)
        b_high = tl.load(p_sv + o_second[None, :], mask=in_rank[:, None] & in_pairs[None, :], other=0.0)
        if UPCAST:
            b_u, b_low, b_high = b_u.to(tl.float32), b_low.to(tl.float32), b_high.to(tl.float32)
        b_first = tl.dot(b_u, b_low, b_first, input_precision=PRECISION)
        b_second = tl.dot(b_u, b_high, b_second, input_precision=PRECISION)

    # Pairs that do not turn are multiplied by one and zero.
    in_table = in_keys[:, None] & turns[None, :]
    b_cos = tl.load(cos_ptr + b_place[:, None] * stride_cos + o_c[None, :], mask=in_table, other=1.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + b_place[:, None] * stride_sin + o_c[None, :], mask=in_table, other=0.0).to(tl.float32)
    p_key = keys_ptr + (i_bh.to(tl.int64) * pages * P + o_n)[:, None] * D
    in_tile = in_keys[:, None] & in_pairs[None, :]
    element = keys_ptr.dtype.element_ty
    tl.store(p_key + o_first[None, :], (b_first * b_cos - b_second * b_sin).to(element), mask=in_tile)
    tl.store(p_key + o_second[None, :], (b_second * b_cos + b_first * b_sin).to(element), mask=in_tile)


class Tile(NamedTuple):
    """What a program multiplies at once: tokens, ranks, pairs of channels."""

    tokens: int
    ranks: int
    pairs: int
    warps: int
    stages: int


def tile(*, rank: int, dim: int, element_bytes: int) -> Tile:
    """Tile for factors of a rank and heads of ``dim`` channels; a smaller one for fp32, which costs three products."""
    half, pairs = element_bytes == 2, padded(dim // 2)
    wide = pairs > WIDE_PAIRS
    return Tile(
        tokens=BLOCK_TOKENS >> (wide + (not half)),
        ranks=min(padded(rank), MOST_RANKS if half and not wide else MOST_RANKS // 2),
        pairs=pairs,
        warps=4 if half and not wide else 8,
        stages=3 if half else 2,
    )


def lowrank_keys(
    u: torch.Tensor,
    sv: torch.Tensor,
    positions: torch.Tensor,
    pages: torch.Tensor,
    rotation: Rotation,
    *,
    page_tokens: int,
) -> torch.Tensor:
    """Keys [B, Hk, N * P, D] for u [B, T, r], sv [B, Hk, r, D], positions [B, T] and pages [B, Hk, N]."""
    if torch.float64 in (u.dtype, sv.dtype, rotation.cos.dtype) or not pages.numel():
        return blocked.lowrank_keys(u, sv, positions, pages, rotation, page_tokens=page_tokens)
    batch, kv_heads, rank, dim = sv.shape
    check_rows("pages", pages, u.shape[1] // page_tokens)
    check_rows("positions", positions, rotation.cos.shape[0])
    launch = launch_of(u.device)
    u, sv, cos, sin = (dense_channels(x) for x in (u, sv, *rotation))
    keys = u.new_empty(batch, kv_heads, pages.shape[2] * page_tokens, dim)
    cut = tile(rank=rank, dim=dim, element_bytes=max(u.element_size(), sv.element_size()))
    lowrank_keys_kernel[(-(-keys.shape[2] // cut.tokens), batch * kv_heads)](
        u, sv, positions.contiguous(), pages.contiguous(), cos, sin, keys,
        kv_heads, u.shape[1], pages.shape[2],
        *u.stride()[:2], *sv.stride()[:3], cos.stride(0), sin.stride(0),
        P=page_tokens, RANK=rank, D=dim, HALF=cos.shape[1],
        BLOCK_N=cut.tokens, BLOCK_R=cut.ranks, BLOCK_C=cut.pairs,
        UPCAST=launch.upcast or u.dtype != sv.dtype, PRECISION=launch.precision,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return keys
