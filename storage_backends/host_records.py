"""Records in host memory: verified when they are read, evicted in an order that can be replaced."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from kvtier.errors import CapacityError, ConfigError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.extents import copy_verified, copy_with_digests, digest_bytes, ranges_within
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.leases import LeaseBook
from kvtier.storage_backends.memory import PAGE_BYTES, ByteRows, round_up
from kvtier.storage_backends.order import LeastRecentlyUsed, RecordOrder
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
from kvtier.storage_backends.slots import IntArray
from kvtier.storage_backends.workers import Workers
from kvtier.types import format_bytes

__all__ = ["HostRecords"]

_MAX_UNITS = 1 << 20  # finding room scans the units: a millisecond for this many
_INDEX_SHARE = 32  # of the capacity, one part is for the index
_ENTRY_BYTES = 1024  # what the index takes for a record, rounded up


@dataclass(slots=True, eq=False)
class _Entry:
    """A record in memory. Its units outlive its removal for as long as somebody reads them."""

    info: RecordInfo
    slots: HostSlots
    units: IntArray
    views: list[ByteRows]
    digests: bytes = b""
    hits: int = 0
    readers: int = 0
    removed: bool = False

    @property
    def index_bytes(self) -> int:
        """What the index takes for it."""
        return _ENTRY_BYTES + digest_bytes(self.info.payload_bytes) + len(self.info.meta)

    @property
    def held_bytes(self) -> int:
        """What its payload takes, padding included."""
        return self.units.size * self.slots.slot_bytes

    def fill(self, record: Record) -> None:
        """Copy the payload in and digest it."""
        sources = [buffer.numpy() for buffer in record.buffers]
        self.digests = copy_with_digests(sources, self.views, self.info.payload_bytes)

    def read(self, request: ReadRequest) -> bool | None:
        """Copy bytes out: True when they are right, False when they are not, None when they were never there."""
        ranges = ranges_within(request, self.info.payload_bytes)
        if ranges is None:
            return None
        return copy_verified(self.views, self.digests, self.info.payload_bytes, ranges, request.into.numpy())


@dataclass(slots=True)
class _Counts:
    hits: int = 0
    misses: int = 0
    damaged: int = 0
    failed: int = 0
    evicted: int = 0
    refused: int = 0
    stored: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


class HostRecords(RecordStore):
    """Records in host memory, page-locked where CUDA allows it.

    A record lies in units of 4 KiB, or larger ones where the capacity is more than 4 GiB, side by side where such a
    place is free. Of the records of one `put`, the last is the first to leave: what is left of a prefix is a prefix.

    Parameters
    ----------
    capacity_bytes : int
        The hard bound, of which one part in 32 is for the index.
    order : RecordOrder, optional
        Which record leaves first; least recently used by default. Reads and leases are uses.
    workers : Workers, optional
        Threads for large copies; closed with the store.

    Raises
    ------
    ConfigError
        A capacity that holds no record.

    Notes
    -----
    One lock guards the index; bytes are copied and digested outside it. A record that is removed while it is read
    keeps its memory until the reader is done.
    """

    def __init__(
        self, capacity_bytes: int, *, order: RecordOrder | None = None, workers: Workers | None = None
    ) -> None:
        self._slots = _slots_within(capacity_bytes)
        self._capacity_bytes = capacity_bytes
        self._order = order or LeastRecentlyUsed()
        self._workers = workers or Workers()
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}
        self._tenants: dict[str, int] = {}
        self._index_bytes = 0
        self._leases = LeaseBook()
        self._sequence = itertools.count(1)
        self._counts = _Counts()
        self._closed = False

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Copy records in; one that finds no room beside what is leased is refused."""
        outcomes: dict[int, PutOutcome] = {}
        placed: dict[int, _Entry] = {}
        with self._lock:
            coming: set[bytes] = set()
            for index, record in enumerate(records):
                if record.key in self._entries or record.key in coming:
                    outcomes[index] = PutOutcome(PutState.EXISTS)
                    continue
                entry = self._place(record)
                if isinstance(entry, str):
                    outcomes[index] = PutOutcome(PutState.REFUSED, entry)
                    self._counts.refused += 1
                else:
                    placed[index] = entry
                    coming.add(record.key)
        jobs = [partial(entry.fill, records[index]) for index, entry in placed.items()]
        self._workers.run(jobs, sum(entry.info.payload_bytes for entry in placed.values()))
        with self._lock:
            for index, entry in reversed(placed.items()):
                outcomes[index] = self._publish(entry)
        return [outcomes[index] for index in range(len(records))]

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]."""
        with self._lock:
            return np.fromiter((key in self._entries for key in keys), dtype=np.bool_, count=len(keys))

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Copy bytes out, each extent verified; a record with a wrong one is dropped."""
        with self._lock:
            found = [self._entries.get(request.key) for request in requests]
            for entry in found:
                if entry is not None:
                    entry.readers += 1
        jobs = [partial(_read, entry, request) for entry, request in zip(found, requests, strict=True)]
        results: list[bool | None] = [None] * len(requests)
        try:
            results = self._workers.run(jobs, sum(request.into.numel() for request in requests))
        finally:
            with self._lock:
                for entry, request, right in reversed(list(zip(found, requests, results, strict=True))):
                    self._finish_read(entry, request, right)
        return [right is True for right in results]

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Keep those of ``keys`` that exist for a while; a use of them."""
        with self._lock:
            there = [key for key in keys if key in self._entries]
            for key in reversed(there):
                self._order.used(key)
            return self._leases.take(there, owner=owner, seconds=seconds)

    def info(self, key: bytes) -> RecordInfo | None:
        """What is known of a record."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else replace(entry.info, hits=entry.hits)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record, in the order they were stored."""
        with self._lock:
            keys = list(self._entries)
        for key in keys:
            if (info := self.info(key)) is not None:
                yield info

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records, leased or not; how many there were."""
        with self._lock:
            return sum(self._remove(key, evicted=False) for key in keys)

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all; how many there were."""
        with self._lock:
            keys = [key for key, entry in self._entries.items() if tenant in (None, entry.info.tenant)]
            return sum(self._remove(key, evicted=False) for key in keys)

    def stats(self) -> RecordStats:
        """Counters and bytes, consistent with each other."""
        with self._lock:
            leased = [self._entries[key] for key in self._leases.keys() if key in self._entries]  # noqa: SIM118
            return RecordStats(
                records=len(self._entries),
                live_bytes=sum(self._tenants.values()),
                held_bytes=self._slots.allocated_bytes + self._index_bytes,
                capacity_bytes=self._capacity_bytes,
                leased_bytes=sum(entry.held_bytes for entry in leased),
                degraded="closed" if self._closed else "",
                tenants=dict(self._tenants),
                **asdict(self._counts),
            )

    def capabilities(self) -> Capabilities:
        """Pinned, as long as CUDA locked all of it."""
        return replace(self._slots.capabilities(), name="host records")

    def flush(self) -> None:
        """Nothing in memory survives a power loss."""

    def close(self) -> None:
        """Give all memory back; calls under way end with the memory they began with."""
        with self._lock:
            self._closed = True
            for key in list(self._entries):
                self._remove(key, evicted=False)
            self._slots.close()
        self._workers.close()

    def resize(self, capacity_bytes: int) -> None:
        """Forget everything and go on with another capacity; leases are of no avail.

        Raises
        ------
        ConfigError
            A capacity that holds no record; nothing changed.
        """
        slots = _slots_within(capacity_bytes)
        with self._lock:
            for key in list(self._entries):
                self._remove(key, evicted=True)
            self._slots.close()
            self._slots = slots
            self._capacity_bytes = capacity_bytes

    def _place(self, record: Record) -> _Entry | str:
        """Units for a record, or why there are none; called with the lock held."""
        slots = self._slots
        entry = _Entry(_info_of(record, next(self._sequence)), slots, np.empty(0, np.int64), [])
        units = -(-record.payload_bytes // slots.slot_bytes)
        if reason := "the host tier is closed" if self._closed else self._make_room(units, entry.index_bytes):
            return reason
        try:
            entry.units = slots.reserve(units)
            entry.views = slots.views(entry.units)
        except CapacityError as error:
            self._counts.failed += 1
            return str(error)
        self._index_bytes += entry.index_bytes
        return entry

    def _make_room(self, units: int, index_bytes: int) -> str:
        """Evict until ``units`` are free and the index has room; or say why that cannot be, with nothing evicted."""
        units -= self._slots.free_slots
        index_bytes += self._index_bytes - self._capacity_bytes // _INDEX_SHARE
        victims = []
        candidates = self._order.candidates()
        while units > 0 or index_bytes > 0:
            key = next(candidates, None)
            if key is None:
                return (
                    f"the host tier has no room: {format_bytes(self._capacity_bytes)}, the rest of it leased or in use"
                )
            entry = self._entries[key]
            if not entry.readers and not self._leases.holds(key):
                victims.append(key)
                units -= entry.units.size
                index_bytes -= entry.index_bytes
        for key in victims:
            self._remove(key, evicted=True)
        return ""

    def _publish(self, entry: _Entry) -> PutOutcome:
        """Let a filled entry be seen; called with the lock held."""
        key, counts = entry.info.key, self._counts
        if self._closed or entry.slots is not self._slots or key in self._entries:
            entry.removed = True
            self._free(entry)
            if key in self._entries:
                return PutOutcome(PutState.EXISTS)
            counts.refused += 1
            return PutOutcome(PutState.REFUSED, "the host tier was closed or resized meanwhile")
        self._entries[key] = entry
        self._order.added(key, entry.held_bytes)
        self._tenants[entry.info.tenant] = self._tenants.get(entry.info.tenant, 0) + entry.held_bytes
        counts.stored += 1
        counts.written_bytes += entry.info.payload_bytes
        return PutOutcome(PutState.STORED)

    def _finish_read(self, entry: _Entry | None, request: ReadRequest, right: bool | None) -> None:
        """Count a read and let go of its entry; called with the lock held."""
        if entry is not None:
            entry.readers -= 1
            if entry.removed:
                self._free(entry)
        if entry is None or not right:
            self._counts.misses += 1
        else:
            self._counts.hits += 1
            self._counts.read_bytes += request.into.numel()
            entry.hits += 1
            if not entry.removed:
                self._order.used(request.key)
        if entry is not None and right is False:
            self._counts.damaged += 1
            if not entry.removed:
                self._remove(request.key, evicted=False)

    def _remove(self, key: bytes, *, evicted: bool) -> bool:
        """Take a record out of sight; called with the lock held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        entry.removed = True
        self._order.removed(key, evicted=evicted)
        self._counts.evicted += evicted
        left = self._tenants.pop(entry.info.tenant) - entry.held_bytes
        if left:
            self._tenants[entry.info.tenant] = left
        self._free(entry)
        return True

    def _free(self, entry: _Entry) -> None:
        """Give a removed entry's memory back, unless somebody reads it; called with the lock held."""
        if entry.readers == 0:
            self._index_bytes -= entry.index_bytes
            entry.views = []
            if entry.slots is self._slots and not self._closed:
                entry.slots.release(entry.units)


def _slots_within(capacity_bytes: int) -> HostSlots:
    """Units for payloads within a capacity, less the part of the index."""
    unit_bytes = max(PAGE_BYTES, round_up(-(-capacity_bytes // _MAX_UNITS), PAGE_BYTES))
    units = HostSlots.slots_within(unit_bytes, capacity_bytes - capacity_bytes // _INDEX_SHARE)
    if units < 1:
        raise ConfigError(
            f"host memory for records must be at least {format_bytes(2 * PAGE_BYTES)}, "
            f"got {format_bytes(capacity_bytes)}"
        )
    return HostSlots(unit_bytes, units)


def _info_of(record: Record, sequence: int) -> RecordInfo:
    return RecordInfo(
        key=record.key,
        namespace=record.namespace,
        tenant=record.tenant,
        payload_bytes=record.payload_bytes,
        meta=record.meta,
        sequence=sequence,
        created=time.time(),
    )


def _read(entry: _Entry | None, request: ReadRequest) -> bool | None:
    return None if entry is None else entry.read(request)
