"""A digest over all rows of the index: what SQLite does not notice, lost rows among it, still shows."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence

import xxhash

__all__ = ["Seal"]

_MODULUS = 1 << 128


class Seal:
    """The sum of the digests of all rows, by table, so that a row comes and goes at the price of its own digest."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, table: str, row: Sequence[object]) -> None:
        """A row came."""
        self._sums[table] += _digest(table, row)

    def remove(self, table: str, row: Sequence[object]) -> None:
        """A row went."""
        self._sums[table] -= _digest(table, row)

    def replace(self, table: str, rows: Iterable[Sequence[object]]) -> None:
        """A table holds these rows and no others."""
        self._sums[table] = sum(_digest(table, row) for row in rows)

    @property
    def value(self) -> bytes:
        """16 bytes; zeros when there are no rows."""
        return (sum(self._sums.values()) % _MODULUS).to_bytes(16, "little")


def _digest(table: str, row: Sequence[object]) -> int:
    hasher = xxhash.xxh3_128(table.encode())
    for field in row:
        data = field if isinstance(field, bytes) else repr(field).encode()
        hasher.update(struct.pack("<Q", len(data)))
        hasher.update(data)
    return hasher.intdigest()
