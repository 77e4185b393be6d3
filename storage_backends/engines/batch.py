"""One call to an engine: which transfers are through, what became of them, and the caller's work beside each."""

from __future__ import annotations

import errno
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from typing import TypeAlias

import torch

from kvtier.errors import CapacityError
from kvtier.storage_backends.engines.base import Transfer
from kvtier.storage_backends.engines.laid import Laid, lay
from kvtier.storage_backends.engines.plan import Job, in_order

__all__ = ["Batch", "Hook", "Move"]

Hook: TypeAlias = Callable[[int], None]
Move: TypeAlias = Callable[[Job], None]


class Batch:
    """Runs the jobs of one batch and keeps its results.

    Parameters
    ----------
    transfers : iterable of Transfer
        Checked here when they are a sequence, else as they are drawn: uint8 vectors without gaps, offsets from 0 on.
    before, after : callable, optional
        Called with the index of a transfer: ahead of its first byte, and when every byte of it went through.

    Attributes
    ----------
    transfers : list of Laid
        Those that are known: all of a sequence, and what was drawn of others, at first one.
    total : int
        Bytes of those.
    """

    def __init__(self, transfers: Iterable[Transfer], *, before: Hook | None = None, after: Hook | None = None) -> None:
        self.transfers: list[Laid] = []
        self.total = 0
        self._left: list[int] = []
        self._before = before
        self._after = after
        self._errors: list[OSError | None] = []
        self._ready: dict[int, bool] = {}  # whether ``before`` went well, once it ran
        self._turns: dict[int, threading.Lock] = {}  # to run it: parts of one transfer may begin at once
        self._lock = threading.Lock()
        self._raised: list[BaseException] = []
        known = isinstance(transfers, Sequence)
        self._coming = None if known else iter(transfers)
        for transfer in transfers if known else itertools.islice(self._coming or (), 1):
            self._take(transfer)

    @property
    def drawn(self) -> bool:
        """Whether more transfers may come."""
        return self._coming is not None

    def begin(self) -> None:
        """See to what needs no job: streams that fill buffers, and transfers of no bytes."""
        _wait_for_streams(self.transfers)
        if self.total and all(self._left):
            return
        for index, left in enumerate(self._left):
            if not left:
                self._pass(index)

    def order(self) -> Iterable[int]:
        """Places of transfers in the order in which they should go: of the files, or as they are drawn."""
        return in_order(self.transfers) if self._coming is None else self._drawn(self._coming)

    def draw_all(self) -> None:
        """Know all transfers, before `begin`."""
        for transfer in self._coming or ():
            self._take(transfer)
        self._coming = None

    def _drawn(self, coming: Iterator[Transfer]) -> Iterator[int]:
        """Places of those that are known already, and then of those that come, after `begin`."""
        yield from range(len(self.transfers))
        for transfer in coming:
            self._take(transfer)
            index = len(self._left) - 1
            if transfer.buffer.is_cuda:
                _wait_for_streams(self.transfers[index:])
            if not self._left[index]:
                self._pass(index)
            yield index

    def _take(self, transfer: Transfer) -> None:
        laid = lay(transfer)
        self.transfers.append(laid)
        self._left.append(laid.nbytes)
        self._errors.append(None)
        self.total += laid.nbytes

    def _pass(self, index: int) -> None:
        """Call the hooks of a transfer of no bytes."""
        if self._start(index):
            self._call(self._after, index)

    def run(self, jobs: Iterator[Job], move: Move, pool: Executor, threads: int) -> list[OSError | None]:
        """Carry out the jobs in up to ``threads`` threads, this one among them; one result a transfer.

        Jobs are drawn as they are needed, so that planning goes on beside the first transfers.

        Raises
        ------
        BaseException
            Whatever drawing or a hook raised first, after all jobs have ended.
        """
        self.begin()
        source = _Source(jobs)

        def work() -> None:
            while (job := source.draw()) is not None:
                self.execute(job, move)

        helpers: list[Future[None]] = []
        try:
            source.draw_ahead()
            while len(helpers) < threads - 1 and source.draw_ahead():
                helpers.append(pool.submit(work))
            work()
        finally:
            source.dry()
            # One that can be cancelled did not have its turn yet, and nothing is left to do.
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()
        return self.results()

    def execute(self, job: Job, move: Move) -> None:
        """Transfer the parts together; one by one if that fails, so that each error names its own transfer."""
        parts = job.parts
        if self.ready(job):
            try:
                move(job)
            except OSError as error:
                problem: OSError = error
            except CapacityError as error:
                problem = OSError(errno.ENOMEM, str(error))
            else:
                self.through(job)
                return
            if len(parts) == 1:
                self._fail(parts[0].transfer, problem)
                return
        if len(parts) > 1:
            for single in job.single():
                self.execute(single, move)

    def ready(self, job: Job) -> bool:
        """Run ``before`` of its parts, where nobody did; False when not all of them are to be transferred."""
        return self._before is None or all(self._start(part.transfer) for part in job.parts)

    def through(self, job: Job) -> None:
        """Count bytes that were transferred; with its last one a transfer is complete."""
        for index, start, stop in job.parts:
            complete = True
            if stop - start < self._left[index]:  # else these are its last bytes, which nobody else is at
                with self._lock:
                    self._left[index] -= stop - start
                    complete = not self._left[index]
            if complete:
                self._call(self._after, index)

    def results(self) -> list[OSError | None]:
        """What became of each transfer, when all jobs have ended; what a hook raised first is raised here."""
        if self._raised:
            raise self._raised[0]
        return self._errors

    def _start(self, index: int) -> bool:
        """Run ``before`` if nobody did; False when it raised, or another part failed: there is nothing to transfer."""
        with self._turns.setdefault(index, threading.Lock()):
            if index not in self._ready:
                self._ready[index] = self._call(self._before, index)
        return self._ready[index] and self._errors[index] is None

    def _fail(self, index: int, error: OSError) -> None:
        with self._lock:
            self._errors[index] = self._errors[index] or error

    def _call(self, hook: Hook | None, index: int) -> bool:
        """Run a hook; False when it raised, which `results` raises in the end."""
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
        self._ahead: deque[Job] = deque()
        self._lock = threading.Lock()

    def draw_ahead(self) -> bool:
        """Have one more job ready for whoever draws next; False when there are no more."""
        with self._lock:
            some = list(itertools.islice(self._jobs, 1))
            self._ahead += some
            return bool(some)

    def draw(self) -> Job | None:
        """Another job; None when there are no more."""
        with self._lock:
            return self._ahead.popleft() if self._ahead else next(self._jobs, None)

    def dry(self) -> None:
        """Give no more."""
        with self._lock:
            self._jobs = iter(())
            self._ahead.clear()


def _wait_for_streams(transfers: Sequence[Laid]) -> None:
    """Let what the caller has queued for its CUDA buffers come to an end: I/O threads use streams of their own."""
    for device in {transfer.buffers[0].device for transfer in transfers if transfer.cuda}:
        torch.cuda.current_stream(device).synchronize()
