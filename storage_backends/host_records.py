"""Records in host memory: verified when they are read, evicted in an order that can be replaced."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch

from kvtier.errors import CapacityError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.extents import EXTENT_BYTES
from kvtier.storage_backends.host_arena import HostArena
from kvtier.storage_backends.host_entry import HostEntry, index_bytes, info_of
from kvtier.storage_backends.leases import LeaseBook
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.order import LeastRecentlyUsed, RecordOrder
from kvtier.storage_backends.record_counts import RecordCounts
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
    RecordView,
)
from kvtier.storage_backends.workers import Workers
from kvtier.types import format_bytes

__all__ = ["HostRecords"]

_INDEX_SHARE = 32  # of the capacity, one part is for the index


class HostRecords(RecordStore):
    """Records in host memory, page-locked where CUDA allows it.

    Of the records of one `put`, `lease` or `read` the last leaves first: what is left of a prefix is a prefix.

    Parameters
    ----------
    capacity_bytes : int
        The hard bound, of which one part in 32 is for the index.
    lendable_bytes : int
        Of these, what `lend` gives up.
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
        self,
        capacity_bytes: int,
        *,
        lendable_bytes: int = 0,
        order: RecordOrder | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._lendable_bytes = lendable_bytes
        self._lent_bytes = 0
        self._arena = HostArena(_payload_share(capacity_bytes - lendable_bytes), _payload_share(lendable_bytes))
        self._order = order or LeastRecentlyUsed()
        self._workers = workers or Workers()
        self._lock = threading.Lock()
        self._entries: dict[bytes, HostEntry] = {}
        self._tenants: dict[str, int] = {}
        self._index_bytes = 0
        self._leases = LeaseBook()
        self._sequence = itertools.count(1)
        self._counts = RecordCounts()
        self._closed = False

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Copy records in; one that finds no room beside what is leased is refused."""
        outcomes: dict[int, PutOutcome] = {}
        placed: dict[int, HostEntry] = {}
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
            for index, entry in placed.items():
                outcomes[index] = self._publish(entry)
            for entry in reversed(placed.values()):
                if not entry.removed:
                    self._order.added(entry.info.key, entry.held_bytes)
        return [outcomes[index] for index in range(len(records))]

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]."""
        with self._lock:
            return np.fromiter((key in self._entries for key in keys), dtype=np.bool_, count=len(keys))

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Copy bytes out, each extent verified; a record with a wrong one is dropped."""
        with self._lock:
            found = [self._entries.get(request.key) for request in requests]
            views = [entry.place.views if entry is not None else [] for entry in found]
            for entry in found:
                if entry is not None:
                    entry.readers += 1
        jobs = [
            partial(_read, entry, views, request) for entry, views, request in zip(found, views, requests, strict=True)
        ]
        results: list[bool | None] = [None] * len(requests)
        try:
            results = self._workers.run(jobs, sum(request.into.numel() for request in requests))
        finally:
            with self._lock:
                for entry, request, right in reversed(list(zip(found, requests, results, strict=True))):
                    self._finish_read(entry, request, right)
        return [right is True for right in results]

    @contextmanager
    def view(self, key: bytes) -> Iterator[RecordView | None]:
        """A payload where it lies, if it lies in one piece; it stays there until the block ends."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or len(entry.place.views) != 1:
                entry = None
            else:
                entry.readers += 1
                views = entry.place.views
        if entry is None:
            yield None
            return
        payload = torch.from_numpy(views[0])[: entry.info.payload_bytes]
        found = RecordView(payload, partial(entry.verified, views), EXTENT_BYTES)
        try:
            yield found
        finally:
            with self._lock:
                self._finish_read(entry, ReadRequest(key, payload), not found.damaged)

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
                held_bytes=self._arena.held_bytes + self._index_bytes,
                capacity_bytes=self._room_bytes,
                leased_bytes=sum(entry.held_bytes for entry in leased),
                degraded="closed" if self._closed else "",
                tenants=dict(self._tenants),
                **asdict(self._counts),
            )

    def capabilities(self) -> Capabilities:
        """Pinned, as long as CUDA locked all of it."""
        return replace(self._arena.capabilities(), name="host records")

    def flush(self) -> None:
        """Nothing in memory survives a power loss."""

    def close(self) -> None:
        """Give all memory back; calls under way end with the memory they began with."""
        with self._lock:
            self._closed = True
            for key in list(self._entries):
                self._remove(key, evicted=False)
            self._arena.close()
        self._workers.close()

    def lend(self) -> int:
        """Give up the lendable bytes until `take_back`; how many. The records used last stay, in what is left.

        Raises
        ------
        CapacityError
            Leases hold more than what is left; nothing changed.
        """
        with self._lock:
            moving = [entry for entry in self._entries.values() if self._arena.is_lendable(entry.place)]
            missing = sum(entry.place.units.size for entry in moving) - self._arena.kept.free_slots
            excess = self._index_bytes - (self._capacity_bytes - self._lendable_bytes) // _INDEX_SHARE
            evictable, victims = self._evictable(), []
            while missing > 0 or excess > 0:
                if (entry := next(evictable, None)) is None:
                    raise CapacityError("records under lease fill the host tier; release the hits that hold them")
                victims.append(entry)
                missing -= entry.place.units.size
                excess -= entry.index_bytes
            self._evict(victims)
            for entry in moving:
                if not entry.removed:
                    entry.place = self._arena.moved(entry.place)
            self._arena.lend()
            self._lent_bytes = self._lendable_bytes
            return self._lent_bytes

    def take_back(self) -> None:
        """Have the lendable bytes again."""
        with self._lock:
            if not self._closed:
                self._arena.take_back()
                self._lent_bytes = 0

    @property
    def _room_bytes(self) -> int:
        return self._capacity_bytes - self._lent_bytes

    def _place(self, record: Record) -> HostEntry | str:
        """A place for a record, or why there is none; called with the lock held."""
        info = info_of(record)
        if reason := "the host tier is closed" if self._closed else self._make_room(info):
            return reason
        try:
            place = self._arena.reserve(info.payload_bytes)
        except CapacityError as error:
            self._counts.failed += 1
            return str(error)
        entry = HostEntry(info, place)
        self._index_bytes += entry.index_bytes
        return entry

    def _make_room(self, info: RecordInfo) -> str:
        """Evict until a record finds room; or say why not, with nothing evicted. Called with the lock held."""
        units, free = self._arena.units_for(info.payload_bytes), self._arena.free_units()
        excess = self._index_bytes + index_bytes(info) - self._room_bytes // _INDEX_SHARE
        evictable, victims = self._evictable(), []
        while max(free.values()) < units or excess > 0:
            if (entry := next(evictable, None)) is None:
                return f"no room in {format_bytes(self._room_bytes)} of host memory beside what is leased or in use"
            victims.append(entry)
            free[entry.place.part] += entry.place.units.size
            excess -= entry.index_bytes
        self._evict(victims)
        return ""

    def _evictable(self) -> Iterator[HostEntry]:
        """Records that may leave, the first to leave first; nothing may be removed while this is read."""
        for key in self._order.candidates():
            entry = self._entries[key]
            if not entry.readers and not self._leases.holds(key):
                yield entry

    def _evict(self, victims: Sequence[HostEntry]) -> None:
        for entry in victims:
            self._remove(entry.info.key, evicted=True)

    def _publish(self, entry: HostEntry) -> PutOutcome:
        """Let a filled entry be seen; called with the lock held."""
        key, counts = entry.info.key, self._counts
        if self._closed or self._arena.is_gone(entry.place) or key in self._entries:
            entry.removed = True
            self._free(entry)
            if key in self._entries:
                return PutOutcome(PutState.EXISTS)
            counts.refused += 1
            return PutOutcome(PutState.REFUSED, "the host tier was closed or lent meanwhile")
        entry.info = replace(entry.info, sequence=next(self._sequence))
        self._entries[key] = entry
        self._tenants[entry.info.tenant] = self._tenants.get(entry.info.tenant, 0) + entry.held_bytes
        counts.stored += 1
        counts.written_bytes += entry.info.payload_bytes
        return PutOutcome(PutState.STORED)

    def _finish_read(self, entry: HostEntry | None, request: ReadRequest, right: bool | None) -> None:
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

    def _free(self, entry: HostEntry) -> None:
        """Give a removed entry's memory back, unless somebody reads it; called with the lock held."""
        if entry.readers == 0:
            self._index_bytes -= entry.index_bytes
            self._arena.release(entry.place)


def _payload_share(capacity_bytes: int) -> int:
    return capacity_bytes - capacity_bytes // _INDEX_SHARE


def _read(entry: HostEntry | None, views: Sequence[ByteRows], request: ReadRequest) -> bool | None:
    return None if entry is None else entry.read(views, request)
