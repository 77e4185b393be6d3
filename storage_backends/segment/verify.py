"""Every byte of a segment directory checked, and what is in it: what `kvtier verify` and `kvtier inspect` stand on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.record_table import NOWHERE, IndexArray
from kvtier.storage_backends.segment.journal import Journal
from kvtier.storage_backends.segment.reader import Found
from kvtier.storage_backends.segment.reading import pin_rows, put_aside, unpin
from kvtier.storage_backends.segment.recovery import Progress
from kvtier.storage_backends.segment.rows import Rows, record_bytes

__all__ = ["HotRecord", "Share", "StoreSummary", "VerifyReport", "summarise", "verify_records"]

_BATCH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a check of all records found.

    Parameters
    ----------
    records, checked_bytes : int
        Live records that were checked, and their bytes on the medium.
    damaged : tuple of bytes
        Keys of those whose bytes are not what was written.
    failed : tuple of bytes
        Keys of those that the medium does not give.
    lost_segments, restored_segments : tuple of str
        Segments whose superblocks are damaged; see `RecoveryReport`.
    torn : int
        Records that were not complete when the directory was opened.
    rebuilt : bool
        The index was missing or damaged and everything was found by looking through the segments.
    seconds : float
    """

    records: int
    checked_bytes: int
    damaged: tuple[bytes, ...]
    failed: tuple[bytes, ...]
    lost_segments: tuple[str, ...] = ()
    restored_segments: tuple[str, ...] = ()
    torn: int = 0
    rebuilt: bool = False
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; a torn record is no damage, it was never promised."""
        return not (self.damaged or self.failed or self.lost_segments or self.restored_segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a tenant or namespace has: ``name`` is its UTF-8, or the hexadecimal digest."""

    name: str
    records: int
    live_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HotRecord:
    """A record that is read often."""

    key: bytes
    hits: int
    live_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSummary:
    """What a directory holds; ``oldest`` and ``newest`` in seconds since the epoch, 0 when there is nothing."""

    records: int
    live_bytes: int
    tenants: tuple[Share, ...]
    namespaces: tuple[Share, ...]
    hottest: tuple[HotRecord, ...]
    oldest: float = 0.0
    newest: float = 0.0


def verify_records(journal: Journal, progress: Progress | None) -> VerifyReport:
    """Read and verify every live record, in the order of the medium; what is damaged is put aside."""
    start = time.perf_counter()
    catalog = journal.catalog
    with catalog.lock:
        rows = catalog.table.live()
        at = catalog.table.at[rows]
        rows = rows[np.lexsort((at["block"], at["segment"]))]
        sizes = record_bytes(catalog.table.at[rows])
    total, done = int(sizes.sum()), 0
    wrong: dict[Found, list[bytes]] = {Found.RIGHT: [], Found.DAMAGED: [], Found.FAILED: []}
    memory = empty_aligned(0)
    for batch, size in _batches(rows, sizes):
        memory = memory if memory.numel() >= size else empty_aligned(size)
        for key, found in _verify_batch(journal, batch, memory):
            wrong[found].append(key)
        done += size
        if progress is not None:
            progress(min(done, total), total)
    return VerifyReport(
        records=int(rows.size),
        checked_bytes=total,
        damaged=tuple(wrong[Found.DAMAGED]),
        failed=tuple(wrong[Found.FAILED]),
        seconds=time.perf_counter() - start,
    )


def summarise(journal: Journal, hottest: int) -> StoreSummary:
    """Add up what is known of the live records, and name the ``hottest``; no I/O."""
    catalog = journal.catalog
    with catalog.lock:
        live = catalog.rows(catalog.table.live())
        tenants = [value.decode() for value in catalog.tenants.values]
        namespaces = [value.hex() for value in catalog.namespaces.values]
    at, sizes = live["at"], record_bytes(live["at"])
    hot = np.argsort(-at["hits"].astype(np.int64), kind="stable")[:hottest]
    return StoreSummary(
        records=len(live),
        live_bytes=int(sizes.sum()),
        tenants=_shares(at["tenant"], sizes, tenants),
        namespaces=_shares(at["namespace"], sizes, namespaces),
        hottest=tuple(
            HotRecord(key=live["key"][row].tobytes(), hits=int(at["hits"][row]), live_bytes=int(sizes[row]))
            for row in hot.tolist()
            if at["hits"][row]
        ),
        oldest=float(at["created"].min()) if len(live) else 0.0,
        newest=float(at["created"].max()) if len(live) else 0.0,
    )


def _batches(rows: IndexArray, sizes: IndexArray) -> Iterator[tuple[IndexArray, int]]:
    """Rows in batches of bounded memory, with the bytes of each."""
    numbers = np.cumsum(sizes) // _BATCH_BYTES
    for number in np.unique(numbers):
        yield rows[numbers == number], int(sizes[numbers == number].sum())


def _verify_batch(journal: Journal, rows: IndexArray, memory: torch.Tensor) -> list[tuple[bytes, Found]]:
    """Read records whole, headers from the medium too; those that are not right."""
    catalog = journal.catalog
    with catalog.lock:
        rows = rows[catalog.table.at["segment"][rows] != NOWHERE]
        pinned = pin_rows(catalog, journal.pool, rows)
        fetches = journal.fetches_of(catalog.rows(rows), memory)
    try:
        for fetch in fetches:
            journal.headers.forget(fetch.place)
        journal.read(fetches)
    finally:
        unpin(catalog, pinned)
    outcomes = [fetch.outcome() for fetch in fetches]
    put_aside(journal, fetches, outcomes)
    return [(fetch.key, found) for fetch, found in zip(fetches, outcomes, strict=True) if found is not Found.RIGHT]


def _shares(numbers: Rows, sizes: IndexArray, names: list[str]) -> tuple[Share, ...]:
    """Records and bytes by number, the largest first."""
    values, where, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    sums = np.bincount(where, weights=sizes, minlength=values.size).astype(np.int64)
    shares = [
        Share(name=names[value], records=count, live_bytes=size)
        for value, count, size in zip(values.tolist(), counts.tolist(), sums.tolist(), strict=True)
    ]
    return tuple(sorted(shares, key=lambda share: -share.live_bytes))
