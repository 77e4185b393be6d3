"""Which record lies where: a hash table in numpy, for batches of keys that are uniformly random digests."""

from __future__ import annotations

import mmap
import struct
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["NOWHERE", "IndexArray", "KeyArray", "RecordTable", "Rows", "join_keys"]

KeyArray: TypeAlias = npt.NDArray[np.uint64]
IndexArray: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = npt.NDArray[np.void]

_S = TypeVar("_S", bound=np.generic)

NOWHERE = 0xFFFFFFFF
"""The place of a row that holds no record."""

_EMPTY = -1
_GONE = -2
_LEAST_ROWS = 64
_MOST_CHUNKS = 256
_MIX_NUMBER = 0x9E3779B97F4A7C15
_MIX = np.uint64(_MIX_NUMBER)
_LAST_WORD = (1 << 64) - 1
_WORDS = struct.Struct("<4Q")
_KEY_BYTES = 32
_FEW_KEYS = 100
_MAPPED_BYTES = 1 << 20
_KEY = np.dtype([("words", "<u8", (4,))])


class RecordTable:
    """Rows of one type under keys of 32 bytes, in open addressing with linear probing.

    Rows lie in one array, the hash table holds their numbers; a row keeps its number while it lives. Whole keys are
    compared. A batch costs a few numpy operations however large it is. 40 to 56 bytes for a record beside its row, and
    up to a quarter of all in reserve, which is touched only when it is used. Not thread-safe: the owner holds a lock.

    Parameters
    ----------
    fields : dtype
        Of a row.
    place : str
        The field u4 that says where a record lies: any value but `NOWHERE`.

    Attributes
    ----------
    at : Rows
        The rows, by number.
    count : int
        Rows that hold a record.
    """

    def __init__(self, fields: np.dtype[np.void], place: str) -> None:
        self._place = place
        self._keys: KeyArray = np.zeros((_LEAST_ROWS, 4), dtype=np.uint64)
        self.at: Rows = np.zeros(_LEAST_ROWS, dtype=fields)
        self._free: list[IndexArray] = []
        self._used_rows = 0  # rows below it were given out at some time
        self._slots = np.full(4 * _LEAST_ROWS, _EMPTY, dtype=np.int32)
        self._gone = 0
        self.count = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of memory."""
        return self._keys.nbytes + self.at.nbytes + self._slots.nbytes + sum(rows.nbytes for rows in self._free)

    def find(self, keys: KeyArray) -> IndexArray:
        """Row of each key [n, 4], -1 where there is none."""
        if len(keys) <= _FEW_KEYS:
            return self._find_few(keys.tobytes())
        found = np.full(len(keys), -1, dtype=np.int64)
        todo = np.arange(len(keys))
        places = self._home(keys)
        while todo.size:
            rows = self._slots[places]
            same = (self._keys[rows] == keys[todo]).all(axis=1) & (rows >= 0)
            found[todo[same]] = rows[same]
            on = ~same & (rows != _EMPTY)
            todo, places = todo[on], (places[on] + 1) & (self._slots.size - 1)
        return found

    def _find_few(self, keys: bytes) -> IndexArray:
        """The same one key after the other: for a few faster than numpy's operations on arrays."""
        slots, known = self._slots.data, self._keys.data.cast("B")
        shift, last = 64 - (self._slots.size - 1).bit_length(), self._slots.size - 1
        found = []
        for at, (a, b, c, d) in enumerate(_WORDS.iter_unpack(keys)):
            key = keys[at * _KEY_BYTES : (at + 1) * _KEY_BYTES]
            place = ((a ^ b ^ c ^ d) * _MIX_NUMBER & _LAST_WORD) >> shift
            while (row := slots[place]) != _EMPTY:
                if row >= 0 and known[row * _KEY_BYTES : (row + 1) * _KEY_BYTES] == key:
                    break
                place = (place + 1) & last
            found.append(row)
        return np.array(found, dtype=np.int64)

    def insert(self, keys: KeyArray, at: Rows) -> IndexArray:
        """Add rows [n] under keys [n, 4] that are distinct and not there; their numbers."""
        self._make_room(len(keys))
        rows = self._take_rows(len(keys))
        self._keys[rows] = keys
        self.at[rows] = at
        self._settle(rows)
        self.count += len(rows)
        return rows

    def remove(self, rows: IndexArray) -> None:
        """Take out rows that are there, each named once."""
        if not rows.size:
            return
        places = self._home(self._keys[rows])
        todo = rows
        while todo.size:
            here = self._slots[places] == todo
            self._slots[places[here]] = _GONE
            todo, places = todo[~here], (places[~here] + 1) & (self._slots.size - 1)
        self.at[self._place][rows] = NOWHERE
        self._free.append(rows)
        if len(self._free) > _MOST_CHUNKS:
            self._free = [np.concatenate(self._free)]
        self._gone += rows.size
        self.count -= rows.size

    def live(self) -> IndexArray:
        """Numbers of all rows that hold a record, ascending."""
        return np.flatnonzero(self.at[self._place][: self._used_rows] != NOWHERE)

    def lying_at(self, place: int) -> IndexArray:
        """Numbers of the rows with one place, ascending."""
        return np.flatnonzero(self.at[self._place][: self._used_rows] == place)

    def keys(self, rows: IndexArray) -> KeyArray:
        """Keys [n, 4] of rows."""
        return self._keys[rows]

    def _home(self, keys: KeyArray) -> IndexArray:
        # Keys are digests, but nothing breaks when somebody counts upwards instead.
        mixed = (keys[:, 0] ^ keys[:, 1] ^ keys[:, 2] ^ keys[:, 3]) * _MIX
        return (mixed >> np.uint64(64 - (self._slots.size - 1).bit_length())).astype(np.int64)

    def _settle(self, rows: IndexArray) -> None:
        """Enter rows into the hash table; of those that want one place, one gets it and the others go on."""
        if rows.size <= _FEW_KEYS:
            self._settle_few(rows)
            return
        places = self._home(self._keys[rows])
        while rows.size:
            free = self._slots[places] < 0
            self._gone -= int(np.count_nonzero(self._slots[np.unique(places[free])] == _GONE))
            self._slots[places[free]] = rows[free]
            lost = self._slots[places] != rows
            rows, places = rows[lost], (places[lost] + 1) & (self._slots.size - 1)

    def _settle_few(self, rows: IndexArray) -> None:
        """The same one row after the other; see `_find_few`."""
        slots = self._slots.data
        shift, last = 64 - (self._slots.size - 1).bit_length(), self._slots.size - 1
        words = _WORDS.iter_unpack(self._keys[rows].tobytes())
        for row, (a, b, c, d) in zip(rows.tolist(), words, strict=True):
            place = ((a ^ b ^ c ^ d) * _MIX_NUMBER & _LAST_WORD) >> shift
            while (there := slots[place]) >= 0:
                place = (place + 1) & last
            self._gone -= there == _GONE
            slots[place] = row

    def _take_rows(self, count: int) -> IndexArray:
        taken: list[IndexArray] = []
        while count and self._free:
            some = self._free.pop()
            if some.size > count:
                self._free.append(some[count:])
                some = some[:count]
            taken.append(some)
            count -= some.size
        if count:
            taken.append(np.arange(self._used_rows, self._used_rows + count))
            self._used_rows += count
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def _make_room(self, count: int) -> None:
        """Grow the rows by a quarter, and the hash table so that at most half of it is taken."""
        needed = self._used_rows + max(0, count - sum(rows.size for rows in self._free))
        if needed > self.at.size:
            size = max(needed, self.at.size + self.at.size // 4)
            keys, at = _zeros(size, _KEY)["words"], _zeros(size, self.at.dtype)
            keys[: self.at.size], at[: self.at.size] = self._keys, self.at
            self._keys, self.at = keys, at
        if 2 * (self.count + self._gone + count) > self._slots.size:
            slots = 1 << (2 * (self.count + count)).bit_length()
            self._slots = _zeros(slots, np.dtype(np.int32))
            self._slots.fill(_EMPTY)
            self._gone = 0
            self._settle(self.live())


def _zeros(count: int, fields: np.dtype[_S]) -> npt.NDArray[_S]:
    """Zeroed elements: many of them in memory of their own, which goes back to the system once they outgrew it."""
    nbytes = count * fields.itemsize
    if nbytes < _MAPPED_BYTES:
        return np.zeros(count, dtype=fields)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=fields, count=count)


def join_keys(keys: list[bytes] | tuple[bytes, ...]) -> KeyArray:
    """Keys of 32 bytes each as words [n, 4]."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 4)
