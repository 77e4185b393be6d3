"""LRU: what was unused for longest leaves first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.core.policy import PlacementPolicy
from kvtier.storage_backends.eviction import EvictionOrder
from kvtier.storage_backends.order import LeastRecentlyUsed

__all__ = ["LRU"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LRU(PlacementPolicy):
    """Evict in least-recently-used order; a long scan flushes everything."""

    name: ClassVar[str] = "lru"
    paper: ClassVar[str] = "none: least recently used"

    def order(self) -> EvictionOrder:
        """One queue by last use."""
        return LeastRecentlyUsed()
