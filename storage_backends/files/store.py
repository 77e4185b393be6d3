"""The file store: verified records, one file each, in a directory that several processes may share."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvtier.errors import InputError, StorageError
from kvtier.record import BLOCK_BYTES, KEY_BYTES
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.engines import IOEngine, PosixEngine
from kvtier.storage_backends.engines.gate import Gate
from kvtier.storage_backends.files.layout import INCOMING, LOCK, MARK, QUARANTINE, is_files_directory, unsynced_since
from kvtier.storage_backends.files.options import FileOptions
from kvtier.storage_backends.files.putting import Putter
from kvtier.storage_backends.files.reading import Reader
from kvtier.storage_backends.files.shelf import Shelf, sync_directories
from kvtier.storage_backends.files.verify import summarise_files, verify_files
from kvtier.storage_backends.leases import LeaseBook
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
)
from kvtier.storage_backends.segment.recovery import Progress
from kvtier.storage_backends.segment.verify import StoreSummary, VerifyReport
from kvtier.storage_backends.workers import Workers

__all__ = ["FileRecords"]

_SCAN_RECORDS = 256


class FileRecords(RecordStore):
    """A directory with a file for each record, on a local or a shared file system.

    Parameters
    ----------
    directory : Path or str
        Made if it does not exist.
    options : FileOptions
    engine : IOEngine, optional
        Moves the bytes; stays the caller's. A `PosixEngine` of its own when None.
    read_only : bool
        Change nothing on the medium, refuse puts.

    Attributes
    ----------
    directory : Path

    Raises
    ------
    StorageError
        The directory cannot be used, or holds something else.

    Notes
    -----
    Any thread, and any process, may call anything at any time. What another process removed is a miss; what it put is
    found when it is asked for, at the price of one look at the file system for a key that this process has not seen. A
    lease holds against this process only. The capacity is one for all: a ledger in the directory, behind a lock, counts
    every byte before it is written. File systems must honour ``flock`` between the machines that share them.
    """

    directory: Path

    def __init__(
        self, directory: Path | str, options: FileOptions, *, engine: IOEngine | None = None, read_only: bool = False
    ) -> None:
        self.directory = Path(directory)
        self.options = options
        self._read_only = read_only
        self._gate = Gate("the file store")
        self._leases = LeaseBook()
        self._shelf = Shelf(self.directory, options, self._leases)
        self._lock_fd = -1
        self._notes: dict[Path, int] = {}  # of processes that are no more
        self._owns_engine = engine is None
        self._engine = engine or PosixEngine()
        self._workers = Workers(threads=8)
        try:
            self._open()
        except OSError as error:
            self._let_go()
            if isinstance(error, StorageError):
                raise
            reason = error.strerror or error
            raise StorageError(f"cannot use {self.directory}: {reason}; choose another directory") from error
        except BaseException:
            self._let_go()
            raise

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Store records, each in a file of its own; see `RecordStore.put`."""
        try:
            with self._gate:
                if self._read_only:
                    return self._refuse(records, "the store is open for reading only")
                return self._putter.put(records)
        except StorageError as error:
            return self._refuse(records, str(error))

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]; asks the file system for those that this process has not seen."""
        _check_keys(keys)
        try:
            with self._gate:
                return np.fromiter((self._shelf.adopt(key) for key in keys), dtype=np.bool_, count=len(keys))
        except StorageError:
            return np.zeros(len(keys), dtype=np.bool_)

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Fill and verify; see `RecordStore.read`."""
        _check_keys([request.key for request in requests])
        try:
            with self._gate:
                return self._reader.read(requests)
        except StorageError:
            with self._shelf.lock:
                self._shelf.counters.misses += len(requests)
            return [False] * len(requests)

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Keep this process from evicting those that exist; another process may."""
        if seconds <= 0:
            raise InputError(f"a lease must hold for more than 0 seconds, got {seconds}")
        there = self.contains(keys)
        return self._leases.take(
            [key for key, here in zip(keys, there, strict=True) if here], owner=owner, seconds=seconds
        )

    def info(self, key: bytes) -> RecordInfo | None:
        """What the header of a record says."""
        _check_keys([key])
        return next(self._infos([key]), None)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record, those of other processes too, in the order they were stored."""
        try:
            with self._gate:
                self._shelf.refresh()
                with self._shelf.lock:
                    keys = self._shelf.table.by_age()
        except StorageError:
            return iter(())
        return self._infos(keys)

    def delete(self, keys: Sequence[bytes]) -> int:
        """Delete files, and sync that they are gone."""
        _check_keys(keys)
        try:
            with self._gate:
                return self._delete(list(dict.fromkeys(keys)))
        except StorageError:
            return 0

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all, those of other processes too."""
        if tenant is not None:
            return self.delete([info.key for info in self.scan() if info.tenant == tenant])
        try:
            with self._gate:
                self._shelf.refresh()
                with self._shelf.lock:
                    keys = self._shelf.table.by_age()
                return self._delete(keys)
        except StorageError:
            return 0

    def stats(self) -> RecordStats:
        """Counters of this process, and bytes of the directory; reads the headers of records that were never read."""
        self._learn_tenants()
        shelf = self._shelf
        with shelf.ledger.quiet() as held, shelf.lock:
            tenants: dict[str, int] = {}
            for entry in shelf.table.entries():
                name = entry.tenant or ""
                tenants[name] = tenants.get(name, 0) + entry.held
            leased = [shelf.table.get(key) for key in self._leases.keys()]  # noqa: SIM118
            return RecordStats(
                records=len(shelf.table),
                live_bytes=shelf.table.live_bytes,
                dead_bytes=shelf.quarantined,
                held_bytes=held,
                capacity_bytes=self.options.capacity,
                leased_bytes=sum(entry.held for entry in leased if entry is not None),
                degraded="open for reading only" if self._read_only else self._putter.degraded,
                tenants=tenants,
                **asdict(shelf.counters),
            )

    def capabilities(self) -> Capabilities:
        """Direct I/O as the trial in the directory found it."""
        return Capabilities(
            name="files",
            pinned=False,
            direct_io=self._direct,
            alignment=BLOCK_BYTES if self._direct else 1,
            persistent=True,
            note=self._note,
        )

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and verify every record; what is damaged is put aside, unless the store is open for reading only.

        Raises
        ------
        StorageError
            The store is closed.
        """
        with self._gate:
            self._shelf.refresh()
            with self._shelf.lock:
                keys = self._shelf.table.by_age()
            return verify_files(self._shelf, self._reader, progress, keys)

    def summary(self, hottest: int = 10) -> StoreSummary:
        """What the directory holds: tenants, namespaces, ages; reads every header. None is the ``hottest`` here."""
        del hottest  # files do not say how often they were read
        return summarise_files(self._shelf, self.scan())

    def flush(self) -> None:
        """Sync what relaxed puts left to the system."""
        try:
            with self._gate:
                if not self._read_only:
                    self._putter.sync_all()
        except StorageError:
            return

    def close(self) -> None:
        """Wait for calls under way, flush, and let the directory go."""
        if not self._gate.shut():
            return
        if not self._read_only:
            self._putter.close()
        self._let_go()

    def _open(self) -> None:
        if self._read_only:
            if not is_files_directory(self.directory):
                raise StorageError(f"{self.directory} is no directory of records in files; nothing to read there")
            self._share()
            self._shelf.ledger.held = self._shelf.count_all()
        else:
            self._make()
        self._shelf.refresh()
        if not self._read_only and (reason := self._shelf.keep_capacity()):
            raise StorageError(f"cannot keep {self.directory} within its capacity: {reason}")
        self._reader = Reader(self._shelf, self._engine, changing=not self._read_only)
        last = max((entry.stored for entry in self._shelf.table.entries()), default=0)
        self._putter = Putter(self._shelf, self._engine, self._workers, last)
        self._direct, self._note = self._try_medium()
        if self._notes:
            self._verify_unsynced()

    def _make(self) -> None:
        """Have the directory, and clear up in it if nobody else has it open."""
        made = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(self.directory.glob("segment-*.kvt")):
            raise StorageError(f"{self.directory} is a segment directory; choose another for records in files")
        (self.directory / MARK).touch(mode=0o600)
        for name in (INCOMING, QUARANTINE):
            (self.directory / name).mkdir(exist_ok=True, mode=0o700)
        if made:
            sync_directories([self.directory, self.directory.parent])
        self._lock_fd = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._shelf.recover()
            self._notes = unsynced_since(self.directory)
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _verify_unsynced(self) -> None:
        """Put aside what a power loss left in part: nobody promised it, and nobody may claim it."""
        since = min(self._notes.values())
        with self._shelf.lock:
            keys = [key for key, entry in self._shelf.table.items() if entry.stored >= since]
        verify_files(self._shelf, self._reader, None, keys)
        for note in self._notes:
            note.unlink(missing_ok=True)

    def _share(self) -> None:
        """Tell others that somebody has the directory open, if that can be told without a change."""
        with contextlib.suppress(OSError):
            self._lock_fd = os.open(self.directory / LOCK, os.O_RDONLY)
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _try_medium(self) -> tuple[bool, str]:
        """Whether transfers here are direct, and what else there is to say."""
        probe = self.directory / INCOMING / f".probe-{os.getpid()}"
        if self._read_only:
            return False, ""
        try:
            with contextlib.closing(self._engine.open(probe, writable=True, create=True)) as file:
                return file.direct, file.note
        except OSError as error:  # a full medium can still be read
            return False, f"direct I/O could not be tried: {error.strerror}"
        finally:
            probe.unlink(missing_ok=True)

    def _delete(self, keys: Sequence[bytes]) -> int:
        if self._read_only:
            return 0
        try:
            return self._shelf.remove(keys)
        except OSError as error:
            with self._shelf.lock:
                self._shelf.counters.failed += 1
            raise StorageError(f"cannot delete records in {self.directory}: {error.strerror}") from error

    def _infos(self, keys: Sequence[bytes]) -> Iterator[RecordInfo]:
        for at in range(0, len(keys), _SCAN_RECORDS):
            try:
                with self._gate:
                    infos = self._reader.infos(keys[at : at + _SCAN_RECORDS])
            except StorageError:
                return
            yield from infos

    def _learn_tenants(self) -> None:
        """Read the headers of records whose tenant is not known; those that cannot be read are put aside."""
        with self._shelf.lock:
            unknown = [key for key, entry in self._shelf.table.items() if entry.tenant is None]
        for _ in self._infos(unknown):
            pass

    def _refuse(self, records: Sequence[Record], reason: str) -> list[PutOutcome]:
        with self._shelf.lock:
            self._shelf.counters.refused += len(records)
        return [PutOutcome(PutState.REFUSED, reason)] * len(records)

    def _let_go(self) -> None:
        self._workers.close()
        if self._owns_engine:
            self._engine.close()
        self._shelf.ledger.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _check_keys(keys: Sequence[bytes]) -> None:
    for key in keys:
        if len(key) != KEY_BYTES:
            raise InputError(f"a key must be {KEY_BYTES} bytes, got {len(key)}")
