"""The POSIX engine: direct transfers in a queue of the kernel, others in a pool of threads; the default everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kvtier.errors import ConfigError, InputError
from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.batch import Batch, Move
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.engines.feed import Feed
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.engines.kernel_queue import READ, WRITE, QueuePool, Verb
from kvtier.storage_backends.engines.laid import Laid
from kvtier.storage_backends.engines.plan import Job, SizeLimits, plan
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES, DirectVerdict, PosixFile, open_named
from kvtier.storage_backends.memory import round_up

__all__ = ["DEFAULT_THREADS", "PosixEngine"]

DEFAULT_THREADS = 16
"""Random reads of 64 KiB measured faster with 16 under way than with 8; from 1 MiB on it made no difference."""

_LEAST_JOB_BYTES = 512 << 10
_MOST_JOB_BYTES = 8 << 20
_LEAST_QUEUED_BYTES = 256 << 10
_MOST_QUEUED_BYTES = (2 << 20) + (64 << 10)
"""Of one job; a little more than two megabytes, so that two records of one find room with what lies between them."""

_WRITES = 8
"""Jobs of one call, where that leaves them large enough: what a header says is worked out for one job at a time."""

_BOUNCE_BYTES = 1 << 20
_MOST_BOUNCED_BYTES = _BOUNCE_BYTES - 2 * BLOCK_BYTES


class PosixEngine(IOEngine):
    """Direct transfers in a queue of the kernel, which one thread fills and empties; all others in several threads.

    Parameters
    ----------
    threads : int
        Most transfers under way at once for one call: the queue depth that the disk sees.

    Notes
    -----
    Any thread may call anything. Threads that wait for the disk must be woken one by one, which on few cores costs more
    than the transfer of 64 KiB; a queue needs none. Its hooks run in the calling thread, while the disk works on.
    Through the page cache, and where the kernel refuses a queue, system calls run in threads, the calling one among
    them. Adjacent transfers are one, large ones are cut. Bytes that are not aligned for direct I/O, and CUDA tensors,
    are copied in threads through buffers of 1 MiB; the calling thread's CUDA stream is waited for first. Writes of one
    batch must not overlap.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, *, note: str = "") -> None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        self._threads = threads
        self._note = note
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kvtier-io")
        self._bounce = BouncePool(_BOUNCE_BYTES, threads)
        self._queues = QueuePool(threads)
        self._gate = Gate("the I/O engine")
        self._verdicts: dict[int, DirectVerdict] = {}

    def open(self, path: Path, *, writable: bool, create: bool = False) -> PosixFile:
        """Open a file, directly where a trial on its file system passed."""
        with self._gate:
            file = open_named(path, writable=writable, create=create)
            try:
                self._make_direct(file, writable=writable)
            except BaseException:
                file.close()
                raise
            return file

    def read(self, transfers: Iterable[Transfer], then: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Fill the buffers; ``then(i)`` runs in the thread that read the last piece of transfer i."""
        batch = Batch(transfers, after=then)
        return self._run(batch, READ, lambda job: self._read(job, batch.transfers))

    def write(self, transfers: Iterable[Transfer], before: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Write the buffers; ``before(i)`` runs in the thread that writes the first piece of transfer i."""
        batch = Batch(transfers, before=before)
        return self._run(batch, WRITE, lambda job: self._write(job, batch.transfers))

    def capabilities(self) -> EngineCapabilities:
        """CUDA buffers pass through host memory here."""
        return EngineCapabilities(name="posix", cuda_buffers=torch.cuda.is_available(), note=self._note)

    def close(self) -> None:
        """Wait for transfers and stop the threads."""
        if self._gate.shut():
            self._pool.shutdown(wait=True)
            self._bounce.clear()
            self._queues.close()

    def _make_direct(self, file: PosixFile, *, writable: bool) -> None:
        """Switch the file to direct I/O; the trial runs once for each file system."""
        verdict = self._verdicts.get(file.device)
        if verdict is not None:
            file.take_verdict(verdict)
            return
        scratch = writable and not file.size
        if not scratch and file.size < BLOCK_BYTES:
            return  # too small for a trial, and for direct I/O to matter
        try:
            file.try_direct(scratch=scratch)
        finally:
            if scratch:
                file.truncate(0)
        self._verdicts[file.device] = file.verdict

    def _run(self, batch: Batch, verb: Verb, move: Move) -> list[OSError | None]:
        """Carry the batch out, in a queue where its files bypass the page cache and the kernel has one."""
        files = [_own(file) for file in {id(one.file): one.file for one in batch.transfers}.values()]
        with self._gate:
            queue = self._queues.take() if all(file.direct for file in files) else None
            if queue is None:
                if verb is READ:
                    batch.draw_all()
                return batch.run(_shared(batch, self._threads), move, self._pool, self._threads)
            try:
                batch.begin()
                Feed(batch, queue, verb, move, self._pool).run(_queued(batch, verb))
                return batch.results()
            finally:
                self._queues.give(queue)

    def _read(self, job: Job, transfers: Sequence[Laid]) -> None:
        file = _own(job.file)
        if job.straight:
            file.read_at(_views(job, transfers), job.offset)
            return
        first = job.offset // BLOCK_BYTES * BLOCK_BYTES
        skipped = job.offset - first
        needed = skipped + job.nbytes
        with self._bounce.buffer() as bounce:
            whole = bounce[: round_up(needed, BLOCK_BYTES)].numpy().data
            file.read_blocks(whole, first, needed)
            _scatter(bounce[skipped:needed], job, transfers)

    def _write(self, job: Job, transfers: Sequence[Laid]) -> None:
        file = _own(job.file)
        if job.straight:
            file.write_at(_views(job, transfers), job.offset)
            return
        # The bytes lie in the bounce buffer as they will in their first block, so that whole blocks are aligned there.
        skipped = job.offset % BLOCK_BYTES
        end = skipped + job.nbytes
        with self._bounce.buffer() as bounce:
            _gather(bounce[skipped:end], job, transfers)
            file.write_span(bounce[:end].numpy().data, job.offset - skipped, skipped)


def _own(file: EngineFile) -> PosixFile:
    """The file, which this engine must have opened."""
    if not isinstance(file, PosixFile):
        raise InputError(f"required a file that this engine opened, got {type(file).__name__}; open it with this one")
    return file


def _shared(batch: Batch, threads: int) -> Iterator[Job]:
    """Jobs for threads: a share for each, where it is known what there is."""
    least, most, bounced = _LEAST_JOB_BYTES, _MOST_JOB_BYTES, _MOST_BOUNCED_BYTES
    if batch.drawn:
        limits = SizeLimits.growing(least=least, most=most, bounced=bounced)
    else:
        limits = SizeLimits.share(batch.total, threads, least=least, most=most, bounced=bounced)
    return plan(batch.transfers, batch.order(), limits)


def _queued(batch: Batch, verb: Verb) -> Iterator[Job]:
    """Jobs for a queue; at first small ones."""
    least, most, bounced = _LEAST_QUEUED_BYTES, _MOST_QUEUED_BYTES, _MOST_BOUNCED_BYTES
    if verb is READ or batch.drawn:
        yield from plan(batch.transfers, batch.order(), SizeLimits.growing(least=least, most=most, bounced=bounced))
        return
    most = min(most, max(least, round_up(batch.total // _WRITES, BLOCK_BYTES)))
    limits = SizeLimits.shrinking(batch.total, least=least, most=most, bounced=bounced)
    # From the end: what a header says of the bytes behind it is worked out while those are under way.
    yield from reversed(list(plan(batch.transfers, batch.order(), limits)))


def _views(job: Job, transfers: Sequence[Laid]) -> list[memoryview]:
    """The parts of a job where they lie."""
    views = []
    for index, start, stop in job.parts:
        for buffer, low, high in transfers[index].spans(start, stop):
            view = buffer.numpy().data
            views.append(view if high - low == view.nbytes else view[low:high])
    return views


def _scatter(bytes_read: torch.Tensor, job: Job, transfers: Sequence[Laid]) -> None:
    """Copy adjacent bytes to the buffers that want them."""
    at = 0
    for index, start, stop in job.parts:
        for buffer, low, high in transfers[index].spans(start, stop):
            _copy(bytes_read[at : at + high - low], buffer[low:high])
            at += high - low


def _gather(into: torch.Tensor, job: Job, transfers: Sequence[Laid]) -> None:
    """Copy what the buffers hold next to each other."""
    at = 0
    for index, start, stop in job.parts:
        for buffer, low, high in transfers[index].spans(start, stop):
            _copy(buffer[low:high], into[at : at + high - low])
            at += high - low


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy bytes within the host in this thread alone, or from or to a device, complete on return."""
    if source.is_cuda or target.is_cuda:
        target.copy_(source)
        torch.cuda.current_stream(source.device if source.is_cuda else target.device).synchronize()
    else:
        np.copyto(target.numpy(), source.numpy())
