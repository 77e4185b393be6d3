"""Record stores with one thing wrong each: what the laws and the crash tests must catch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvtier.storage_backends import failpoints
from kvtier.storage_backends.records import (
    ByteRange,
    Lease,
    PutOutcome,
    PutState,
    ReadRequest,
    Record,
    RecordInfo,
    RecordStats,
)
from kvtier.testing.reference_records import ReferenceRecords

_LEAST_BYTES = 112


class SkipsSync(ReferenceRecords):
    """Acknowledges bytes that may be in the page cache alone."""

    def _sync(self, descriptor: int) -> None:
        pass


class NamesBeforeSync(ReferenceRecords):
    """Gives a file its name before its bytes are safe."""

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_suffix(".part")
        part.write_bytes(b"")
        descriptor = os.open(part, os.O_WRONLY)
        part.rename(path)
        self._sync_directory()
        os.write(descriptor, data)
        self._sync(descriptor)
        os.close(descriptor)


class SkipsDirectorySync(ReferenceRecords):
    """Believes that a synced file keeps its name, and that an unlinked one is gone."""

    def _sync_directory(self) -> None:
        pass


class TrustsTornFiles(SkipsSync):
    """Takes what it finds in a file for a record."""

    def _intact(self, data: bytes, key: bytes) -> bool:
        return len(data) >= _LEAST_BYTES


class SyncsTooLate(ReferenceRecords):
    """Syncs what it stored at the next put: the last record is not safe when it is acknowledged."""

    _before: Path | None = None

    def _sync(self, descriptor: int) -> None:
        if self._before is not None and self._before.exists():
            late = os.open(self._before, os.O_RDONLY)
            os.fsync(late)
            os.close(late)

    def _write(self, path: Path, data: bytes) -> None:
        super()._write(path, data)
        self._before = path


class ServesUnverifiedBytes(ReferenceRecords):
    """Believes the medium."""

    def _intact(self, data: bytes, key: bytes) -> bool:
        return len(data) >= _LEAST_BYTES


class KeepsDamagedRecords(ReferenceRecords):
    """Sees the damage, says so, and claims the record all the same."""

    def _load(self, key: bytes) -> bytes | None:
        table = dict(self._table)
        payload = super()._load(key)
        self._table = table
        return payload


class CountsNothing(ReferenceRecords):
    """Finds damage and keeps quiet about it."""

    def stats(self) -> RecordStats:
        return replace(super().stats(), damaged=0)


class RaisesOnDamage(ReferenceRecords):
    """Lets the caller deal with the disk."""

    def _load(self, key: bytes) -> bytes | None:
        payload = super()._load(key)
        if payload is None:
            raise OSError(f"record {key.hex()} is damaged")
        return payload


class ForgetsCapacity(ReferenceRecords):
    """Evicts behind the put, so that the bound is passed for a moment."""

    def _make_room(self, held: int) -> str:
        return super()._make_room(0)


class CountsLess(ReferenceRecords):
    """Says that it holds no more than it may."""

    def _make_room(self, held: int) -> str:
        return ""

    def stats(self) -> RecordStats:
        stats = super().stats()
        return replace(stats, held_bytes=min(stats.held_bytes, stats.capacity_bytes))


class NeverEvicts(ReferenceRecords):
    """Is full when it is full."""

    def _evictable(self) -> bytes | None:
        return None


class EvictsLeased(ReferenceRecords):
    """The oldest goes first, whoever reads it."""

    def _evictable(self) -> bytes | None:
        return next(iter(self._table), None)


class LeaksLeases(ReferenceRecords):
    """Keeps a lease for ever once two are held."""

    def release(self, lease: Lease) -> None:
        if len(self._leases) < 2:
            super().release(lease)


class LeasesNeverRunOut(ReferenceRecords):
    """Takes no notice of deadlines."""

    def _leased(self) -> set[bytes]:
        return {key for lease in self._leases for key in lease.keys if key in self._table}


class ResurrectsAtReopening(ReferenceRecords):
    """Forgets in memory, and not on the disk."""

    def delete(self, keys: Sequence[bytes]) -> int:
        there = [key for key in dict.fromkeys(keys) if key in self._table]
        for key in there:
            del self._table[key]
        return len(there)


class OverwritesRecords(ReferenceRecords):
    """Takes the newest bytes of a key for the right ones."""

    def _put(self, record: Record) -> PutOutcome:
        if record.key in self._table:
            self._forget(record.key)
        return super()._put(record)


class ServesWrongRanges(ReferenceRecords):
    """Is one byte off where a range does not begin at the beginning."""

    def _cut(self, payload: bytes, ranges: Sequence[ByteRange]) -> bytes:
        moved = [one if one.offset in {0, len(payload)} else one._replace(offset=one.offset - 1) for one in ranges]
        return super()._cut(payload, [ByteRange(*one) for one in moved])


class ServesShortRecords(ReferenceRecords):
    """Takes a range beyond the payload for one that ends with it."""

    def _read(self, request: ReadRequest) -> bool:
        info = self.info(request.key)
        if info is not None and request.ranges is not None:
            ranges = tuple(ByteRange(0, min(length, info.payload_bytes)) for _, length in request.ranges)
            request = request._replace(into=request.into[: sum(one.length for one in ranges)], ranges=ranges)
        return super()._read(request)


class KeepsTheCallersBuffers(ReferenceRecords):
    """Remembers tensors instead of bytes."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._buffers: dict[bytes, Sequence[torch.Tensor]] = {}
        super().__init__(directory, capacity_bytes)

    def _put(self, record: Record) -> PutOutcome:
        self._buffers[record.key] = record.buffers
        return super()._put(record)

    def _load(self, key: bytes) -> bytes | None:
        found = super()._load(key)
        kept = self._buffers.get(key)
        return found if found is None or kept is None else b"".join(buffer.numpy().tobytes() for buffer in kept)


class ClearsEverybody(ReferenceRecords):
    """Does not look whose records they are."""

    def clear(self, tenant: str | None = None) -> int:
        return super().clear(None)


class ForgetsMeta(ReferenceRecords):
    """Keeps the payload, and not what came with it."""

    def info(self, key: bytes) -> RecordInfo | None:
        found = super().info(key)
        return None if found is None else replace(found, meta=b"")


class ScansAtRandom(ReferenceRecords):
    """Lists records by key."""

    def scan(self) -> Iterator[RecordInfo]:
        return iter(sorted(super().scan(), key=lambda info: info.key))


class ForgetsAtClosing(ReferenceRecords):
    """Says that it is persistent."""

    def close(self) -> None:
        if self._open:
            for key in list(self._table)[::2]:
                self._path(key).unlink(missing_ok=True)
        super().close()


class RaisesWhenClosed(ReferenceRecords):
    """Has its callers remember that it is closed."""

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        if not self._open:
            raise OSError("closed")
        return super().put(records)


class PublishesEarly(ReferenceRecords):
    """Two puts of a key at once are both stored, and a reader may meet a record that is not there yet."""

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        known = [record.key in self._table for record in records]
        time.sleep(0.0005)
        outcomes = super().put(records)
        return [
            PutOutcome(PutState.STORED) if outcome.state is PutState.EXISTS and not before else outcome
            for outcome, before in zip(outcomes, known, strict=True)
        ]


class MiscountsMisses(ReferenceRecords):
    """A miss is not worth a count."""

    def stats(self) -> RecordStats:
        return replace(super().stats(), misses=0)


class RemovesForeignFiles(ReferenceRecords):
    """Takes whatever lies in its directory for its own."""

    def _recover(self) -> None:
        for path in self.directory.iterdir():
            if path.is_file() and path.suffix != ".record":
                path.unlink()
        super()._recover()


class ServesTornFiles(ReferenceRecords):
    """Writes under the final name, in pieces, and believes what it finds."""

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        failpoints.reach("reference.written")
        path.write_bytes(data)

    def _intact(self, data: bytes, key: bytes) -> bool:
        return len(data) >= _LEAST_BYTES


class AcknowledgesEarly(ReferenceRecords):
    """Writes behind: what was acknowledged last is in this process alone."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._behind: tuple[Path, bytes] | None = None
        super().__init__(directory, capacity_bytes)

    def _write(self, path: Path, data: bytes) -> None:
        self._catch_up()
        self._behind = path, data

    def _load(self, key: bytes) -> bytes | None:
        self._catch_up()
        return super()._load(key)

    def _forget(self, key: bytes) -> None:
        self._catch_up()
        super()._forget(key)

    def close(self) -> None:
        with self._lock:
            self._catch_up()
        super().close()

    def _catch_up(self) -> None:
        if self._behind is not None:
            super()._write(*self._behind)
            self._behind = None
