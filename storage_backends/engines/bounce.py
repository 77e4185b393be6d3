"""Page-aligned buffers, page-locked where CUDA is there, for bytes that the kernel cannot transfer where they lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvtier.storage_backends.memory import PinnedRegion

__all__ = ["BouncePool"]


class BouncePool:
    """Lends buffers of one size; as many are kept as transfers usually run at once.

    Parameters
    ----------
    size : int
        Bytes of a buffer.
    keep : int
        Most idle buffers.
    """

    def __init__(self, size: int, keep: int) -> None:
        self.size = size
        self._keep = keep
        self._idle: list[PinnedRegion] = []
        self._lock = threading.Lock()

    @contextmanager
    def buffer(self) -> Iterator[torch.Tensor]:
        """Lend a buffer, uint8 [size].

        Raises
        ------
        CapacityError
            The system has no such memory to give.
        """
        with self._lock:
            region = self._idle.pop() if self._idle else None
        if region is None:
            region = PinnedRegion(self.size)
        try:
            yield region.bytes
        finally:
            with self._lock:
                kept = len(self._idle) < self._keep
                if kept:
                    self._idle.append(region)
            if not kept:
                region.close()

    def clear(self) -> None:
        """Give the idle buffers back to the system."""
        with self._lock:
            idle, self._idle = self._idle, []
        for region in idle:
            region.close()
