"""Which record leaves memory first: told of every event, asked for candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

__all__ = ["LeastRecentlyUsed", "RecordOrder"]


class RecordOrder(ABC):
    """An order of eviction. The owner holds its lock around every call and keeps leased records itself."""

    @abstractmethod
    def added(self, key: bytes, nbytes: int) -> None:
        """A record came."""

    @abstractmethod
    def used(self, key: bytes) -> None:
        """A record was read or leased."""

    @abstractmethod
    def removed(self, key: bytes, *, evicted: bool) -> None:
        """A record went: for room, or because it was deleted or found damaged."""

    @abstractmethod
    def candidates(self) -> Iterator[bytes]:
        """Keys that are there, the first to leave first; the order is not told of events while this is read."""


class LeastRecentlyUsed(RecordOrder):
    """The record unused for longest leaves first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, nbytes: int) -> None:
        """The newest."""
        del nbytes
        self._keys[key] = None

    def used(self, key: bytes) -> None:
        """The newest again."""
        self._keys.move_to_end(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:
        """Forgotten."""
        del evicted
        del self._keys[key]

    def candidates(self) -> Iterator[bytes]:
        """From the oldest on."""
        return iter(self._keys)
