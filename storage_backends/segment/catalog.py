"""Everything that is known of the records, under one lock that no transfer holds."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kvtier.record import SegmentKind
from kvtier.storage_backends.names import Names
from kvtier.storage_backends.record_counts import RecordCounts
from kvtier.storage_backends.record_table import NOWHERE, IndexArray, KeyArray, RecordTable
from kvtier.storage_backends.records import BoolArray
from kvtier.storage_backends.segment.changes import Changes, SegmentMark
from kvtier.storage_backends.segment.leases import LeaseBook, SegmentLease
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.rows import FIELDS, GRAVE, HEAT, ROW, Rows, join_keys, record_bytes

__all__ = ["Catalog"]

_HEAT_ROWS = 512
_FEW_KEYS = 100  # for more, numpy is faster


class Catalog:
    """Records, leases, counters, and what the index has not been told yet.

    Attributes
    ----------
    lock : RLock
        Held for every call here and for changes of a segment's bookkeeping; never during a transfer.
    drained : Condition
        On ``lock``; notified when a reader leaves a segment or a writer is done with one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.drained = threading.Condition(self.lock)
        self.table = RecordTable(FIELDS, "segment")
        self.tenants = Names()
        self.namespaces = Names()
        self.counters = RecordCounts()
        self.leases = LeaseBook(self.table, self.lock)
        self.live_bytes: defaultdict[int, int] = defaultdict(int)
        self.tenant_bytes: defaultdict[int, int] = defaultdict(int)
        self.sequence = 1
        self.tombstones: defaultdict[int, list[int]] = defaultdict(list)
        self._writing: set[bytes] = set()
        self._changes = Changes()

    def begin(self, keys: Sequence[bytes]) -> BoolArray:
        """Claim keys to be written, once nobody else writes one of them; True where a record is there already.

        Those that are not there are the caller's until `end`, so that no key is ever written twice at a time.
        """
        with self.lock:
            self.drained.wait_for(lambda: self._writing.isdisjoint(keys))
            there = self.contains(keys)
            self._writing.update(key for key, known in zip(keys, there.tolist(), strict=True) if not known)
            return there

    def end(self, keys: Sequence[bytes]) -> None:
        """Let claimed keys go."""
        with self.lock:
            self._writing.difference_update(keys)
            self.drained.notify_all()

    def contains(self, keys: Sequence[bytes]) -> BoolArray:
        """Which keys have a record."""
        with self.lock:
            return self.find(keys) >= 0

    def find(self, keys: Sequence[bytes]) -> IndexArray:
        """Row of each key, -1 where there is none; the caller holds the lock as long as it uses them."""
        return self.table.find(join_keys(list(keys)))

    def take_sequences(self, count: int) -> int:
        """First of ``count`` new sequence numbers."""
        with self.lock:
            first = self.sequence
            self.sequence += count
            return first

    def publish(self, rows: Rows) -> None:
        """Make records `ROW` [n] visible, whose keys the caller claimed: nobody else entered one since."""
        with self.lock:
            self.enter(rows)
            self._changes.rows.append(rows)

    def enter(self, rows: Rows) -> None:
        """Add records that are distinct and not there, without a word to the index."""
        self.table.insert(rows["key"], rows["at"])
        self._count(rows["at"], 1)

    def tell(self, rows: Rows) -> None:
        """Have the index told of records `ROW` [n] that are entered already."""
        with self.lock:
            self._changes.rows.append(rows)

    def move(self, rows: Rows) -> None:
        """Say where records `ROW` [n] lie now, those of them that are still the same."""
        with self.lock:
            found = self.table.find(rows["key"])
            same = found >= 0
            same[same] &= self.table.at["sequence"][found[same]] == rows["at"]["sequence"][same]
            old, new = found[same], rows[same]
            self._count(self.table.at[old], -1)
            self.table.at[old] = new["at"]
            self._count(new["at"], 1)
            self._changes.rows.append(new)

    def remove(self, rows: IndexArray, *, forever: bool) -> Rows:
        """Take out records; with ``forever`` the index is told to forget them too. Graves `GRAVE` [n]."""
        with self.lock:
            at = self.table.at[rows]
            graves = np.zeros(rows.size, dtype=GRAVE)
            graves["key"] = self.table.keys(rows)
            graves["before"] = at["sequence"] + np.uint64(1)
            self._count(at, -1)
            self.table.remove(rows)
            if forever and rows.size:
                self._changes.graves.append(graves)
            return graves

    def bury(self, keys: KeyArray, before: KeyArray, *, forever: bool) -> int:
        """Take out what stands in graves, keys [n, 4] and sequence numbers [n]; how many there were."""
        with self.lock:
            rows = self.table.find(keys)
            there = rows >= 0
            there[there] &= self.table.at["sequence"][rows[there]] < before[there]
            found = np.unique(rows[there])
            self.remove(found, forever=forever)
            return int(found.size)

    def tell_graves(self, graves: Rows) -> None:
        """Have the index told of graves `GRAVE` [n] of records that are out already, or were never in."""
        with self.lock:
            self._changes.graves.append(graves)

    def put_aside(self, key: bytes, sequence: int) -> None:
        """Take out a record that is in doubt, if it is still that one: it is never served again."""
        with self.lock:
            rows = self.find([key])
            if rows[0] >= 0 and self.table.at["sequence"][rows[0]] == sequence:
                self.remove(rows, forever=True)

    def remember_tombstone(self, segment: int, offset: int) -> None:
        """Say where a tombstone lies, so that it is carried on when its segment goes."""
        with self.lock:
            self.tombstones[segment].append(offset)
            self._changes.tombstones.append((segment, offset))

    def drop_segment(self, number: int) -> None:
        """Say that the life of a segment ended; its records are out already."""
        with self.lock:
            self._changes.dropped.append(number)
            self.tombstones.pop(number, None)
            self._changes.tombstones = [place for place in self._changes.tombstones if place[0] != number]
            self._changes.rows = [rows[rows["at"]["segment"] != number] for rows in self._changes.rows]

    def lease(self, keys: Sequence[bytes], owner: str, seconds: float) -> SegmentLease:
        """Hold those records that are there."""
        with self.lock:
            rows = self.find(keys)
            there = tuple(key for key, row in zip(keys, rows.tolist(), strict=True) if row >= 0)
            return self.leases.grant(owner, there, seconds, rows[rows >= 0])

    def leased_segments(self) -> set[int]:
        """Segments that hold a leased record."""
        with self.lock:
            return set(np.unique(self.table.at["segment"][self.leases.leased_rows()]).tolist()) - {NOWHERE}

    def leased_bytes(self) -> int:
        """Bytes under a lease."""
        with self.lock:
            return int(record_bytes(self.table.at[self.leases.leased_rows()]).sum())

    def rows(self, numbers: IndexArray) -> Rows:
        """Copies of rows as `ROW` [n]."""
        with self.lock:
            rows = np.zeros(numbers.size, dtype=ROW)
            rows["key"] = self.table.keys(numbers)
            rows["at"] = self.table.at[numbers]
            return rows

    def heat(self) -> Rows:
        """Reads of the records that were read most, as `HEAT` [n], so that another opening knows of them."""
        with self.lock:
            live = self.table.live()
            hits = self.table.at["hits"][live]
            most = np.argsort(hits, kind="stable")[-_HEAT_ROWS:]
            rows = np.zeros(most.size, dtype=HEAT)
            rows["key"], rows["hits"] = self.table.keys(live[most]), hits[most]
            return rows[rows["hits"] > 0]

    def warm(self, heat: Rows) -> None:
        """Take over what was read most before."""
        with self.lock:
            rows = self.table.find(heat["key"])
            self.table.at["hits"][rows[rows >= 0]] = heat["hits"][rows >= 0]

    def take_changes(self, segments: Sequence[Segment], epoch: int) -> Changes:
        """Everything since the last call, with how far it covers each segment."""
        with self.lock:
            changes, self._changes = self._changes, Changes()
            changes.tenants = self.tenants.take_new()
            changes.namespaces = self.namespaces.take_new()
            changes.sequence = self.sequence
            changes.epoch = epoch
            changes.marks = {
                segment.number: SegmentMark(segment.epoch, segment.settled, segment.min_sequence)
                for segment in segments
                if segment.kind is SegmentKind.CACHE
            }
            return changes

    def _count(self, at: Rows, sign: int) -> None:
        """Keep the bytes of segments and tenants."""
        sizes = record_bytes(at) * sign
        for totals, column in ((self.live_bytes, "segment"), (self.tenant_bytes, "tenant")):
            if sizes.size <= _FEW_KEYS:
                for name, size in zip(at[column].tolist(), sizes.tolist(), strict=True):
                    totals[name] += size
                continue
            names, where = np.unique(at[column], return_inverse=True)
            sums = np.bincount(where, weights=sizes, minlength=names.size).astype(np.int64)
            for name, total in zip(names.tolist(), sums.tolist(), strict=True):
                totals[name] += total
