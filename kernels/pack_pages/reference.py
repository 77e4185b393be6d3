"""Pages into rows and back, one page at a time: the truth that the fast paths are compared with."""

from __future__ import annotations

import torch

__all__ = ["pack_pages", "unpack_pages"]


def pack_pages(k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor) -> None:
    """Fill rows [n, P * (Dk + Dv)] with frames [n]."""
    for row, frame in zip(rows, frames.tolist(), strict=True):
        row.copy_(torch.cat([k_arena[frame].flatten(), v_arena[frame].flatten()]))


def unpack_pages(rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor) -> None:
    """Fill frames [n] with rows [n, P * (Dk + Dv)]."""
    split = k_arena.shape[1] * k_arena.shape[2]
    for row, frame in zip(rows, frames.tolist(), strict=True):
        k_arena[frame] = row[:split].view(k_arena.shape[1:])
        v_arena[frame] = row[split:].view(v_arena.shape[1:])
