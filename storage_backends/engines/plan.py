"""How a batch of transfers becomes system calls: neighbours merged, large ones cut, each alignment by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from kvtier.storage_backends.engines.base import EngineFile
from kvtier.storage_backends.engines.laid import Laid
from kvtier.storage_backends.engines.posix_file import BLOCK_BYTES, MAX_VECTORS
from kvtier.storage_backends.memory import round_up

__all__ = ["Job", "Part", "SizeLimits", "in_order", "plan"]


_SMALL_BYTES = 16 << 10


class Part(NamedTuple):
    """Bytes ``start`` to ``stop`` of a transfer, by its place in the batch."""

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
    """Most bytes of a straight job, by the bytes planned before it, and of a bounced one; multiples of 4096."""

    straight: Callable[[int], int]
    bounced: int

    @classmethod
    def share(cls, total: int, threads: int, *, least: int, most: int, bounced: int) -> Self:
        """Sizes that give every thread its share of ``total`` bytes, as long as the shares are worth a call."""
        straight = min(most, max(least, round_up(-(-total // threads), BLOCK_BYTES)))
        return cls(lambda _: straight, min(straight, bounced))

    @classmethod
    def growing(cls, *, least: int, most: int, bounced: int) -> Self:
        """Small jobs first, so that the disk has something to do early, then larger ones, which cost less."""
        return cls(lambda planned: min(most, max(least, planned // 2 // BLOCK_BYTES * BLOCK_BYTES)), bounced)

    @classmethod
    def shrinking(cls, total: int, *, least: int, most: int, bounced: int) -> Self:
        """The same from the end."""
        return cls(lambda at: min(most, max(least, (total - at) // 3 // BLOCK_BYTES * BLOCK_BYTES)), bounced)


def in_order(transfers: Sequence[Laid]) -> list[int]:
    """Places of the transfers in a batch, in the order of their files."""
    return sorted(range(len(transfers)), key=lambda at: (id(transfers[at].file), transfers[at].offset))


def plan(transfers: Sequence[Laid], order: Iterable[int], limits: SizeLimits) -> Iterator[Job]:
    """Jobs that cover every byte of every transfer once, as they come in ``order``, which is drawn as it is needed.

    Those that follow one another in a file join. A cut lies at a multiple of 4096 in the file, so that no block is
    shared by two pieces of one transfer. Small ones that could go straight are bounced with their neighbours: a copy
    costs less than a system call of its own.
    """
    job: Job | None = None
    room, end = 0, 0  # bytes that the job still takes, and where it ends
    vectors = 0  # of the job, at most
    planned, most = 0, limits.straight(0)  # bytes of jobs so far, and what a straight one may have
    for index in order:
        file, offset, buffers, size, cuda, aligned, _ = transfers[index]
        straight = not cuda and (aligned or not file.direct)
        start = 0
        while start < size:
            stop, limit = size, most if straight else min(most, limits.bounced)
            if size - start > limit:
                stop = (offset + start + limit) // BLOCK_BYTES * BLOCK_BYTES - offset
            joins = job is not None and end == offset + start and job.file is file
            if job is not None and joins:
                if job.straight and not straight and most - room <= _SMALL_BYTES:
                    room -= most - limit
                    job = job._replace(straight=False)
                joins = job.straight == straight or (not job.straight and size <= _SMALL_BYTES)
            if job is not None and joins and stop - start <= room and vectors + len(buffers) <= MAX_VECTORS:
                job.parts.append(Part(index, start, stop))
                vectors += len(buffers)
            elif job is not None:
                yield job
                job, most = None, limits.straight(planned)
                continue  # cut anew, by the size of the next job
            else:
                job, room = Job(file, offset + start, [Part(index, start, stop)], straight), limit
                vectors = len(buffers)
            room -= stop - start
            planned += stop - start
            start, end = stop, offset + stop
            if not room:  # what follows may be long in coming
                yield job
                job, most = None, limits.straight(planned)
    if job is not None:
        yield job
