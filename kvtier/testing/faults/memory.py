"""Damage of records in host memory: where their bytes lie."""

from __future__ import annotations

from kvtier.storage_backends.host_records import HostRecords
from kvtier.storage_backends.memory import ByteRows

__all__ = ["host_memory"]


def host_memory(store: HostRecords, key: bytes) -> list[ByteRows]:
    """The memory of a record that is there, in order, with what pads its end; to be written to by a test."""
    index = store._index  # noqa: SLF001 - damage is done behind a store's back
    (row,) = index.find([key]).tolist()
    return index.place(row).views
