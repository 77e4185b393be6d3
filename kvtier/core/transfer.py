"""Copies between tiers in the background: a few threads, futures, and the ordering that a GPU needs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["TransferEngine"]

_T = TypeVar("_T")


class TransferEngine:
    """Runs copies off the caller's thread; they only move bytes, the caller changes all bookkeeping.

    Parameters
    ----------
    workers : int
        Threads. torch copies, file reads and digests release the interpreter lock.

    Notes
    -----
    On CUDA a copy runs on a side stream that first waits for what the caller's stream had queued at ``submit``; the
    future completes when the copy has.
    """

    def __init__(self, workers: int = 2) -> None:
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="kvtier-transfer")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, device: torch.device, copy: Callable[[], _T]) -> Future[_T]:
        """Run ``copy`` in the background, ordered after the work already queued on ``device``."""
        if device.type != "cuda":
            return self._pool.submit(_without_grad, copy)
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(device))
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))

        def on_side_stream() -> _T:
            with torch.cuda.stream(stream):
                stream.wait_event(queued)
                result = _without_grad(copy)
                stream.synchronize()
            return result

        return self._pool.submit(on_side_stream)

    def close(self) -> None:
        """Wait for what runs and stop the threads; idempotent."""
        self._pool.shutdown(wait=True)


def _without_grad(copy: Callable[[], _T]) -> _T:
    with torch.no_grad():
        return copy()
