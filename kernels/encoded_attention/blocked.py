"""Attention over encoded blocks in plain torch: as many as the cache holds are decoded, multiplied and forgotten."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.kernels.gather_attention.blocked import attend_loaded
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.kernels.gather_attention.ragged import over_pieces
from kvtier.kernels.heads import accumulation_dtype
from kvtier.kernels.scratch import scratch
from kvtier.types import Partial, Visibility

__all__ = ["attend_encoded"]


class BlockLoader:
    """Keys or values gathered from an arena [F, block_bytes] by frames [H, N] and decoded, blocks end to end."""

    copies = True

    def __init__(
        self, arena: torch.Tensor, frames: torch.Tensor, layout: BlockFormat, dtype: torch.dtype, length: int
    ) -> None:
        self.align, self.dim = layout.slots, layout.dim
        self.length = length
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


class BlockSource(NamedTuple):
    """The first ``length`` keys of the blocks that frames [B, Hk, N] name, for `over_pieces`."""

    frames: torch.Tensor
    slots: int
    length: int

    @property
    def kv_heads(self) -> int:
        """KV heads Hk."""
        return self.frames.shape[1]

    def of(self, rows: slice, heads: slice) -> BlockSource:
        """Those of some batch rows and KV heads."""
        return self._replace(frames=self.frames[rows, heads])

    def before(self, stop: int) -> BlockSource:
        """The keys before ``stop``; blocks behind them are not named any more."""
        return self._replace(frames=self.frames[:, :, : -(-stop // self.slots)], length=stop)


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
    """Attention over the blocks [B, Hk, N] of arenas [F, block_bytes]."""
    dtype = accumulation_dtype(q)

    def whole(q: torch.Tensor, source: BlockSource, visible: Visibility | None, extras: Extras) -> Partial:
        del extras
        folded = source.frames.flatten(0, 1)
        keys = BlockLoader(k_arena, folded, k_format, dtype, source.length)
        values = BlockLoader(v_arena, folded, v_format, dtype, source.length)
        return attend_loaded(
            q, source.kv_heads, keys, values, dtype=dtype, scale=scale, softcap=softcap, visible=visible
        )

    source = BlockSource(frames, k_format.slots, frames.shape[2] * k_format.slots)
    return over_pieces(q, source, visible, Extras(lengths=lengths), whole)
