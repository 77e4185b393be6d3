"""LRU: the page unused for longest leaves first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtier.core.policy import IntArray, PlacementPolicy

__all__ = ["LRU"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LRU(PlacementPolicy):
    """Demote in least-recently-used order; of pages last used at the same step, the earlier one."""

    name: ClassVar[str] = "lru"
    paper: ClassVar[str] = "none: least recently used"

    def victims(self, last_use: IntArray, count: int) -> IntArray:
        """Indices [count] of the pages that leave first, ascending in their last use [N]."""
        if count >= last_use.size:
            return np.argsort(last_use, kind="stable")
        bound = np.partition(last_use, count - 1)[count - 1] if count else 0
        older = np.flatnonzero(last_use < bound)
        ties = np.flatnonzero(last_use == bound)[: count - older.size]
        return np.concatenate([older[np.argsort(last_use[older], kind="stable")], ties])
