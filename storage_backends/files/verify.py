"""Every byte of the records in a directory checked, and what is in it: the counterpart of `segment.verify`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from kvtier.storage_backends.files.reading import Reader
from kvtier.storage_backends.files.shelf import Shelf
from kvtier.storage_backends.records import RecordInfo
from kvtier.storage_backends.segment.reader import Found
from kvtier.storage_backends.segment.recovery import Progress
from kvtier.storage_backends.segment.verify import Share, StoreSummary, VerifyReport

__all__ = ["summarise_files", "verify_files"]

_BATCH_BYTES = 32 << 20


def verify_files(shelf: Shelf, reader: Reader, progress: Progress | None) -> VerifyReport:
    """Read and verify every record; what is damaged is put aside, what other processes remove meanwhile left out."""
    start = time.perf_counter()
    shelf.refresh()
    with shelf.lock:
        sizes = {key: entry.held for key, entry in shelf.table.items()}
    total = sum(sizes.values())
    records, checked, done = 0, 0, 0
    wrong: dict[Found, list[bytes]] = {found: [] for found in Found}
    for batch in _batches(sizes):
        for key, found in reader.verify(batch).items():
            wrong[found].append(key)
            records += 1
            checked += sizes[key]
        done += sum(sizes[key] for key in batch)
        if progress is not None:
            progress(done, total)
    return VerifyReport(
        records=records,
        checked_bytes=checked,
        damaged=tuple(wrong[Found.DAMAGED]),
        failed=tuple(wrong[Found.FAILED]),
        seconds=time.perf_counter() - start,
    )


def summarise_files(shelf: Shelf, infos: Iterable[RecordInfo]) -> StoreSummary:
    """Add up records by their headers; how often each was read is not kept in files, so none is the hottest."""
    tenants: dict[str, tuple[int, int]] = {}
    namespaces: dict[str, tuple[int, int]] = {}
    created = []
    for info in infos:
        with shelf.lock:
            entry = shelf.table.get(info.key)
        if entry is None:
            continue
        created.append(info.created)
        for shares, name in ((tenants, info.tenant), (namespaces, info.namespace.hex())):
            records, live = shares.get(name, (0, 0))
            shares[name] = (records + 1, live + entry.held)
    return StoreSummary(
        records=len(created),
        live_bytes=sum(live for _, live in tenants.values()),
        tenants=_shares(tenants),
        namespaces=_shares(namespaces),
        hottest=(),
        oldest=min(created, default=0.0),
        newest=max(created, default=0.0),
    )


def _batches(sizes: dict[bytes, int]) -> Iterator[Sequence[bytes]]:
    """Keys in batches of bounded memory."""
    batch: list[bytes] = []
    held = 0
    for key, size in sizes.items():
        batch.append(key)
        held += size
        if held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _shares(counts: dict[str, tuple[int, int]]) -> tuple[Share, ...]:
    """The largest first."""
    shares = [Share(name=name, records=records, live_bytes=live) for name, (records, live) in counts.items()]
    return tuple(sorted(shares, key=lambda share: -share.live_bytes))
