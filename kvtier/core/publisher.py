"""Puts in the background, with bounded bytes in flight: what does not fit the queue is refused at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvtier.core.store_stats import Counters, PutReport
from kvtier.types import format_bytes

__all__ = ["Publisher"]


class Publisher:
    """One thread that stores chunks in the order they came.

    Parameters
    ----------
    capacity_bytes : int
        Most payload bytes that wait or are being put.
    counters : Counters
        Where refusals are counted.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, capacity_bytes: int, counters: Counters) -> None:
        self.capacity_bytes = capacity_bytes
        self._counters = counters
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[PutReport]] = set()
        self._queued_bytes = 0
        self._closed = False

    @property
    def queued_bytes(self) -> int:
        """Payload bytes that wait or are being put."""
        return self._queued_bytes

    def submit(self, put: Callable[[int], PutReport], chunks: int, chunk_bytes: int) -> Future[PutReport]:
        """Have ``put(n)`` store the first n of some chunks, as many as fit the queue.

        Returns
        -------
        Future of PutReport
            For all of the chunks; those that did not fit are refused, with the reason.
        """
        with self._lock:
            fit = 0 if self._closed else min(chunks, (self.capacity_bytes - self._queued_bytes) // max(1, chunk_bytes))
            refused = PutReport(refused=chunks - fit, reason=self._reason() if fit < chunks else "")
            self._counters.add(dropped_chunks=refused.refused)
            if fit == 0:
                done: Future[PutReport] = Future()
                done.set_result(refused)
                return done
            self._queued_bytes += fit * chunk_bytes
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvtier-publisher")
            future = self._pool.submit(self._run, put, fit, chunk_bytes, refused)
            self._running.add(future)
        future.add_done_callback(self._forget)
        return future

    def flush(self) -> None:
        """Wait for everything that was submitted."""
        with self._lock:
            running = list(self._running)
        wait(running)

    def close(self) -> None:
        """Take no more, and end when all that was taken is put; idempotent."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def _run(self, put: Callable[[int], PutReport], chunks: int, chunk_bytes: int, refused: PutReport) -> PutReport:
        try:
            report = put(chunks)
        finally:
            with self._lock:
                self._queued_bytes -= chunks * chunk_bytes
        return report._replace(refused=report.refused + refused.refused, reason=report.reason or refused.reason)

    def _forget(self, future: Future[PutReport]) -> None:
        with self._lock:
            self._running.discard(future)

    def _reason(self) -> str:
        if self._closed:
            return "the store is closed"
        return f"more than {format_bytes(self.capacity_bytes)} would wait to be stored"
