"""One call to an engine: which transfers are through, what became of them, and the caller's work beside each."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Sequence
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
    """Of one transfer: jobs that still carry a part of it, and how it went."""

    __slots__ = ("error", "lock", "parts", "spoilt", "started")

    def __init__(self) -> None:
        self.parts = 0
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
        for transfer in transfers:
            _check(transfer)
        self.transfers = transfers
        self._before = before
        self._after = after
        self._states = [_State() for _ in transfers]
        self._raised: list[BaseException] = []

    def run(self, jobs: Sequence[Job], move: Move, pool: Executor, threads: int) -> list[OSError | None]:
        """Carry out the jobs in up to ``threads`` threads, this one among them; one result a transfer.

        Raises
        ------
        BaseException
            Whatever a hook raised first, after all jobs have ended.
        """
        for job in jobs:
            for part in job.parts:
                self._states[part.transfer].parts += 1
        for index, state in enumerate(self._states):
            if not state.parts and self._start(index):
                self._finish(index)
        queue = deque(jobs)

        def work() -> None:
            while queue:
                try:
                    job = queue.popleft()
                except IndexError:  # another thread was faster
                    return
                self._execute(job, move)

        helpers = [pool.submit(work) for _ in range(min(threads, len(jobs)) - 1)]
        try:
            work()
        finally:
            queue.clear()
            for helper in helpers:
                if not helper.cancel():  # it may not have had its turn yet, and has nothing left to do then
                    helper.result()
        if self._raised:
            raise self._raised[0]
        return [state.error for state in self._states]

    def _execute(self, job: Job, move: Move) -> None:
        """Transfer the parts together; one by one if that fails, so that each error names its own transfer."""
        ready = [self._start(part.transfer) for part in job.parts]
        if all(ready):
            try:
                move(job)
            except OSError as error:
                problem: OSError = error
            except CapacityError as error:
                problem = OSError(errno.ENOMEM, str(error))
            else:
                for part in job.parts:
                    self._through(part.transfer)
                return
            if len(job.parts) == 1:
                self._fail(job.parts[0].transfer, problem)
                return
        if len(job.parts) > 1:
            for single, good in zip(job.single(), ready, strict=True):
                if good:
                    self._execute(single, move)

    def _start(self, index: int) -> bool:
        """Run ``before`` if nobody did; False when it raised, or another part failed: there is nothing to transfer."""
        state = self._states[index]
        with state.lock:
            if not state.started:
                state.started = True
                state.spoilt = not self._call(self._before, index)
            return not state.spoilt

    def _through(self, index: int) -> None:
        """Count a part that was transferred; with the last one the transfer is complete."""
        state = self._states[index]
        with state.lock:
            state.parts -= 1
            complete = not state.parts and not state.spoilt
        if complete:
            self._finish(index)

    def _finish(self, index: int) -> None:
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


def _check(transfer: Transfer) -> None:
    buffer = transfer.buffer
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous() or buffer.device.type == "meta":
        raise InputError(
            f"buffers must be contiguous uint8 vectors, got {buffer.dtype} {list(buffer.shape)} on {buffer.device}; "
            "view them as bytes"
        )
    if transfer.offset < 0:
        raise InputError(f"offsets must be at least 0, got {transfer.offset}")
