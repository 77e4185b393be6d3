"""The machine's own limits: how fast it reads memory, and how fast it copies."""

from __future__ import annotations

import torch

from benchmarks.timing import Competitor

__all__ = ["COPY", "READ", "Streams"]

_CPU = torch.device("cpu")

READ = "read stream"
COPY = "copy stream"


class Streams:
    """A buffer several times the caches, read and copied as fast as torch can.

    Parameters
    ----------
    nbytes : int
        Bytes read by the read stream; the copy stream copies half of them onto the other half.
    flush_bytes : int
        Bytes that ``flush`` reads, at least twice the last-level cache.
    device : torch.device
        Whose memory.
    """

    def __init__(self, nbytes: int, flush_bytes: int, device: torch.device = _CPU) -> None:
        self._buffer = torch.rand(nbytes // 8 * 2, device=device)
        self._flushed = self._buffer[: flush_bytes // 4]
        self._halves = self._buffer.chunk(2)

    def flush(self) -> None:
        """Leave nothing useful in the caches."""
        self._flushed.sum()

    @property
    def competitors(self) -> list[Competitor]:
        """The read stream and the copy stream."""
        target, source = self._halves
        return [
            Competitor(READ, lambda _: self._buffer.sum),
            Competitor(COPY, lambda _: lambda: target.copy_(source)),
        ]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes read by one, bytes copied by the other."""
        return {READ: self._buffer.nbytes, COPY: self._halves[0].nbytes}
