"""One record in host memory while it is read: where it lies, the digests of its extents, and how many read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.storage_backends.extents import copy_verified, copy_with_digests, ranges_within, verified
from kvtier.storage_backends.host_arena import Place
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ReadRequest, Record

__all__ = ["HostEntry", "fill"]


@dataclass(slots=True, eq=False)
class HostEntry:
    """A record that somebody reads. Its place outlives its removal for as long as they do.

    Attributes
    ----------
    row : int
        Its row in the index, unless it was removed.
    """

    row: int
    place: Place
    views: list[ByteRows]
    payload_bytes: int
    digests: bytes
    readers: int = 0
    removed: bool = False

    def moved(self, place: Place) -> None:
        """Say where it lies now; whoever reads it already goes on where it was."""
        self.place, self.views = place, place.views

    def read(self, views: Sequence[ByteRows], request: ReadRequest) -> bool | None:
        """Copy bytes out: True when they are right, False when they are not, None when they were never there."""
        ranges = ranges_within(request, self.payload_bytes)
        if ranges is None:
            return None
        return copy_verified(views, self.digests, self.payload_bytes, ranges, request.into.numpy())

    def verified(self, views: Sequence[ByteRows], start: int, stop: int) -> bool:
        """Whether the extents that begin from ``start`` up to ``stop`` are what they were, where they lie."""
        return verified(views, self.digests, start, stop)


def fill(place: Place, record: Record) -> bytes:
    """Copy a payload to its place; the digests of its extents."""
    sources = [buffer.numpy() for buffer in record.buffers]
    return copy_with_digests(sources, place.views, record.payload_bytes)
