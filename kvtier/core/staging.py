"""Buffers between records and tensors, kept for the next transfer: page-aligned, page-locked where CUDA can."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvtier.storage_backends.memory import PAGE_BYTES, PinnedRegion, round_up

__all__ = ["Staging"]

_BATCH_BYTES = 32 << 20
_KEPT = 2


class Staging:
    """Rows of bytes to move records through, a batch at a time; at most two idle buffers are kept.

    Notes
    -----
    Thread-safe; each borrower has a buffer of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[PinnedRegion] = []
        self._closed = False

    @contextmanager
    def rows(self, row_bytes: int, count: int) -> Iterator[torch.Tensor]:
        """Up to ``count`` rows [n, row_bytes] uint8 that begin at page boundaries, n at least 1; undefined contents.

        Raises
        ------
        CapacityError
            The system has no such memory.
        """
        stride = max(PAGE_BYTES, round_up(row_bytes, PAGE_BYTES))
        rows = max(1, min(count, _BATCH_BYTES // stride))
        region = self._take(rows * stride)
        try:
            yield region.bytes[: rows * stride].view(rows, stride)[:, :row_bytes]
        finally:
            self._give_back(region)

    def close(self) -> None:
        """Free what is idle, and what is given back from now on; idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for region in idle:
            region.close()

    def _take(self, nbytes: int) -> PinnedRegion:
        with self._lock:
            fitting = [region for region in self._idle if region.bytes.numel() >= nbytes]
            if fitting:
                self._idle.remove(fitting[0])
                return fitting[0]
        return PinnedRegion(nbytes)

    def _give_back(self, region: PinnedRegion) -> None:
        with self._lock:
            self._idle = sorted([*self._idle, region], key=lambda one: one.bytes.numel(), reverse=True)
            kept = 0 if self._closed else _KEPT
            surplus, self._idle = self._idle[kept:], self._idle[:kept]
        for one in surplus:
            one.close()
