"""Headers that were read lately, within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from kvtier.record import RecordHeader

__all__ = ["HeaderCache", "Place"]

Place: TypeAlias = tuple[int, int, int]
"""Segment, its epoch, offset."""

_OVERHEAD_BYTES = 700


class HeaderCache:
    """Least recently used headers go first; reads of hot records then need no header from the medium.

    Parameters
    ----------
    capacity : int
        Bytes, reckoned with Python's overhead.
    """

    def __init__(self, capacity: int = 16 << 20) -> None:
        self._capacity = capacity
        self._held = 0
        self._headers: OrderedDict[Place, RecordHeader] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, places: Sequence[Place]) -> list[RecordHeader | None]:
        """Headers that are known, None for others."""
        found = []
        with self._lock:
            for place in places:
                header = self._headers.get(place)
                if header is not None:
                    self._headers.move_to_end(place)
                found.append(header)
        return found

    def add(self, headers: Iterable[tuple[Place, RecordHeader]]) -> None:
        """Remember headers that were verified."""
        with self._lock:
            for place, header in headers:
                if place not in self._headers:
                    self._headers[place] = header
                    self._held += _size(header)
            while self._held > self._capacity:
                self._held -= _size(self._headers.popitem(last=False)[1])

    def forget(self, place: Place) -> None:
        """Drop a header that is in doubt."""
        with self._lock:
            header = self._headers.pop(place, None)
            if header is not None:
                self._held -= _size(header)


def _size(header: RecordHeader) -> int:
    return _OVERHEAD_BYTES + len(header.digests) + len(header.meta)
