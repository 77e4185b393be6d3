"""A batch through a queue of the kernel: the disk gets something to do first, then what arrived is looked at."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future

from kvtier.storage_backends.engines.batch import Batch, Move
from kvtier.storage_backends.engines.kernel_queue import READ, KernelQueue, Verb
from kvtier.storage_backends.engines.plan import Job
from kvtier.storage_backends.engines.posix_file import PosixFile

__all__ = ["Feed"]

_FIRST_WINDOW_BYTES = 1 << 20
_MOST_WINDOW_BYTES = 8 << 20
_OPENING = 1
"""Bytes by which the window opens for each that arrived: little is left to verify when the last ones have."""


class Feed:
    """Carries out straight jobs in the queue, with their hooks in the calling thread; other jobs in threads.

    Reads go through a window of bytes under way that opens by what arrives: drives that share their time among
    all requests, or tell of them together, would end the first with the last, and all digests would come after that.

    Parameters
    ----------
    batch : Batch
        Begun.
    queue : KernelQueue
        With nothing under way.
    move : callable
        Carries out a job by system calls.
    pool : Executor
        For jobs that the queue cannot take.
    """

    def __init__(self, batch: Batch, queue: KernelQueue, verb: Verb, move: Move, pool: Executor) -> None:
        self._batch = batch
        self._queue = queue
        self._verb = verb
        self._move = move
        self._pool = pool
        self._helpers: list[Future[None]] = []
        self._under_way: dict[int, Job] = {}
        self._bytes = 0
        self._window = _FIRST_WINDOW_BYTES if verb is READ else sys.maxsize
        self._ended: deque[tuple[Job, bool]] = deque()
        self._token = 0

    def run(self, jobs: Iterator[Job]) -> None:
        """Carry out jobs, which are drawn as the queue has room; returns, or raises, when nothing is under way."""
        try:
            for job in jobs:
                while not self._has_room:
                    self._settle(self._queue.look() if self._ended else self._queue.wait())
                self._begin(job)
            while self._ended or self._under_way:
                self._settle([] if self._ended else self._queue.wait())
        finally:
            while self._queue.under_way:  # after an interruption: the kernel is still at these buffers
                self._queue.wait()
            for helper in self._helpers:
                helper.result()

    @property
    def _has_room(self) -> bool:
        return self._queue.under_way < self._queue.depth and self._bytes < self._window

    def _begin(self, job: Job) -> None:
        if not job.straight or not job.file.direct:
            self._helpers.append(self._pool.submit(self._batch.execute, job, self._move))
        elif self._batch.ready(job) and self._submit(job):
            self._under_way[self._token] = job
            self._bytes += job.nbytes
        else:
            self._batch.execute(job, self._move)
        self._token += 1

    def _submit(self, job: Job) -> bool:
        """Put a job into the queue; False when the kernel does not take it."""
        transfers = self._batch.transfers
        parts: list[tuple[int, int]] = []
        for index, start, stop in job.parts:
            parts += transfers[index].within(start, stop)
        descriptor = job.file.descriptor if isinstance(job.file, PosixFile) else -1
        try:
            self._queue.submit(self._verb, self._token, descriptor, job.offset, parts)
        except OSError:
            return False
        return True

    def _settle(self, told: list[tuple[int, int]]) -> None:
        """Note what ended; then see to one job of those, unless there is room in the queue, which goes first."""
        for token, result in told:
            job = self._under_way.pop(token)
            self._bytes -= job.nbytes
            if self._window < _MOST_WINDOW_BYTES:
                self._window = min(_MOST_WINDOW_BYTES, self._window + _OPENING * job.nbytes)
            self._ended.append((job, result == job.nbytes))
        if self._ended and not (told and self._has_room):
            job, whole = self._ended.popleft()
            if whole:
                self._batch.through(job)
            else:
                self._batch.execute(job, self._move)  # goes on where the kernel stopped short, or says what is wrong
