"""How a batch of transfers becomes system calls: neighbours merged, large ones cut, each alignment by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvtier.storage_backends.engines.base import EngineFile, Transfer
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES, MAX_VECTORS
from kvtier.storage_backends.memory import round_up

__all__ = ["Job", "Part", "SizeLimits", "plan"]


_SMALL_BYTES = 16 << 10


class Part(NamedTuple):
    """Bytes ``start`` to ``stop`` of the buffer of a transfer, by its place in the batch."""

    transfer: int
    start: int
    stop: int


class Job(NamedTuple):
    """Adjacent bytes of a file from ``offset`` on, which one thread transfers.

    ``straight``: between the file and the buffers themselves; if not, by way of a bounce buffer.
    """

    file: EngineFile
    offset: int
    parts: list[Part]
    straight: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.stop - part.start for part in self.parts)

    def single(self) -> list[Job]:
        """The same bytes, each part by itself."""
        jobs, offset = [], self.offset
        for part in self.parts:
            jobs.append(self._replace(offset=offset, parts=[part]))
            offset += part.stop - part.start
        return jobs


class SizeLimits(NamedTuple):
    """Most bytes of a straight and of a bounced job; multiples of 4096."""

    straight: int
    bounced: int

    @classmethod
    def share(cls, total: int, threads: int, *, least: int, most: int, bounced: int) -> SizeLimits:
        """Sizes that give every thread its share of ``total`` bytes, as long as the shares are worth a call."""
        straight = min(most, max(least, round_up(-(-total // threads), BLOCK_BYTES)))
        return cls(straight, min(straight, bounced))


def plan(transfers: Sequence[Transfer], limits: SizeLimits) -> Iterator[Job]:
    """Jobs that cover every byte of every transfer once, in the order of the file.

    A cut lies at a multiple of 4096 in the file, so that no block is shared by two pieces of one transfer. Small ones
    that could go straight are bounced with their neighbours: a copy costs less than a system call of its own.
    """
    job: Job | None = None
    room, end = 0, 0  # bytes that the job still takes, and where it ends
    for _, _, index in sorted([(id(file), offset, at) for at, (file, offset, _) in enumerate(transfers)]):
        file, offset, buffer = transfers[index]
        size = buffer.numel()
        straight = not buffer.is_cuda and (not file.direct or not (offset | size | buffer.data_ptr()) % BLOCK_BYTES)
        limit = limits.straight if straight else limits.bounced
        start = 0
        while start < size:
            stop = size
            if size - start > limit:
                stop = (offset + start + limit) // BLOCK_BYTES * BLOCK_BYTES - offset
            if job is not None and end == offset + start and job.file is file:
                if job.straight and not straight and limits.straight - room <= _SMALL_BYTES:
                    room -= limits.straight - limits.bounced
                    job = job._replace(straight=False)
                joins = job.straight == straight or (not job.straight and size <= _SMALL_BYTES)
            else:
                joins = False
            if job is not None and joins and stop - start <= room and len(job.parts) < MAX_VECTORS:
                job.parts.append(Part(index, start, stop))
            else:
                if job is not None:
                    yield job
                job = Job(file, offset + start, [Part(index, start, stop)], straight)
                room = limit
            room -= stop - start
            start = stop
            end = offset + stop
    if job is not None:
        yield job
