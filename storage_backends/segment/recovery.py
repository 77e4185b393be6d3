"""What was there: the index as far as it goes, then the segments themselves, and a verdict on every record."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvtier.record import SUPERBLOCK_BYTES, SegmentKind
from kvtier.storage_backends.engines import IOEngine
from kvtier.storage_backends.record_table import KeyArray
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.index import IndexContents
from kvtier.storage_backends.segment.pool import Segment, SegmentPool
from kvtier.storage_backends.segment.rows import GRAVE, ROW, Rows, join_keys, pack_row, rows_of
from kvtier.storage_backends.segment.scan import ScannedRecord, SegmentScan, scan_segment

__all__ = ["Progress", "RecoveryReport", "recover"]

Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread."""

_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryReport:
    """How a directory was opened.

    Parameters
    ----------
    indexed, scanned : int
        Records that the index knew, and that were found in segments.
    scanned_bytes : int
        Bytes that were read for it.
    torn : int
        Records that were not complete and were left out.
    rebuilt : bool
        There was no index to be trusted.
    lost_segments : tuple of str
        Segments that cannot be opened, or whose superblocks are damaged and nothing else says for sure what they hold.
        None of it is served.
    restored_segments : tuple of str
        Segments of which a superblock is damaged and the other, or the index, says the same: nothing is lost.
    """

    indexed: int = 0
    scanned: int = 0
    scanned_bytes: int = 0
    torn: int = 0
    rebuilt: bool = False
    lost_segments: tuple[str, ...] = ()
    restored_segments: tuple[str, ...] = ()


def recover(
    catalog: Catalog, pool: SegmentPool, engine: IOEngine, contents: IndexContents | None, progress: Progress | None
) -> RecoveryReport:
    """Fill the catalogue; afterwards its changes are what the index has to be told."""
    segments = [segment for segment in list(pool.segments.values()) if segment.kind is SegmentKind.CACHE]
    todo: list[tuple[Segment, int]] = []
    for segment in segments:
        mark = contents.marks.get(segment.number) if contents is not None else None
        if contents is None or mark is None or mark.epoch != segment.epoch:
            todo.append((segment, SUPERBLOCK_BYTES))
            catalog.drop_segment(segment.number)
            continue
        segment.cursor, segment.min_sequence = mark.upto, mark.min_sequence
        if not contents.clean:
            todo.append((segment, mark.upto))
    rescanned = {segment.number for segment, start in todo if start == SUPERBLOCK_BYTES}
    if contents is not None:
        _load_names(catalog, contents)
        pool.next_epoch = max(pool.next_epoch, contents.epoch)
    indexed = _indexed_rows(contents, rescanned)
    scans = _scan_all(engine, pool.store, todo, progress)
    scanned = _take_scans(catalog, scans)
    _enter(catalog, indexed, scanned)
    _bury(catalog, contents, scans, rescanned)
    if contents is not None:
        catalog.warm(contents.heat)
    torn = sum(len(scan.torn) for _, _, scan in scans)
    catalog.counters.damaged += torn
    return RecoveryReport(
        indexed=len(indexed),
        scanned=len(scanned),
        scanned_bytes=sum(segment.size - start for segment, start in todo),
        torn=torn,
        rebuilt=contents is None and bool(segments),
    )


def _load_names(catalog: Catalog, contents: IndexContents) -> None:
    catalog.tenants.load(contents.tenants)
    catalog.namespaces.load(contents.namespaces)
    catalog.sequence = max(catalog.sequence, contents.sequence)


def _indexed_rows(contents: IndexContents | None, rescanned: set[int]) -> Rows:
    """Rows of segments that are not read anew; contents has those of present epochs only."""
    if contents is None:
        return np.empty(0, dtype=ROW)
    if not rescanned:
        return contents.rows
    return contents.rows[~np.isin(contents.rows["at"]["segment"], list(rescanned))]


_Scanned: TypeAlias = tuple[Segment, list[ScannedRecord], SegmentScan]


def _scan_all(
    engine: IOEngine, store: bytes, todo: Sequence[tuple[Segment, int]], progress: Progress | None
) -> list[_Scanned]:
    """Scan segments, a few at a time."""
    total = sum(segment.size - start for segment, start in todo)
    done, lock = 0, threading.Lock()

    def advanced(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(min(done, total), total)

    def scan(task: tuple[Segment, int]) -> _Scanned:
        segment, start = task
        return (segment, *scan_segment(engine, segment, start, store, advanced))

    if not todo:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(todo)), thread_name_prefix="kvtier-scan") as threads:
        return list(threads.map(scan, todo))


def _take_scans(catalog: Catalog, scans: Sequence[_Scanned]) -> Rows:
    """Rows of the records that were found; segments end where their last good record does."""
    rows: list[bytes] = []
    for segment, records, scan in scans:
        segment.cursor = max(segment.cursor, scan.end)
        segment.min_sequence = min(segment.min_sequence, scan.min_sequence)
        catalog.sequence = max(catalog.sequence, scan.last_sequence + 1)
        for record in records:
            header = record.header
            tenant = catalog.tenants.number(header.tenant.encode())
            namespace = catalog.namespaces.number(header.namespace)
            rows.append(pack_row(header, segment.number, record.offset, tenant, namespace))
        for offset in scan.tombstones:
            catalog.remember_tombstone(segment.number, offset)
    return rows_of(rows)


def _enter(catalog: Catalog, indexed: Rows, scanned: Rows) -> None:
    """Of all rows of a key the one with the highest sequence number holds; of equal ones the last."""
    both = np.concatenate([indexed, scanned]) if len(scanned) else indexed
    kept = np.sort(_newest(both["key"], both["at"]["sequence"]))
    catalog.enter(both[kept])
    catalog.tell(both[kept[kept >= len(indexed)]])
    if len(both):
        catalog.sequence = max(catalog.sequence, int(both["at"]["sequence"].max()) + 1)


def _newest(keys: KeyArray, sequences: KeyArray) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Positions of the newest row of each key."""
    words = [keys[:, word] for word in range(4)]
    mixed = words[0] ^ words[1] ^ words[2] ^ words[3]
    order = np.lexsort((np.arange(len(keys)), sequences, mixed))
    twins = np.flatnonzero(mixed[order][1:] == mixed[order][:-1])
    if not twins.size:
        return order.astype(np.int64)
    if not (keys[order[twins]] == keys[order[twins + 1]]).all():  # different keys that mix alike: rare, so slowly
        order = np.lexsort((np.arange(len(keys)), sequences, *words))
    ordered = keys[order]
    last = np.ones(len(keys), dtype=np.bool_)
    last[:-1] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[last].astype(np.int64)


def _bury(catalog: Catalog, contents: IndexContents | None, scans: Sequence[_Scanned], rescanned: set[int]) -> None:
    """Take out what was deleted or put aside."""
    graves = [grave for _, _, scan in scans for grave in scan.graves]
    if graves:
        found = np.empty(len(graves), dtype=GRAVE)
        found["key"], found["before"] = join_keys([grave.key for grave in graves]), [grave.before for grave in graves]
        catalog.bury(found["key"], found["before"], forever=False)
        # All of them, also those that find nothing now: behind a newer record an older one may lie in the index.
        catalog.tell_graves(found)
    if contents is not None:
        catalog.bury(contents.graves["key"], contents.graves["before"], forever=False)
        for number, offset in contents.tombstones:
            if number not in rescanned:
                catalog.tombstones[number].append(offset)
