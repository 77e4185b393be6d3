"""The POSIX engine: preadv and pwritev in a pool of threads, straight into aligned buffers, the default everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kvtier.errors import ConfigError, InputError
from kvtier.storage_backends.engines.base import EngineCapabilities, EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.batch import Batch, Move
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.engines.plan import Job, SizeLimits, plan
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES, DirectVerdict, PosixFile, open_named
from kvtier.storage_backends.memory import round_up

__all__ = ["DEFAULT_THREADS", "PosixEngine"]

DEFAULT_THREADS = 8

_LEAST_JOB_BYTES = 512 << 10
_MOST_JOB_BYTES = 8 << 20
_BOUNCE_BYTES = 1 << 20


class PosixEngine(IOEngine):
    """Vectored system calls in several threads, the interpreter lock released while they run.

    Parameters
    ----------
    threads : int
        Most system calls under way at once for one call: the queue depth that the disk sees.

    Notes
    -----
    Any thread may call anything; the calling thread works too, so a busy pool never holds up a call. Adjacent transfers
    share a system call, a large transfer is cut so that several threads share it. Bytes that are not aligned for direct
    I/O, and CUDA tensors, are copied through buffers of 1 MiB, one for each system call under way; the calling thread's
    CUDA stream is waited for first. Writes of one batch must not overlap.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, *, note: str = "") -> None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        self._threads = threads
        self._note = note
        self._pool = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kvtier-io")
        self._bounce = BouncePool(_BOUNCE_BYTES, threads)
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

    def read(self, transfers: Sequence[Transfer], then: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Fill the buffers; ``then(i)`` runs in the thread that read the last piece of transfer i."""
        batch = Batch(transfers, after=then)
        return self._run(batch, lambda job: self._read(job, transfers))

    def write(self, transfers: Sequence[Transfer], before: Callable[[int], None] | None = None) -> list[OSError | None]:
        """Write the buffers; ``before(i)`` runs in the thread that writes the first piece of transfer i."""
        batch = Batch(transfers, before=before)
        return self._run(batch, lambda job: self._write(job, transfers))

    def capabilities(self) -> EngineCapabilities:
        """CUDA buffers pass through host memory here."""
        return EngineCapabilities(name="posix", cuda_buffers=torch.cuda.is_available(), note=self._note)

    def close(self) -> None:
        """Wait for transfers and stop the threads."""
        if self._gate.shut():
            self._pool.shutdown(wait=True)
            self._bounce.clear()

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

    def _run(self, batch: Batch, move: Move) -> list[OSError | None]:
        """Cut the batch into jobs and carry them out."""
        transfers = batch.transfers
        for file in {id(transfer.file): transfer.file for transfer in transfers}.values():
            _own(file)
        limits = SizeLimits.share(
            batch.total,
            self._threads,
            least=_LEAST_JOB_BYTES,
            most=_MOST_JOB_BYTES,
            bounced=_BOUNCE_BYTES - 2 * BLOCK_BYTES,
        )
        with self._gate:
            return batch.run(plan(transfers, limits), move, self._pool, self._threads)

    def _read(self, job: Job, transfers: Sequence[Transfer]) -> None:
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

    def _write(self, job: Job, transfers: Sequence[Transfer]) -> None:
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


def _views(job: Job, transfers: Sequence[Transfer]) -> list[memoryview]:
    """The parts of a job where they lie."""
    return [transfers[part.transfer].buffer.numpy()[part.start : part.stop].data for part in job.parts]


def _scatter(bytes_read: torch.Tensor, job: Job, transfers: Sequence[Transfer]) -> None:
    """Copy adjacent bytes to the buffers that want them."""
    at = 0
    for index, start, stop in job.parts:
        _copy(bytes_read[at : at + stop - start], transfers[index].buffer[start:stop])
        at += stop - start


def _gather(into: torch.Tensor, job: Job, transfers: Sequence[Transfer]) -> None:
    """Copy what the buffers hold next to each other."""
    at = 0
    for index, start, stop in job.parts:
        _copy(transfers[index].buffer[start:stop], into[at : at + stop - start])
        at += stop - start


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy bytes within the host in this thread alone, or from or to a device, complete on return."""
    if source.is_cuda or target.is_cuda:
        target.copy_(source)
        torch.cuda.current_stream(source.device if source.is_cuda else target.device).synchronize()
    else:
        np.copyto(target.numpy(), source.numpy())
