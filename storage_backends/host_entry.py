"""One record in host memory: where it lies, the digests of its extents, and who is reading it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.storage_backends.extents import copy_verified, copy_with_digests, digest_bytes, ranges_within, verified
from kvtier.storage_backends.host_arena import Place
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.records import ReadRequest, Record, RecordInfo

__all__ = ["HostEntry", "index_bytes", "info_of"]

_ENTRY_BYTES = 1152  # what Python keeps for a record, beside its digests and metadata


@dataclass(slots=True, eq=False)
class HostEntry:
    """A record in memory. Its place outlives its removal for as long as somebody reads it."""

    info: RecordInfo
    place: Place
    digests: bytes = b""
    hits: int = 0
    readers: int = 0
    removed: bool = False

    def fill(self, record: Record) -> None:
        """Copy the payload in and digest it."""
        sources = [buffer.numpy() for buffer in record.buffers]
        self.digests = copy_with_digests(sources, self.place.views, self.info.payload_bytes)

    def read(self, views: Sequence[ByteRows], request: ReadRequest) -> bool | None:
        """Copy bytes out: True when they are right, False when they are not, None when they were never there."""
        ranges = ranges_within(request, self.info.payload_bytes)
        if ranges is None:
            return None
        return copy_verified(views, self.digests, self.info.payload_bytes, ranges, request.into.numpy())

    def verified(self, views: Sequence[ByteRows], start: int, stop: int) -> bool:
        """Whether the extents that begin from ``start`` up to ``stop`` are what they were, where they lie."""
        return verified(views, self.digests, start, stop)

    @property
    def index_bytes(self) -> int:
        """What the index takes for it."""
        return index_bytes(self.info)

    @property
    def held_bytes(self) -> int:
        """What it takes in all, padding included."""
        return self.place.nbytes + self.index_bytes


def index_bytes(info: RecordInfo) -> int:
    """What the index takes for a record."""
    return _ENTRY_BYTES + digest_bytes(info.payload_bytes) + len(info.meta)


def info_of(record: Record) -> RecordInfo:
    """What will be known of a record once it is stored; its sequence number comes then."""
    return RecordInfo(
        key=record.key,
        namespace=record.namespace,
        tenant=record.tenant,
        payload_bytes=record.payload_bytes,
        meta=record.meta,
        sequence=0,
        created=time.time(),
    )
