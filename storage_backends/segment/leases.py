"""Leases: who holds which records, and until when. Nothing is counted, so nothing can be counted wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from kvtier.storage_backends.record_table import NOWHERE, IndexArray, RecordTable
from kvtier.storage_backends.records import Lease

__all__ = ["LeaseBook", "SegmentLease"]


class SegmentLease(Lease):
    """Records of a segment store that stay, by row and sequence number: a deleted record is not held by its lease."""

    def __init__(
        self, owner: str, keys: tuple[bytes, ...], deadline: float, rows: IndexArray, sequences: IndexArray,
        forget: Callable[[SegmentLease], None],
    ) -> None:  # fmt: skip
        self.owner = owner
        self.keys = keys
        self.deadline = deadline
        self.rows = rows
        self.sequences = sequences
        self._forget = forget

    def release(self) -> None:
        """Let the records go."""
        self._forget(self)


class LeaseBook:
    """All leases that were given out and not released. The owner of the table holds ``lock`` around `leased_rows`."""

    def __init__(self, table: RecordTable, lock: threading.RLock) -> None:
        self._table = table
        self._lock = lock
        self._leases: set[SegmentLease] = set()

    def grant(self, owner: str, keys: tuple[bytes, ...], seconds: float, rows: IndexArray) -> SegmentLease:
        """Hold the records in ``rows``, one for each key."""
        sequences = self._table.at["sequence"][rows].astype(np.int64)
        lease = SegmentLease(owner, keys, time.monotonic() + seconds, rows, sequences, self._forget)
        if rows.size:
            self._leases.add(lease)
        return lease

    def leased_rows(self) -> IndexArray:
        """Rows under a lease that holds, each once; those that ran out are forgotten."""
        now = time.monotonic()
        self._leases = {lease for lease in self._leases if lease.deadline > now}
        held = [np.empty(0, dtype=np.int64)]
        for lease in self._leases:
            at = self._table.at[lease.rows]
            held.append(lease.rows[(at["sequence"] == lease.sequences) & (at["segment"] != NOWHERE)])
        return np.unique(np.concatenate(held))

    def _forget(self, lease: SegmentLease) -> None:
        with self._lock:
            self._leases.discard(lease)
