"""Attention over encoded blocks in plain torch: as many as the cache holds are decoded, multiplied and forgotten."""

from __future__ import annotations

import torch

from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.kernels.gather_attention.blocked import attend_loaded
from kvtier.kernels.heads import accumulation_dtype
from kvtier.kernels.scratch import scratch
from kvtier.types import Partial, Visibility

__all__ = ["attend_encoded"]


class BlockLoader:
    """Keys or values gathered from an arena [F, block_bytes] by frames [H, N] and decoded, blocks end to end."""

    copies = True

    def __init__(self, arena: torch.Tensor, frames: torch.Tensor, layout: BlockFormat, dtype: torch.dtype) -> None:
        self.align, self.dim = layout.slots, layout.dim
        self.length = frames.shape[1] * self.align
        self._arena = arena
        self._frames = frames
        self._format = layout
        self._dtype = dtype

    def load(self, start: int, stop: int, room: str) -> torch.Tensor:
        """Keys or values [H, stop - start, dim]: blocks that it only touches are decoded whole."""
        first, last = start // self.align, -(-stop // self.align)
        frames = self._frames[:, first:last]
        device = self._arena.device
        encoded = scratch("encoded", (frames.numel(), self._format.block_bytes), torch.uint8, device)
        torch.index_select(self._arena, 0, frames.flatten(), out=encoded)
        decoded = scratch(room, (frames.numel(), self.align, self.dim), self._dtype, device)
        run = self._format.decode(encoded, dtype=self._dtype, out=decoded).view(frames.shape[0], -1, self.dim)
        return run[:, start - first * self.align : stop - first * self.align]


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
) -> Partial:
    """Attention over the blocks [B, Hk, N] of arenas [F, block_bytes]."""
    dtype = accumulation_dtype(q)
    folded = frames.flatten(0, 1)
    keys, values = BlockLoader(k_arena, folded, k_format, dtype), BlockLoader(v_arena, folded, v_format, dtype)
    return attend_loaded(q, frames.shape[1], keys, values, dtype=dtype, scale=scale, softcap=softcap, visible=visible)
