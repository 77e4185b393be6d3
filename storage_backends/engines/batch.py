"""One call to an engine: which transfers are through, what became of them, and the caller's work beside each."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeAlias

import torch

from kvtier.errors import CapacityError, InputError
from kvtier.storage_backends.engines.base import Transfer
from kvtier.storage_backends.engines.plan import Job

__all__ = ["Batch", "Hook", "Move"]

Hook: TypeAlias = Callable[[int], None]
Move: TypeAlias = Callable[[Job], None]


class _State:
    """Of one transfer: bytes that are not through yet, and how it went."""

    __slots__ = ("error", "left", "lock", "spoilt", "started")

    def __init__(self, size: int) -> None:
        self.left = size
        self.started = False
        self.spoilt = False
        self.error: OSError | None = None
        self.lock = threading.Lock()


class Batch:
    """Runs the jobs of one batch and keeps its results.

    Parameters
    ----------
    transfers : sequence of Transfer
        Checked here: uint8 vectors without gaps, offsets of at least 0.
    before, after : callable, optional
        Called with the index of a transfer: ahead of its first byte, and when every byte of it went through.
    """

    def __init__(self, transfers: Sequence[Transfer], *, before: Hook | None = None, after: Hook | None = None) -> None:
        self.transfers = transfers
        self._states = [_State(_checked_size(transfer)) for transfer in transfers]
        self.total = sum(state.left for state in self._states)
        self._before = before
        self._after = after
        self._raised: list[BaseException] = []

    def run(self, jobs: Iterator[Job], move: Move, pool: Executor, threads: int) -> list[OSError | None]:
        """Carry out the jobs in up to ``threads`` threads, this one among them; one result a transfer.

        Jobs are drawn as they are needed, so that planning goes on beside the first transfers.

        Raises
        ------
        BaseException
            Whatever a hook raised first, after all jobs have ended.
        """
        _wait_for_streams(self.transfers)
        for index, state in enumerate(self._states):
            if not state.left and self._start(index):
                self._call(self._after, index)
        first = list(itertools.islice(jobs, threads))
        source = _Source(itertools.chain(first, jobs))

        def work() -> None:
            while (job := source.draw()) is not None:
                self._execute(job, move)

        helpers = [pool.submit(work) for _ in first[1:]]
        try:
            work()
        finally:
            source.dry()
            for helper in helpers:
                if not helper.cancel():  # if it can be, it did not have its turn yet, and nothing is left to do
                    helper.result()
        if self._raised:
            raise self._raised[0]
        return [state.error for state in self._states]

    def _execute(self, job: Job, move: Move) -> None:
        """Transfer the parts together; one by one if that fails, so that each error names its own transfer."""
        parts = job.parts
        ready = [self._start(part.transfer) for part in parts]
        if all(ready):
            try:
                move(job)
            except OSError as error:
                problem: OSError = error
            except CapacityError as error:
                problem = OSError(errno.ENOMEM, str(error))
            else:
                for index, start, stop in parts:
                    self._through(index, stop - start)
                return
            if len(parts) == 1:
                self._fail(parts[0].transfer, problem)
                return
        if len(parts) > 1:
            for single, good in zip(job.single(), ready, strict=True):
                if good:
                    self._execute(single, move)

    def _start(self, index: int) -> bool:
        """Run ``before`` if nobody did; False when it raised, or another part failed: there is nothing to transfer."""
        state = self._states[index]
        if self._before is not None:
            with state.lock:
                if not state.started:
                    state.started = True
                    state.spoilt = not self._call(self._before, index)
        return not state.spoilt

    def _through(self, index: int, count: int) -> None:
        """Count bytes that were transferred; with the last one the transfer is complete."""
        state = self._states[index]
        with state.lock:
            state.left -= count
            complete = not state.left
        if complete:
            self._call(self._after, index)

    def _fail(self, index: int, error: OSError) -> None:
        state = self._states[index]
        with state.lock:
            state.spoilt = True
            state.error = state.error or error

    def _call(self, hook: Hook | None, index: int) -> bool:
        """Run a hook; False when it raised, which `run` raises in the end."""
        if hook is not None:
            try:
                hook(index)
            except BaseException as error:  # noqa: BLE001 - it is raised where the caller waits
                self._raised.append(error)
                return False
        return True


class _Source:
    """Jobs for several threads, which no generator would serve by itself."""

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()

    def draw(self) -> Job | None:
        """Another job; None when there are no more."""
        with self._lock:
            return next(self._jobs, None)

    def dry(self) -> None:
        """Give no more."""
        with self._lock:
            self._jobs = iter(())


def _checked_size(transfer: Transfer) -> int:
    """Bytes of a transfer that makes sense."""
    buffer = transfer.buffer
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or buffer.device.type == "meta":
        raise InputError(
            f"buffers must be contiguous uint8 vectors, got {buffer.dtype} {list(buffer.shape)} on {buffer.device}; "
            "view them as bytes"
        )
    if transfer.offset < 0:
        raise InputError(f"offsets must be at least 0, got {transfer.offset}")
    return buffer.numel()


def _wait_for_streams(transfers: Sequence[Transfer]) -> None:
    """Let what the caller has queued for its CUDA buffers come to an end: I/O threads use streams of their own."""
    for device in {buffer.device for _, _, buffer in transfers if buffer.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
