"""Headers that were read lately, within a bound of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
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

    def get(self, place: Place) -> RecordHeader | None:
        """A header that is known."""
        with self._lock:
            header = self._headers.get(place)
            if header is not None:
                self._headers.move_to_end(place)
            return header

    def put(self, place: Place, header: RecordHeader) -> None:
        """Remember a header that was verified."""
        with self._lock:
            if place in self._headers:
                return
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
