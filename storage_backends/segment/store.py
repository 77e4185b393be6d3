"""The segment store: verified records in log-structured files, within a hard bound of bytes, at the drive's speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvtier.errors import CapacityError, InputError, StorageError
from kvtier.record import BLOCK_BYTES, KEY_BYTES, Grave, SegmentKind
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.engines import IOEngine, PosixEngine
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.record_table import IndexArray
from kvtier.storage_backends.records import (
    BoolArray,
    PutOutcome,
    PutState,
    ReadRequest,
    Record,
    RecordInfo,
    RecordStats,
    RecordStore,
)
from kvtier.storage_backends.segment.allocator import SegmentAllocator
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.drive import Drive
from kvtier.storage_backends.segment.flusher import Flusher
from kvtier.storage_backends.segment.journal import Journal
from kvtier.storage_backends.segment.leases import SegmentLease
from kvtier.storage_backends.segment.lock import DirectoryLock
from kvtier.storage_backends.segment.opening import newest_segment, open_directory
from kvtier.storage_backends.segment.options import SegmentOptions
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.putting import put_records
from kvtier.storage_backends.segment.reading import read_infos, read_requests
from kvtier.storage_backends.segment.reclaim import Reclaimer
from kvtier.storage_backends.segment.recovery import Progress, RecoveryReport
from kvtier.storage_backends.segment.statistics import collect_stats
from kvtier.storage_backends.segment.verify import StoreSummary, VerifyReport, summarise, verify_records
from kvtier.types import format_bytes

__all__ = ["SegmentRecords"]

_SCAN_RECORDS = 256
_OTHER_FILES = ("lock", "index.sqlite", "index.sqlite-wal")


class SegmentRecords(RecordStore):
    """A directory of segments that one process writes, or any number read.

    Parameters
    ----------
    directory : Path or str
        Made if it does not exist. Everything in it is the store's.
    options : SegmentOptions
    engine : IOEngine, optional
        Moves the bytes; stays the caller's. A `PosixEngine` of its own when None.
    read_only : bool
        Write nothing, refuse puts; beside other readers, never beside a writer.
    progress : callable, optional
        Told bytes done and bytes in all while segments are looked through.

    Attributes
    ----------
    directory : Path
    recovery : RecoveryReport
        How the directory was opened.
    drive : Drive
        What the drive below was found to be.

    Raises
    ------
    ConfigError
        The capacity is too small.
    StoreInUseError
        Another process holds the directory.
    StorageError
        The directory cannot be used.

    Notes
    -----
    Any thread may call anything. `put` holds no lock while bytes move; concurrent durable puts share a sync. In durable
    mode a record that was put survives a power loss; in relaxed mode it does once ``sync_bytes`` more were put or
    ``sync_seconds`` went by, whichever is first. Deletes are durable in both.
    """

    directory: Path
    recovery: RecoveryReport
    drive: Drive

    def __init__(
        self,
        directory: Path | str,
        options: SegmentOptions,
        *,
        engine: IOEngine | None = None,
        read_only: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.options = options
        self._geometry = options.geometry()
        self._gate = Gate("the segment store")
        self._catalog = Catalog()
        self._lock = _locked(self.directory, shared=read_only)
        self._owns_engine = engine is None
        self._engine = engine or PosixEngine()
        try:
            self._open(progress, writable=not read_only)
        except BaseException:
            self._let_go()
            raise

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Store records next to each other; see `RecordStore.put`."""
        try:
            with self._gate:
                if self._flusher is None:
                    return self._refuse(records, "the store is open for reading only")
                return put_records(self._journal, self._flusher, self._reclaimer, records)
        except (StorageError, CapacityError) as error:
            return self._refuse(records, str(error))

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]."""
        _check_keys(keys)
        try:
            with self._gate:
                return self._catalog.contains(keys)
        except StorageError:
            return np.zeros(len(keys), dtype=np.bool_)

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Fill and verify; see `RecordStore.read`."""
        _check_keys([request.key for request in requests])
        try:
            with self._gate:
                return read_requests(self._journal, requests)
        except (StorageError, CapacityError):  # closed, or no memory to read into
            with self._catalog.lock:
                self._catalog.counters.misses += len(requests)
            return [False] * len(requests)

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> SegmentLease:
        """Keep those that exist from being evicted for ``seconds``."""
        _check_keys(keys)
        if seconds <= 0:
            raise InputError(f"a lease must hold for more than 0 seconds, got {seconds}")
        try:
            with self._gate:
                return self._catalog.lease(keys, owner, seconds)
        except StorageError:
            return self._catalog.lease([], owner, seconds)

    def info(self, key: bytes) -> RecordInfo | None:
        """What the header of a record says."""
        _check_keys([key])
        with self._catalog.lock:
            rows = self._catalog.find([key])
        return next((info for info in self._infos(rows[rows >= 0]) if info.key == key), None)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record, in the order they were stored."""
        with self._catalog.lock:
            rows = self._catalog.table.live()
            rows = rows[np.argsort(self._catalog.table.at["sequence"][rows], kind="stable")]
        return self._infos(rows)

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records; their tombstones are on the medium when it returns."""
        _check_keys(keys)

        def choose() -> IndexArray:
            rows = np.unique(self._catalog.find(keys))
            return rows[rows >= 0]

        return self._delete(choose)

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all."""

        def choose() -> IndexArray:
            rows = self._catalog.table.live()
            if tenant is None:
                return rows
            number = self._catalog.tenants.find(tenant.encode())
            return rows[:0] if number is None else rows[self._catalog.table.at["tenant"][rows] == number]

        return self._delete(choose)

    def stats(self) -> RecordStats:
        """Counters and bytes now."""
        return collect_stats(self._catalog, self._pool, self.held_bytes, self._geometry.capacity, self._degraded)

    @property
    def engine(self) -> IOEngine:
        """What moves the bytes."""
        return self._engine

    @property
    def segment_bytes(self) -> int:
        """Size of a segment."""
        return self._geometry.segment_bytes

    def borrow_segment(self) -> Segment:
        """Take a whole segment out of the capacity, from the cache if need be, for pages that need no index.

        Raises
        ------
        CapacityError
            None can be had.
        StorageError
            The store is closed, or open for reading only.
        """
        with self._gate:
            if self._flusher is None:
                raise StorageError("required a store that may be written, got one that is open for reading only")
            segment = self._journal.allocator.take(SegmentKind.SPILL)
            if isinstance(segment, str):
                raise CapacityError(f"required a segment of {format_bytes(self.segment_bytes)}, got none: {segment}")
            return segment

    def return_segment(self, segment: Segment) -> None:
        """Give a borrowed segment back; after `close` there is nothing to give it back to."""
        with contextlib.suppress(StorageError), self._gate:
            self._journal.allocator.give(segment)

    @property
    def held_bytes(self) -> int:
        """Bytes that the file system holds for all files of the directory."""
        others = 0
        for name in _OTHER_FILES:
            try:
                others += (self.directory / name).stat().st_blocks * 512
            except OSError:
                continue
        return self._pool.held_bytes + others

    @property
    def memory_bytes(self) -> int:
        """Memory of the table of records, digests excluded."""
        return self._catalog.table.held_bytes

    def capabilities(self) -> Capabilities:
        """What the drive was found to be when the directory was opened."""
        drive = self.drive
        speed = f"reads {drive.latency * 1e6:.0f} us, {drive.bandwidth / 1e9:.2f} GB/s" if drive.bandwidth else ""
        return Capabilities(
            name="segment",
            pinned=False,
            direct_io=drive.direct,
            alignment=BLOCK_BYTES if drive.direct else 1,
            persistent=True,
            note="; ".join(filter(None, (drive.note, speed))),
        )

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and verify every live record at the drive's bandwidth; what is damaged is put aside.

        Raises
        ------
        StorageError
            The store is closed.
        """
        with self._gate:
            report = verify_records(self._journal, progress)
        found = self.recovery
        return replace(
            report,
            torn=found.torn,
            rebuilt=found.rebuilt,
            lost_segments=found.lost_segments,
            restored_segments=found.restored_segments,
        )

    def rewrite_index(self) -> None:
        """Replace the index on disk by what is known now: the second half of a repair, after `verify`.

        Raises
        ------
        StorageError
            The store is closed, or open for reading only.
        """
        with self._gate:
            if self._flusher is None:
                raise StorageError("required a store that may be written, got one that is open for reading only")
            self._flusher.rewrite()

    def summary(self, hottest: int = 10) -> StoreSummary:
        """What the directory holds: tenants, namespaces, ages, the records read most."""
        return summarise(self._journal, hottest)

    def flush(self) -> None:
        """Sync all data and tell the index."""
        try:
            with self._gate:
                if self._flusher is not None:
                    self._flusher.flush()
                    self._flusher.sync_index()
        except StorageError:
            return

    def close(self) -> None:
        """Wait for calls under way, flush, and let the directory go."""
        if not self._gate.shut():
            return
        if self._flusher is not None:
            self._flusher.close()
        self._journal.close()
        self._pool.close()
        self._let_go()

    def _open(self, progress: Progress | None, *, writable: bool) -> None:
        opened = open_directory(
            self._engine, self.directory, self._geometry, self._catalog, progress, writable=writable
        )
        self._pool, self.recovery, self.drive = opened.pool, opened.report, opened.drive
        allocator = SegmentAllocator(self._catalog, self._pool, self._geometry, self._clear)
        self._journal = Journal(self.options, self._engine, self._catalog, self._pool, allocator, self.drive.gap_bytes)
        self._reclaimer = Reclaimer(self._journal)
        self._flusher: Flusher | None = None
        newest = newest_segment(self._pool)
        if newest is not None:
            allocator.resume(newest)
        if writable:
            self._flusher = Flusher(
                self.directory, self.options, self._geometry, self._catalog, self._pool, opened.index
            )
            self._flusher.start()

    def _clear(self) -> str:
        return self._reclaimer.clear()

    @property
    def _degraded(self) -> str:
        problem = self._flusher.problem if self._flusher is not None else "open for reading only"
        return "; ".join(filter(None, (self._journal.allocator.degraded, self._journal.degraded, problem)))

    def _refuse(self, records: Sequence[Record], reason: str) -> list[PutOutcome]:
        with self._catalog.lock:
            self._catalog.counters.refused += len(records)
        return [PutOutcome(PutState.REFUSED, reason)] * len(records)

    def _infos(self, rows: IndexArray) -> Iterator[RecordInfo]:
        for at in range(0, rows.size, _SCAN_RECORDS):
            try:
                with self._gate:
                    infos = read_infos(self._journal, rows[at : at + _SCAN_RECORDS])
            except StorageError:
                return
            yield from infos

    def _delete(self, choose: Callable[[], IndexArray]) -> int:
        """Take out chosen rows, and write down that they are gone before anybody is told."""
        try:
            with self._gate:
                if self._flusher is None:
                    return 0
                with self._catalog.lock:
                    graves = self._catalog.remove(choose(), forever=True)
                dead = [Grave(row["key"].tobytes(), int(row["before"])) for row in graves]
                if dead and not self._journal.write_tombstones(dead):
                    self._flusher.flush()
                    self._flusher.sync_index()
                return len(dead)
        except StorageError:
            return 0

    def _let_go(self) -> None:
        if self._owns_engine:
            self._engine.close()
        self._lock.release()


def _locked(directory: Path, *, shared: bool) -> DirectoryLock:
    try:
        if not shared:
            directory.mkdir(parents=True, exist_ok=True)
        return DirectoryLock(directory, shared=shared)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot make {directory}: {error.strerror}; choose another directory") from error


def _check_keys(keys: Sequence[bytes]) -> None:
    for key in keys:
        if len(key) != KEY_BYTES:
            raise InputError(f"a key must be {KEY_BYTES} bytes, got {len(key)}")
