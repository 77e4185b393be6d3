"""Merge of partials in one launch, whatever their number: a program merges a tile of rows over all parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvtier.kernels.merge_partials import blocked
from kvtier.kernels.tiles import padded
from kvtier.types import Partial

__all__ = ["merge_partials", "merge_splits"]


@triton.jit
def merge_kernel(
    out_ptr, lse_ptr, merged_out_ptr, merged_lse_ptr, parts, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Parts out [S, R, D] and lse [S, R] to out [R, D] and lse [R]; a row that is empty everywhere gives (0, -inf)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    p_lse = lse_ptr + o_s[:, None].to(tl.int64) * rows + row[None, :]
    b_lse = tl.load(p_lse, mask=(o_s < parts)[:, None] & in_rows[None, :], other=float("-inf"))
    b_max = tl.max(b_lse, 0)
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_total = tl.sum(tl.exp(b_lse - b_base[None, :]), 0)
    empty = b_total == 0.0
    b_sum = tl.where(empty, 1.0, b_total)
    b_o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    at = row
    for _ in range(parts):
        b_weight = tl.exp(tl.load(lse_ptr + at, mask=in_rows, other=float("-inf")) - b_base) / b_sum
        b_part = tl.load(
            out_ptr + at[:, None] * D + o_d[None, :], mask=in_rows[:, None] & (o_d < D)[None, :], other=0.0
        )
        b_o += b_weight[:, None] * b_part
        at += rows
    tl.store(merged_out_ptr + row[:, None] * D + o_d[None, :], b_o, mask=in_rows[:, None] & (o_d < D)[None, :])
    tl.store(merged_lse_ptr + row, tl.where(empty, float("-inf"), b_base + tl.log(b_sum)), mask=in_rows)


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Merge parts out [B, Hq, Tq, Dv], lse [B, Hq, Tq]; a single one is returned as it is, fp64 goes to torch."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].out.dtype != torch.float32 or not parts[0].out.numel():
        return blocked.merge_partials(parts)
    return merge_splits(torch.stack([part.out for part in parts]), torch.stack([part.lse for part in parts]))


def merge_splits(out: torch.Tensor, lse: torch.Tensor) -> Partial:
    """Merge contiguous fp32 parts out [S, B, Hq, Tq, Dv], lse [S, B, Hq, Tq]."""
    parts, dim = out.shape[0], out.shape[-1]
    rows = lse[0].numel()
    block_rows = max(1, 2048 // padded(dim))
    merged_out, merged_lse = torch.empty_like(out[0]), torch.empty_like(lse[0])
    merge_kernel[(-(-rows // block_rows),)](
        out, lse, merged_out, merged_lse, parts, rows,
        D=dim, BLOCK_D=padded(dim), BLOCK_S=max(2, 1 << (parts - 1).bit_length()), BLOCK_R=block_rows, num_warps=4,
    )  # fmt: skip
    return Partial(merged_out, merged_lse)
