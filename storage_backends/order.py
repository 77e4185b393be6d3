"""Least recently used: the order in which a tier gives up what it holds, unless it is told another."""

from __future__ import annotations

from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray
from kvtier.storage_backends.id_queue import IdQueue

__all__ = ["LeastRecentlyUsed"]


class LeastRecentlyUsed(EvictionOrder):
    """What was unused for longest leaves first; one queue by last use."""

    def __init__(self) -> None:
        self._queue = IdQueue()

    @property
    def residents(self) -> int:
        """How many ids are in the tier."""
        return self._queue.size

    def admit(self, ids: IdArray) -> None:
        """They are the newest."""
        self._queue.push(ids)

    def hit(self, ids: IdArray) -> None:
        """They are the newest again."""
        self._queue.renew(ids)

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        """The oldest."""
        return self._queue.first(count, allowed)

    def evict(self, ids: IdArray) -> None:
        """They are forgotten."""
        self._queue.drop(ids)

    def forget(self, ids: IdArray) -> None:
        """They are forgotten."""
        self._queue.drop(ids)

    def remembers(self, ids: IdArray) -> BoolArray:
        """Which are in the tier."""
        return self._queue.holds(ids)
