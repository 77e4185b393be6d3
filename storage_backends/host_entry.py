"""One record in host memory while it is read: where it lies, the digests of its extents, and how many read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvtier.storage_backends.extents import EXTENT_BYTES, VerifiedCopy, copy_with_digests, ranges_within, verified
from kvtier.storage_backends.host_arena import Place
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ReadRequest, Record, RecordView

__all__ = ["HostEntry", "copying", "fill"]


@dataclass(slots=True, eq=False)
class HostEntry:
    """A record that somebody reads. Its memory outlives its removal for as long as they do.

    Attributes
    ----------
    row : int
        Its row in the index, unless it was removed.
    views : list of ByteRows
        Its memory now; whoever reads it already goes on where it was.
    left : Place, optional
        Where it lay when it was removed; the last reader gives it back.
    """

    row: int
    views: list[ByteRows]
    payload_bytes: int
    digests: bytes
    readers: int = 0
    left: Place | None = None

    def view(self) -> RecordView:
        """The payload where it lies now, in one piece."""
        views = self.views
        payload = torch.from_numpy(views[0][: self.payload_bytes])
        return RecordView(payload, partial(verified, views, self.digests), EXTENT_BYTES)


def fill(place: Place, record: Record) -> bytes:
    """Copy a payload to its place; the digests of its extents."""
    sources = [buffer.numpy() for buffer in record.buffers]
    return copy_with_digests(sources, place.views, record.payload_bytes)


def copying(entry: HostEntry | None, request: ReadRequest) -> Callable[[], bool | None]:
    """The copy that a request asks for, out of where the record lies now: it says whether the bytes were right.

    It says None when they were never there.
    """
    ranges = None if entry is None else ranges_within(request, entry.payload_bytes)
    if entry is None or ranges is None:
        return _nothing
    return VerifiedCopy(entry.views, entry.digests, entry.payload_bytes, ranges, request.into.numpy()).run


def _nothing() -> None:
    """Copy what was never there."""
