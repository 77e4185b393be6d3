"""What is known of records in host memory: a row of fixed size each, and the order in which they leave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from kvtier.storage_backends.eviction import EvictionOrder
from kvtier.storage_backends.extents import digest_bytes
from kvtier.storage_backends.host_arena import HostArena, Place
from kvtier.storage_backends.memory import ByteRows
from kvtier.storage_backends.names import Names
from kvtier.storage_backends.record_table import IndexArray, RecordTable, join_keys
from kvtier.storage_backends.records import Record, RecordInfo

__all__ = ["HostIndex", "index_bytes_of"]

_FIELDS = np.dtype(
    [
        ("sequence", "<u8"),
        ("payload", "<u8"),  # bytes
        ("unit", "<u4"),  # number of the first in the arena
        ("created", "<u4"),  # seconds since 1970
        ("tenant", "<u4"),
        ("namespace", "<u4"),
        ("hits", "<u4"),
    ]
)
_LEFT = 0xFFFFFFFE
"""The unit of a row whose record left, while the order still knows it."""

_ROW_BYTES = 176  # at most, what table, order and Python keep for a record beside its digests and metadata
_SPANS_BYTES = 256  # the same for a place in pieces
_SPAN_BYTES = 128
_SLACK = 64


def _index_bytes(payload_bytes: int, meta_bytes: int, spans: int) -> int:
    """What the index takes for a record, its digests and metadata included."""
    pieces = _SPANS_BYTES + _SPAN_BYTES * spans if spans > 1 else 0
    return _ROW_BYTES + digest_bytes(payload_bytes) + meta_bytes + pieces


def index_bytes_of(record: Record, place: Place | None = None) -> int:
    """What the index will take for a record; side by side, unless its place is known."""
    return _index_bytes(record.payload_bytes, len(record.meta), 1 if place is None else len(place.spans))


class HostIndex:
    """Records by key, where they lie and who leaves first. Not thread-safe: the owner holds a lock.

    Parameters
    ----------
    arena : HostArena
        Where the records lie.
    order : EvictionOrder
        Asked about the numbers of rows. Rows of records that left stay as long as it remembers them; each takes about
        100 bytes, beside the capacity of the tier.

    Attributes
    ----------
    nbytes : int
        What it takes for the records that are there.
    tenant_bytes : Counter
        What the records of each tenant hold in all, padding and index included; by name.
    """

    def __init__(self, arena: HostArena, order: EvictionOrder) -> None:
        self._arena = arena
        self._order = order
        self._table = RecordTable(_FIELDS, "unit")
        self._rest: list[bytes] = []  # by row: digests, then metadata
        self._pieces: dict[int, Place] = {}  # places that are not side by side
        self._tenants, self._namespaces = Names(), Names()
        self._sequence = 1
        self._left = 0
        self._most_left = _SLACK
        self.nbytes = 0
        self.tenant_bytes: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._table.count - self._left

    def find(self, keys: Sequence[bytes]) -> IndexArray:
        """Row of each key, -1 where there is no record."""
        rows = self._table.find(join_keys(list(keys)))
        if self._left:
            rows[self._table.at["unit"][rows] == _LEFT] = -1
        return rows

    def rows(self) -> IndexArray:
        """Rows of all records, in the order they were stored."""
        rows = self._table.live()
        rows = rows[self._table.at["unit"][rows] != _LEFT]
        in_order: IndexArray = rows[np.argsort(self._table.at["sequence"][rows])]
        return in_order

    def rows_of(self, tenant: str) -> IndexArray:
        """Rows of the records of a tenant."""
        number = self._tenants.find(tenant.encode())
        rows = self.rows()
        return rows[:0] if number is None else rows[self._table.at["tenant"][rows] == number]

    def lendable_rows(self) -> list[int]:
        """Rows of the records in the part that can be lent."""
        rows = self.rows()
        lendable: IndexArray = rows[self._table.at["unit"][rows] >= self._arena.lendable_from]
        found: list[int] = lendable.tolist()
        return found

    def key(self, row: int) -> bytes:
        """Key of a row."""
        return self._table.keys(np.array([row])).tobytes()

    def payload_bytes(self, row: int) -> int:
        """Bytes of a payload."""
        return int(self._table.at["payload"][row])

    def payloads(self, rows: Sequence[int]) -> Iterator[tuple[int, list[ByteRows], int, bytes]]:
        """Of each row its number, the memory of its payload, how many bytes it has, and their digests."""
        some = np.array(rows, dtype=np.int64)
        numbers, sizes = self._table.at["unit"][some].tolist(), self._table.at["payload"][some].tolist()
        for row, number, size in zip(rows, numbers, sizes, strict=True):
            pieces = self._pieces.get(row)
            views = self._arena.views(number, size) if pieces is None else pieces.views
            yield row, views, size, self._rest[row][: digest_bytes(size)]

    def place(self, row: int) -> Place:
        """Where a record lies."""
        found = self._pieces.get(row)
        if found is None:
            units = self._arena.units_for(self.payload_bytes(row))
            found = self._arena.place_of(int(self._table.at["unit"][row]), units)
        return found

    def index_bytes(self, row: int) -> int:
        """What the index takes for a record."""
        pieces = self._pieces.get(row)
        meta_bytes = len(self._rest[row]) - digest_bytes(self.payload_bytes(row))
        return _index_bytes(self.payload_bytes(row), meta_bytes, 1 if pieces is None else len(pieces.spans))

    def held_bytes(self, row: int) -> int:
        """What a record takes in all, padding included."""
        return self._arena.units_for(self.payload_bytes(row)) * self._arena.unit_bytes + self.index_bytes(row)

    def info(self, row: int) -> RecordInfo:
        """What is known of a record."""
        at, rest = self._table.at[row], self._rest[row]
        return RecordInfo(
            key=self.key(row),
            namespace=self._namespaces.values[at["namespace"]],
            tenant=self._tenants.values[at["tenant"]].decode(),
            payload_bytes=int(at["payload"]),
            meta=rest[digest_bytes(int(at["payload"])) :],
            sequence=int(at["sequence"]),
            created=float(at["created"]),
            hits=int(at["hits"]),
        )

    def missed(self, key: bytes) -> None:
        """Say that a key is not there, before room is made for it."""
        if self._left and (row := self._table.find(join_keys([key])))[0] >= 0:
            self._order.miss(row)

    def add(self, filled: Sequence[tuple[Record, Place, bytes]]) -> None:
        """Enter records that are not there, each with its digests; of these the last counts as the oldest."""
        if not filled:
            return
        rows = self._enter(filled)
        self._rest += [b""] * (int(rows.max()) + 1 - len(self._rest))
        for row, (record, place, digests) in zip(rows.tolist(), filled, strict=True):
            self._rest[row] = digests + record.meta
            if len(place.spans) > 1:
                self._pieces[row] = place
            self.nbytes += self.index_bytes(row)
            self.tenant_bytes[record.tenant] += self.held_bytes(row)
        self._order.admit(rows[::-1])

    def _enter(self, filled: Sequence[tuple[Record, Place, bytes]]) -> IndexArray:
        """Rows for new records; those that the order remembers have one."""
        keys = join_keys([record.key for record, _, _ in filled])
        at = np.zeros(len(filled), dtype=_FIELDS)
        at["sequence"] = np.arange(self._sequence, self._sequence + len(filled))
        at["payload"] = [record.payload_bytes for record, _, _ in filled]
        at["unit"] = [self._arena.number_of(place) for _, place, _ in filled]
        at["created"] = int(time.time())
        at["tenant"] = [self._tenants.number(record.tenant.encode()) for record, _, _ in filled]
        at["namespace"] = [self._namespaces.number(record.namespace) for record, _, _ in filled]
        self._sequence += len(filled)
        rows = self._table.find(keys)
        known = rows >= 0
        self._left -= int(np.count_nonzero(known))
        self._table.at[rows[known]] = at[known]
        rows[~known] = self._table.insert(keys[~known], at[~known])
        return rows

    def used(self, rows: Sequence[int]) -> None:
        """Say that records were used, the last of them latest."""
        if rows:
            self._order.hit(np.array(list(dict.fromkeys(reversed(rows)))[::-1], dtype=np.int64))

    def read(self, rows: Sequence[int]) -> None:
        """Count reads of records, which are uses, the last of them latest."""
        hits = self._table.at["hits"]
        for row in rows:  # numpy has a way that costs ten times as much
            hits[row] += 1
        self.used(rows)

    def candidates(self) -> Iterator[int]:
        """Rows of records, the first to leave first; nothing may happen to the index while this is read."""
        seen: set[int] = set()
        count = 1  # an order moves its hand by as many as it is asked for
        while len(seen) < self._order.residents:
            more = [row for row in self._order.victims(count).tolist() if row not in seen]
            seen.update(more)
            yield from more
            count *= 4

    def move(self, row: int, place: Place) -> None:
        """Say where a record lies now."""
        taken = self.index_bytes(row)
        self._table.at["unit"][row] = self._arena.number_of(place)
        self._pieces.pop(row, None)
        if len(place.spans) > 1:
            self._pieces[row] = place
        more = self.index_bytes(row) - taken
        self.nbytes += more
        self.tenant_bytes[self._tenant(row)] += more

    def remove(self, rows: Sequence[int], *, evicted: bool) -> None:
        """Take records out: for room, or to be forgotten."""
        if not rows:
            return
        for row in rows:
            tenant = self._tenant(row)
            self.nbytes -= self.index_bytes(row)
            self.tenant_bytes[tenant] -= self.held_bytes(row)
            if not self.tenant_bytes[tenant]:
                del self.tenant_bytes[tenant]
            self._rest[row] = b""
            self._pieces.pop(row, None)
        gone = np.array(rows, dtype=np.int64)
        if not evicted:
            self._order.forget(gone)
            self._table.remove(gone)
            return
        self._order.evict(gone)
        known = self._order.remembers(gone)
        self._table.at["unit"][gone[known]] = _LEFT
        self._left += int(np.count_nonzero(known))
        self._table.remove(gone[~known])
        if self._left > self._most_left:
            self._collect()

    def _collect(self) -> None:
        """Take rows back that the order no longer knows."""
        left = self._table.lying_at(_LEFT)
        gone = left[~self._order.remembers(left)]
        self._table.remove(gone)
        self._left -= gone.size
        self._most_left = self._left + self._left // 4 + _SLACK

    def _tenant(self, row: int) -> str:
        return self._tenants.values[int(self._table.at["tenant"][row])].decode()
