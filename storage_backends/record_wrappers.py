"""Record stores around another one: what to build wrappers on, and one that refuses every change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.records import (
    BoolArray,
    Lease,
    PutOutcome,
    PutState,
    ReadRequest,
    Record,
    RecordInfo,
    RecordStats,
    RecordStore,
    RecordView,
)

__all__ = ["ReadOnlyRecords", "WrappedRecords"]


class WrappedRecords(RecordStore):
    """Passes everything on; what to build a wrapper on."""

    def __init__(self, inner: RecordStore) -> None:
        self.inner = inner

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Put into the inner store."""
        return self.inner.put(records)

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Ask the inner store."""
        return self.inner.contains(keys)

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Read from the inner store."""
        return self.inner.read(requests)

    def view(self, keys: Sequence[bytes]) -> AbstractContextManager[Sequence[RecordView]]:
        """View in the inner store."""
        return self.inner.view(keys)

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Lease in the inner store."""
        return self.inner.lease(keys, owner=owner, seconds=seconds)

    def info(self, key: bytes) -> RecordInfo | None:
        """Ask the inner store."""
        return self.inner.info(key)

    def scan(self) -> Iterator[RecordInfo]:
        """Scan the inner store."""
        return self.inner.scan()

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete from the inner store."""
        return self.inner.delete(keys)

    def clear(self, tenant: str | None = None) -> int:
        """Clear the inner store."""
        return self.inner.clear(tenant)

    def stats(self) -> RecordStats:
        """What the inner store counts."""
        return self.inner.stats()

    def capabilities(self) -> Capabilities:
        """What the inner store is."""
        return self.inner.capabilities()

    def flush(self) -> None:
        """Flush the inner store."""
        self.inner.flush()

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()


class ReadOnlyRecords(WrappedRecords):
    """Refuses every change."""

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Refuse what is not there already."""
        return [
            PutOutcome(PutState.EXISTS) if there else PutOutcome(PutState.REFUSED, "the store was opened read-only")
            for there in self.contains([record.key for record in records])
        ]

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget nothing."""
        del keys
        return 0

    def clear(self, tenant: str | None = None) -> int:
        """Forget nothing."""
        del tenant
        return 0
