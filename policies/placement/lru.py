"""LRU: what was unused for longest leaves first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.core.policy import PlacementPolicy
from kvtier.policies.placement.id_queue import IdQueue
from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray

__all__ = ["LRU"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LRU(PlacementPolicy):
    """Evict in least-recently-used order; a long scan flushes everything."""

    name: ClassVar[str] = "lru"
    paper: ClassVar[str] = "none: least recently used"

    def order(self) -> EvictionOrder:
        """One queue by last use."""
        return _LRUOrder()


class _LRUOrder(EvictionOrder):
    def __init__(self) -> None:
        self._queue = IdQueue()

    @property
    def residents(self) -> int:
        return self._queue.size

    def admit(self, ids: IdArray) -> None:
        self._queue.push(ids)

    def hit(self, ids: IdArray) -> None:
        self._queue.push(ids[self._queue.holds(ids)])

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        return self._queue.first(count, allowed)

    def evict(self, ids: IdArray) -> None:
        self._queue.drop(ids)

    def forget(self, ids: IdArray) -> None:
        self._queue.drop(ids)

    def remembers(self, ids: IdArray) -> BoolArray:
        return self._queue.holds(ids)
