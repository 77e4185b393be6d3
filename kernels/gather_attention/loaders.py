"""Keys or values in blocks of the accumulation type, from a run or from pages, copied through cache-sized scratch."""

from __future__ import annotations

from typing import Protocol

import torch

from kvtier.kernels.scratch import scratch

__all__ = ["Loader", "PageLoader", "RunLoader"]


class Loader(Protocol):
    """Keys or values [H, length, dim] of folded heads, handed out in blocks; for one thread and one call."""

    length: int
    dim: int
    align: int
    """Blocks that start and stop at multiples of this cost the least."""
    copies: bool
    """Whether blocks are copies, which lie in the cache, or views of memory."""

    def load(self, start: int, stop: int, room: str) -> torch.Tensor:
        """Block [H, stop - start, dim], perhaps in the scratch memory ``room``, where the next block overwrites it."""


class RunLoader:
    """Blocks of a strided run [H, N, dim]; copied only when the type differs."""

    align = 1

    def __init__(self, run: torch.Tensor, dtype: torch.dtype) -> None:
        self.length, self.dim = run.shape[1:]
        self.copies = run.dtype != dtype
        self._run = run
        self._dtype = dtype

    def load(self, start: int, stop: int, room: str) -> torch.Tensor:
        """Block [H, stop - start, dim]."""
        view = self._run[:, start:stop]
        if not self.copies:
            return view
        return scratch(room, tuple(view.shape), self._dtype, view.device).copy_(view)


class PageLoader:
    """Blocks of pages gathered from an arena [F, P, dim] by frames [H, N], end to end: the first ``length`` keys."""

    copies = True

    def __init__(self, arena: torch.Tensor, frames: torch.Tensor, dtype: torch.dtype, length: int) -> None:
        self.align, self.dim = arena.shape[1:]
        self.length = length
        self._arena = arena
        self._frames = frames
        self._dtype = dtype

    def load(self, start: int, stop: int, room: str) -> torch.Tensor:
        """Block [H, stop - start, dim]: pages that it only touches are gathered whole."""
        first, last = start // self.align, -(-stop // self.align)
        frames = self._frames[:, first:last]
        shape = (frames.numel(), self.align, self.dim)
        pages = scratch(room, shape, self._arena.dtype, self._arena.device)
        torch.index_select(self._arena, 0, frames.flatten(), out=pages)
        if pages.dtype != self._dtype:
            pages = scratch(room, shape, self._dtype, self._arena.device).copy_(pages)
        run = pages.view(frames.shape[0], -1, self.dim)
        return run[:, start - first * self.align : stop - first * self.align]
