"""Keys or values in blocks of the accumulation type, from a run or from pages, through one reusable cache-sized buffer."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Loader", "PageLoader", "RunLoader"]


class Loader(Protocol):
    """Keys or values [H, length, dim] of folded heads, handed out in blocks; used by one thread at a time."""

    length: int
    dim: int
    align: int
    """Blocks that start and stop at multiples of this cost the least."""
    copies: bool
    """Whether blocks are copies, which lie in the cache, or views of memory."""

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """[H, stop - start, dim]; read it before the next call, which may overwrite it."""


class RunLoader:
    """Blocks of a strided run [H, N, dim]; without a copy unless the type differs or ``stage`` asks for one."""

    align = 1

    def __init__(self, run: torch.Tensor, dtype: torch.dtype, *, stage: bool) -> None:
        self.length, self.dim = run.shape[1:]
        self.copies = stage or run.dtype != dtype
        self._run = run
        self._dtype = dtype
        self._buffer: torch.Tensor | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        view = self._run[:, start:stop]
        if not self.copies:
            return view
        self._buffer, block = _room(self._buffer, view, view.shape, self._dtype)
        return block.copy_(view)


class PageLoader:
    """Blocks of pages gathered from an arena [F, P, dim] by frames [H, N], laid end to end."""

    copies = True

    def __init__(self, arena: torch.Tensor, frames: torch.Tensor, dtype: torch.dtype) -> None:
        self.align, self.dim = arena.shape[1:]
        self.length = frames.shape[1] * self.align
        self._arena = arena
        self._frames = frames
        self._dtype = dtype
        self._gathered: torch.Tensor | None = None
        self._buffer: torch.Tensor | None = None

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        first, last = start // self.align, -(-stop // self.align)
        frames = self._frames[:, first:last]
        shape = (frames.numel(), self.align, self.dim)
        self._gathered, pages = _room(self._gathered, self._arena, shape, self._arena.dtype)
        torch.index_select(self._arena, 0, frames.flatten(), out=pages)
        if pages.dtype != self._dtype:
            self._buffer, wide = _room(self._buffer, pages, shape, self._dtype)
            pages = wide.copy_(pages)
        run = pages.view(frames.shape[0], -1, self.dim)
        return run[:, start - first * self.align : stop - first * self.align]


def _room(
    buffer: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of at least that many elements, the old one if it is large enough, and its head viewed as ``shape``."""
    count = 1
    for size in shape:
        count *= size
    if buffer is None or buffer.numel() < count:
        buffer = torch.empty(count, dtype=dtype, device=like.device)
    return buffer, buffer[:count].view(shape)
