"""A few threads for copies and digests, which release the interpreter lock; started when they are first worth it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Workers"]

T = TypeVar("T")

_WORTH_BYTES = 2 << 20
_MOST_THREADS = 4
_CORES_A_THREAD = 8


class Workers:
    """Runs jobs over bytes, in threads when there are bytes enough.

    Parameters
    ----------
    threads : int, optional
        By default one for eight cores, at most 4. On few cores a second one costs more than it brings: one core copies
        about as fast as memory is.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // _CORES_A_THREAD))
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[Callable[[], T]], nbytes: int) -> list[T]:
        """The results of all jobs, which work on ``nbytes`` together; blocks. What a job raises is raised here."""
        if self.threads == 1 or len(jobs) < 2 or nbytes < _WORTH_BYTES:
            return [job() for job in jobs]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="kvtier-records")
            futures = [self._pool.submit(job) for job in jobs]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads, after the jobs under way; a later `run` starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
