"""The record store at its plainest, one verified file a record: what the laws and the crash tests are tried on."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from kvtier.errors import InputError
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.records import (
    KEY_BYTES,
    BoolArray,
    ByteRange,
    Lease,
    PutOutcome,
    PutState,
    ReadRequest,
    Record,
    RecordInfo,
    RecordStats,
    RecordStore,
)

__all__ = ["ReferenceRecords"]

_HEADER = struct.Struct(f"<8s{KEY_BYTES}s{KEY_BYTES}sQQdHH")
_MAGIC = b"KVTPLAIN"
_DIGEST_BYTES = 16
_BLOCK = 4096

failpoints.NAMES.update({"reference.written", "reference.synced", "reference.named", "reference.removed"})


class _Entry(NamedTuple):
    """What the table knows of a record."""

    info: RecordInfo
    held: int


class ReferenceRecords(RecordStore):
    """A directory of files named by their keys; a dict finds them; one lock; the oldest goes first.

    Correct and slow. The methods with one underscore are the seams at which tests break it on purpose.

    Parameters
    ----------
    directory : Path
        An existing directory, of this store alone.
    capacity_bytes : int
        Hard bound on the bytes of its files.
    """

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self._lock = threading.RLock()
        self._table: dict[bytes, _Entry] = {}
        self._leases: list[_ReferenceLease] = []
        self._stats = RecordStats(capacity_bytes=capacity_bytes)
        self._sequence = 0
        self._open = True
        self._recover()

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Store each record in a file of its own."""
        with self._lock:
            return [self._put(record) for record in records]

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Ask the table."""
        with self._lock:
            return np.asarray([self._open and key in self._table for key in keys], dtype=np.bool_)

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Read whole files, verify them, copy what was asked for."""
        with self._lock:
            return [self._read(request) for request in requests]

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Note the keys; `_evictable` looks at them."""
        with self._lock:
            held = tuple(key for key in keys if self._open and key in self._table)
            lease = _ReferenceLease(self, owner, held, time.monotonic() + seconds)
            self._leases.append(lease)
            return lease

    def info(self, key: bytes) -> RecordInfo | None:
        """Ask the table."""
        with self._lock:
            entry = self._table.get(key) if self._open else None
            return entry.info if entry else None

    def scan(self) -> Iterator[RecordInfo]:
        """The table, oldest first."""
        with self._lock:
            return iter([entry.info for entry in self._table.values()] if self._open else [])

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove files, then sync their directory."""
        with self._lock:
            there = [key for key in dict.fromkeys(keys) if self._open and key in self._table]
            for key in there:
                self._forget(key)
            if there:
                failpoints.reach("reference.removed")
                self._sync_directory()
            return len(there)

    def clear(self, tenant: str | None = None) -> int:
        """Delete what the tenant has."""
        with self._lock:
            return self.delete([key for key, entry in self._table.items() if tenant in {None, entry.info.tenant}])

    def stats(self) -> RecordStats:
        """Counters, and sums over the table."""
        with self._lock:
            tenants: dict[str, int] = {}
            for info, held in self._table.values():
                tenants[info.tenant] = tenants.get(info.tenant, 0) + held
            live = sum(tenants.values())
            leased = sum(self._table[key].held for key in self._leased())
            return replace(
                self._stats,
                records=len(self._table),
                live_bytes=live,
                held_bytes=live,
                leased_bytes=leased if self._open else 0,
                tenants=tenants,
            )

    def capabilities(self) -> Capabilities:
        """Plain files."""
        return Capabilities(name="reference", pinned=False, direct_io=False, alignment=1, persistent=True)

    def flush(self) -> None:
        """Everything was synced when it was put."""

    def close(self) -> None:
        """Answer nothing any more; what is under way holds the lock."""
        with self._lock:
            self._open = False
            self._leases.clear()

    def release(self, lease: Lease) -> None:
        """Drop one lease."""
        with self._lock:
            self._leases = [one for one in self._leases if one is not lease]

    def _put(self, record: Record) -> PutOutcome:
        if self._open and record.key in self._table:
            return PutOutcome(PutState.EXISTS)
        data = self._encode(record)
        held = -(-len(data) // _BLOCK) * _BLOCK
        reason = "the store is closed" if not self._open else self._make_room(held)
        if not reason:
            try:
                self._write(self._path(record.key), data)
            except OSError as error:
                self._stats = replace(self._stats, failed=self._stats.failed + 1)
                reason = f"the file could not be written ({error.strerror})"
        if reason:
            self._stats = replace(self._stats, refused=self._stats.refused + 1)
            return PutOutcome(PutState.REFUSED, reason)
        self._table[record.key] = _Entry(_parse(data), held)
        self._stats = replace(
            self._stats,
            stored=self._stats.stored + 1,
            written_bytes=self._stats.written_bytes + record.payload_bytes,
        )
        return PutOutcome(PutState.STORED)

    def _read(self, request: ReadRequest) -> bool:
        payload = self._load(request.key) if self._open and request.key in self._table else None
        if payload is not None:
            ranges = (ByteRange(0, len(payload)),) if request.ranges is None else request.ranges
            if sum(length for _, length in ranges) != request.into.numel():
                raise InputError(f"into must have room for the ranges exactly, got {request.into.numel()} bytes")
            if all(offset + length <= len(payload) for offset, length in ranges):
                wanted = self._cut(payload, ranges)
                request.into.copy_(torch.frombuffer(bytearray(wanted), dtype=torch.uint8) if wanted else request.into)
                self._stats = replace(
                    self._stats, hits=self._stats.hits + 1, read_bytes=self._stats.read_bytes + len(wanted)
                )
                return True
        self._stats = replace(self._stats, misses=self._stats.misses + 1)
        return False

    def _load(self, key: bytes) -> bytes | None:
        """Payload of a file, verified; a damaged file is counted and removed."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            data = b""
        if self._intact(data, key):
            info = _parse(data)
            return data[-_DIGEST_BYTES - info.payload_bytes : -_DIGEST_BYTES]
        self._stats = replace(self._stats, damaged=self._stats.damaged + 1)
        self._forget(key)
        return None

    def _recover(self) -> None:
        found = []
        for path in self.directory.iterdir():
            if path.suffix == ".part":
                path.unlink()
            elif path.suffix == ".record":
                data = path.read_bytes()
                key = bytes.fromhex(path.stem) if len(path.stem) == 2 * KEY_BYTES else b""
                if self._intact(data, key):
                    found.append((_parse(data), -(-len(data) // _BLOCK) * _BLOCK))
                else:
                    self._stats = replace(self._stats, damaged=self._stats.damaged + 1)
                    path.unlink()
        for info, held in sorted(found, key=lambda one: one[0].sequence):
            self._table[info.key] = _Entry(info, held)
            self._sequence = info.sequence
        self._make_room(0)

    def _make_room(self, held: int) -> str:
        """Evict the oldest until ``held`` bytes fit; why they cannot, or nothing."""
        if held > self.capacity_bytes:
            return f"the record takes {held} bytes and the store at most {self.capacity_bytes}"
        while sum(entry.held for entry in self._table.values()) + held > self.capacity_bytes:
            oldest = self._evictable()
            if oldest is None:
                return "the store is full of leased records"
            self._forget(oldest)
            self._stats = replace(self._stats, evicted=self._stats.evicted + 1)
        return ""

    def _evictable(self) -> bytes | None:
        leased = self._leased()
        return next((key for key in self._table if key not in leased), None)

    def _leased(self) -> set[bytes]:
        live = (lease for lease in self._leases if not lease.expired)
        return {key for lease in live for key in lease.keys if key in self._table}

    def _write(self, path: Path, data: bytes) -> None:
        """Bytes, sync, name, sync: in this order."""
        part = path.with_suffix(".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, data)
            failpoints.reach("reference.written")
            self._sync(descriptor)
        finally:
            os.close(descriptor)
        failpoints.reach("reference.synced")
        part.rename(path)
        failpoints.reach("reference.named")
        self._sync_directory()

    def _sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _encode(self, record: Record) -> bytes:
        self._sequence += 1
        tenant = record.tenant.encode()
        size = record.payload_bytes
        sizes = (len(tenant), len(record.meta))
        header = _HEADER.pack(_MAGIC, record.key, record.namespace, self._sequence, size, time.time(), *sizes)
        body = b"".join([header, tenant, record.meta, *(buffer.numpy().tobytes() for buffer in record.buffers)])
        return body + xxhash.xxh3_128_digest(body)

    def _intact(self, data: bytes, key: bytes) -> bool:
        whole = len(data) >= _HEADER.size + _DIGEST_BYTES
        return whole and xxhash.xxh3_128_digest(data[:-_DIGEST_BYTES]) == data[-_DIGEST_BYTES:] and key in data[8:40]

    def _cut(self, payload: bytes, ranges: Sequence[ByteRange]) -> bytes:
        return b"".join(payload[offset : offset + length] for offset, length in ranges)

    def _forget(self, key: bytes) -> None:
        del self._table[key]
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}.record"


class _ReferenceLease(Lease):
    """Keys that `ReferenceRecords` does not evict."""

    def __init__(self, store: ReferenceRecords, owner: str, keys: tuple[bytes, ...], deadline: float) -> None:
        self._store, self.owner, self.keys, self.deadline = store, owner, keys, deadline

    def release(self) -> None:
        """Tell the store."""
        self._store.release(self)


def _parse(data: bytes) -> RecordInfo:
    """What a file says of its record."""
    _, key, namespace, sequence, size, created, tenant_bytes, meta_bytes = _HEADER.unpack_from(data)
    tenant = data[_HEADER.size : _HEADER.size + tenant_bytes].decode()
    meta = data[_HEADER.size + tenant_bytes : _HEADER.size + tenant_bytes + meta_bytes]
    return RecordInfo(
        key=key,
        namespace=namespace,
        tenant=tenant,
        payload_bytes=size,
        meta=meta,
        sequence=sequence,
        created=created,
    )
