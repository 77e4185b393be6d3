"""Records in host memory: verified when they are read, evicted in an order that can be replaced."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import compress, takewhile
from operator import not_

from kvtier.errors import CapacityError
from kvtier.storage_backends.base import Capabilities
from kvtier.storage_backends.eviction import EvictionOrder
from kvtier.storage_backends.host_arena import HostArena, Place
from kvtier.storage_backends.host_entry import HostEntry, copying, fill
from kvtier.storage_backends.host_index import HostIndex, index_bytes_of
from kvtier.storage_backends.leases import LeaseBook
from kvtier.storage_backends.order import LeastRecentlyUsed
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
    order : EvictionOrder, optional
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
        order: EvictionOrder | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._lendable_bytes = lendable_bytes
        self._lent_bytes = 0
        self._arena = HostArena(_payload_share(capacity_bytes - lendable_bytes), _payload_share(lendable_bytes))
        self._index = HostIndex(self._arena, order or LeastRecentlyUsed())
        self._coming_bytes = 0  # what the index will take for records that are being copied in
        self._reading: dict[int, HostEntry] = {}  # by row: records that somebody reads
        self._workers = workers or Workers()
        self._lock = threading.Lock()
        self._leases = LeaseBook()
        self._counts = RecordCounts()
        self._closed = False

    def put(self, records: Sequence[Record]) -> list[PutOutcome]:
        """Copy records in; one that finds no room beside what is leased is refused."""
        outcomes: dict[int, PutOutcome] = {}
        placed: dict[int, Place] = {}
        with self._lock:
            coming: set[bytes] = set()
            for index, record in enumerate(records):
                if record.key in coming or self._row(record.key) is not None:
                    outcomes[index] = PutOutcome(PutState.EXISTS)
                    continue
                place = self._place(record)
                if isinstance(place, str):
                    outcomes[index] = PutOutcome(PutState.REFUSED, place)
                    self._counts.refused += 1
                else:
                    placed[index] = place
                    coming.add(record.key)
        jobs = [partial(fill, place, records[index]) for index, place in placed.items()]
        filled = self._workers.run(jobs, sum(records[index].payload_bytes for index in placed))
        with self._lock:
            digests = dict(zip(placed, filled, strict=True))
            outcomes |= self._publish(records, placed, digests)
        return [outcomes[index] for index in range(len(records))]

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record [n]."""
        with self._lock:
            return self._index.find(keys) >= 0

    def read(self, requests: Sequence[ReadRequest]) -> list[bool]:
        """Copy bytes out, each extent verified; a record with a wrong one is dropped."""
        sizes = [request.into.numel() for request in requests]
        with self._lock:
            entries = self._open([request.key for request in requests])
        results: list[bool | None] = [None] * len(requests)
        try:
            results = self._workers.run(list(map(copying, entries, requests)), sum(sizes))
        finally:
            with self._lock:
                self._finish(entries, sizes, results)
        return [right is True for right in results]

    @contextmanager
    def view(self, keys: Sequence[bytes]) -> Iterator[Sequence[RecordView]]:
        """Payloads where they lie, as long as each lies in one piece; they stay there until the block ends."""
        with self._lock:
            entries = self._open_leading(keys)
        found = [entry.view() for entry in entries]
        try:
            yield found
        finally:
            with self._lock:
                self._finish_views(entries, found)

    def lease(self, keys: Sequence[bytes], *, owner: str, seconds: float) -> Lease:
        """Keep those of ``keys`` that exist for a while; a use of them."""
        with self._lock:
            rows = self._index.find(keys).tolist()
            there = [key for key, row in zip(keys, rows, strict=True) if row >= 0]
            self._index.used([row for row in reversed(rows) if row >= 0])
            return self._leases.take(there, owner=owner, seconds=seconds)

    def info(self, key: bytes) -> RecordInfo | None:
        """What is known of a record."""
        with self._lock:
            row = self._row(key)
            return None if row is None else self._index.info(row)

    def scan(self) -> Iterator[RecordInfo]:
        """Every record, in the order they were stored."""
        with self._lock:
            keys = [self._index.key(row) for row in self._index.rows().tolist()]
        for key in keys:
            if (info := self.info(key)) is not None:
                yield info

    def delete(self, keys: Sequence[bytes]) -> int:
        """Forget records, leased or not; how many there were."""
        with self._lock:
            rows = self._index.find(list(dict.fromkeys(keys))).tolist()
            return self._remove([row for row in rows if row >= 0], evicted=False)

    def clear(self, tenant: str | None = None) -> int:
        """Forget every record of a tenant, or all; how many there were."""
        with self._lock:
            rows = self._index.rows() if tenant is None else self._index.rows_of(tenant)
            return self._remove(rows.tolist(), evicted=False)

    def stats(self) -> RecordStats:
        """Counters and bytes, consistent with each other."""
        with self._lock:
            leased = [row for row in self._index.find(self._leases.keys()).tolist() if row >= 0]
            return RecordStats(
                records=len(self._index),
                live_bytes=self._index.tenant_bytes.total(),
                held_bytes=self._arena.held_bytes + self._index_bytes,
                capacity_bytes=self._room_bytes,
                leased_bytes=sum(map(self._index.held_bytes, leased)),
                degraded="closed" if self._closed else "",
                tenants=dict(self._index.tenant_bytes),
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
            self._remove(self._index.rows().tolist(), evicted=False)
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
            moving = self._index.lendable_rows()
            missing = sum(self._index.place(row).units for row in moving) - self._arena.kept.free_slots
            excess = self._index_bytes - (self._capacity_bytes - self._lendable_bytes) // _INDEX_SHARE
            evictable, victims = self._evictable(), []
            while missing > 0 or excess > 0:
                if (row := next(evictable, None)) is None:
                    raise CapacityError("records under lease fill the host tier; release the hits that hold them")
                victims.append(row)
                missing -= self._index.place(row).units
                excess -= self._index.index_bytes(row)
            self._remove(victims, evicted=True)
            for row in set(moving).difference(victims):
                self._move(row)
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

    @property
    def _index_bytes(self) -> int:
        return self._index.nbytes + self._coming_bytes

    def _row(self, key: bytes) -> int | None:
        """The row of a key; called with the lock held, as all that follow are."""
        row = int(self._index.find([key])[0])
        return None if row < 0 else row

    def _place(self, record: Record) -> Place | str:
        """A place for a record, or why there is none."""
        if self._closed:
            return "the host tier is closed"
        self._index.missed(record.key)
        if reason := self._make_room(record):
            return reason
        try:
            place = self._arena.reserve(record.payload_bytes)
        except CapacityError as error:
            self._counts.failed += 1
            return str(error)
        taken = index_bytes_of(record, place)
        if place.spans[1:] and self._index_bytes + taken > self._room_bytes // _INDEX_SHARE:
            self._arena.release(place)
            return "the index has no room for a record in so many pieces"
        self._coming_bytes += taken
        return place

    def _make_room(self, record: Record) -> str:
        """Evict until a record finds room; or say why not, with nothing evicted."""
        units, free = self._arena.units_for(record.payload_bytes), self._arena.free_units()
        excess = self._index_bytes + index_bytes_of(record) - self._room_bytes // _INDEX_SHARE
        evictable, victims = self._evictable(), []
        while max(free.values()) < units or excess > 0:
            if (row := next(evictable, None)) is None:
                return f"no room in {format_bytes(self._room_bytes)} of host memory beside what is leased or in use"
            place = self._index.place(row)
            victims.append(row)
            free[place.part] += place.units
            excess -= self._index.index_bytes(row)
        self._remove(victims, evicted=True)
        return ""

    def _evictable(self) -> Iterator[int]:
        """Rows of records that may leave, the first to leave first; nothing may be removed while this is read."""
        for row in self._index.candidates():
            if row not in self._reading and not self._leases.holds(self._index.key(row)):
                yield row

    def _publish(
        self, records: Sequence[Record], placed: Mapping[int, Place], digests: Mapping[int, bytes]
    ) -> dict[int, PutOutcome]:
        """Let filled records be seen."""
        outcomes: dict[int, PutOutcome] = {}
        stored: list[int] = []
        for index, place in placed.items():
            self._coming_bytes -= index_bytes_of(records[index], place)
            if self._row(records[index].key) is not None:
                outcomes[index] = PutOutcome(PutState.EXISTS)
                self._arena.release(place)
            elif self._closed or self._arena.is_gone(place):
                outcomes[index] = PutOutcome(PutState.REFUSED, "the host tier was closed or lent meanwhile")
                self._counts.refused += 1
            else:
                outcomes[index] = PutOutcome(PutState.STORED)
                stored.append(index)
        self._counts.stored += len(stored)
        self._counts.written_bytes += sum(records[index].payload_bytes for index in stored)
        self._index.add([(records[index], placed[index], digests[index]) for index in stored])
        return outcomes

    def _open(self, keys: Sequence[bytes]) -> list[HostEntry | None]:
        """Begin to read the records of some keys."""
        rows: list[int] = self._index.find(keys).tolist()
        opened = self._reading
        for row, views, size, digests in self._index.payloads([row for row in rows if row >= 0 and row not in opened]):
            opened[row] = HostEntry(row, views, size, digests)
        entries = [opened.get(row) for row in rows]
        for entry in filter(None, entries):
            entry.readers += 1
        return entries

    def _open_leading(self, keys: Sequence[bytes]) -> list[HostEntry]:
        """Begin to read leading records that are there and lie in one piece."""
        entries = self._open(keys)
        leading = list(filter(None, takewhile(_is_whole, entries)))
        for entry in filter(None, entries[len(leading) :]):
            self._close(entry)
        return leading

    def _close(self, entry: HostEntry) -> None:
        """End to read a record; whoever is the last to do so frees what was removed meanwhile."""
        entry.readers -= 1
        if entry.readers:
            return
        if entry.left is None:
            del self._reading[entry.row]
        else:
            self._arena.release(entry.left)

    def _finish(
        self, entries: Sequence[HostEntry | None], sizes: Sequence[int], results: Sequence[bool | None]
    ) -> None:
        """Count reads and let go of their entries, the first used last; a result is None for what was never there."""
        counts, used, damaged = self._counts, [], []
        for entry, nbytes, right in zip(reversed(entries), reversed(sizes), reversed(results), strict=True):
            if entry is not None:
                self._close(entry)
            if entry is None or not right:
                counts.misses += 1
            else:
                counts.hits += 1
                counts.read_bytes += nbytes
                used += [entry.row] if entry.left is None else []
            if entry is not None and right is False:
                counts.damaged += 1
                damaged += [entry.row] if entry.left is None else []
        self._index.read(used)
        self._remove(list(dict.fromkeys(damaged)), evicted=False)

    def _finish_views(self, entries: Sequence[HostEntry], found: Sequence[RecordView]) -> None:
        """Count views that were read to their end or proved damaged; let go of the others."""
        ended = [view.damaged or view.served for view in found]
        for entry in compress(entries, map(not_, ended)):
            self._close(entry)
        read, results = list(compress(entries, ended)), [not view.damaged for view in compress(found, ended)]
        self._finish(read, [entry.payload_bytes for entry in read], results)

    def _remove(self, rows: Sequence[int], *, evicted: bool) -> int:
        """Take distinct records out of sight, their memory too unless somebody reads it; how many."""
        for row in rows:
            place, entry = self._index.place(row), self._reading.pop(row, None)
            if entry is None:
                self._arena.release(place)
            else:
                entry.left = place
        self._index.remove(rows, evicted=evicted)
        self._counts.evicted += len(rows) if evicted else 0
        return len(rows)

    def _move(self, row: int) -> None:
        """Move a record out of the part that will be lent."""
        place = self._arena.moved(self._index.place(row))
        self._index.move(row, place)
        if row in self._reading:
            self._reading[row].views = place.views


def _is_whole(entry: HostEntry | None) -> bool:
    return entry is not None and len(entry.views) == 1


def _payload_share(capacity_bytes: int) -> int:
    return capacity_bytes - capacity_bytes // _INDEX_SHARE
