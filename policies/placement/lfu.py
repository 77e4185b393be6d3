"""LFU with ageing: what is used least leaves first, and counts fade (the reset of TinyLFU, Einziger et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtier.core.policy import PlacementPolicy
from kvtier.errors import PolicyError
from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray
from kvtier.storage_backends.id_queue import reach

__all__ = ["LFU"]

_COUNT_SHIFT = 48  # bits of the clock below the count in one sort key


@dataclass(frozen=True, slots=True, kw_only=True)
class LFU(PlacementPolicy):
    """Evict by uses, then by last use; all counts are halved from time to time, so that old fame fades.

    Exact counts of what is in the tier, not a sketch: an id starts at 1 when it is admitted.

    Parameters
    ----------
    most : int
        Where counts stop, 1 to 32767; 15 in the paper.
    period : int
        Counts are halved after this many uses per resident, at least 1; 10 in the paper.
    """

    name: ClassVar[str] = "lfu"
    paper: ClassVar[str] = "ageing: TinyLFU, Einziger et al. 2017, arXiv 1512.00727, section 3.3"
    scan_resistant: ClassVar[bool] = True

    most: int = 15
    period: int = 10

    def __post_init__(self) -> None:
        if type(self.most) is not int or not 1 <= self.most <= 32767:
            raise PolicyError(f"lfu: most must be an integer from 1 to 32767, got {self.most!r}")
        if type(self.period) is not int or self.period < 1:
            raise PolicyError(f"lfu: period must be an integer of at least 1 use, got {self.period!r}")

    def order(self) -> EvictionOrder:
        """Counts and clocks."""
        return _LFUOrder(self.most, self.period)


class _LFUOrder(EvictionOrder):
    def __init__(self, most: int, period: int) -> None:
        self._most, self._period = most, period
        self._count: IdArray = np.zeros(1, dtype=np.int64)
        self._clock: IdArray = np.full(1, -1, dtype=np.int64)  # of the last use; -1 when not in the tier
        self._now = self._since = self._residents = 0

    @property
    def residents(self) -> int:
        return self._residents

    def admit(self, ids: IdArray) -> None:
        self._grow(ids)
        self._count[ids] = 0
        self._residents += ids.size
        self._use(ids)

    def hit(self, ids: IdArray) -> None:
        self._use(ids[self.remembers(ids)])

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        here = self._clock >= 0
        if allowed is not None:
            known = min(here.size, allowed.size)
            here[:known] &= allowed[:known]
        ids = np.flatnonzero(here)
        key = (self._count[ids] << _COUNT_SHIFT) | self._clock[ids]
        if count < ids.size:
            low = np.argpartition(key, count)[:count]
            ids, key = ids[low], key[low]
        return ids[np.argsort(key)]

    def evict(self, ids: IdArray) -> None:
        self.forget(ids)

    def forget(self, ids: IdArray) -> None:
        here = ids[self.remembers(ids)]
        self._clock[here] = -1
        self._residents -= here.size

    def remembers(self, ids: IdArray) -> BoolArray:
        self._grow(ids)
        here: BoolArray = self._clock[ids] >= 0
        return here

    def _grow(self, ids: IdArray) -> None:
        self._count, self._clock = reach(self._count, ids, 0), reach(self._clock, ids, -1)

    def _use(self, ids: IdArray) -> None:
        self._count[ids] = np.minimum(self._count[ids] + 1, self._most)
        self._clock[ids] = np.arange(self._now, self._now + ids.size)
        self._now += ids.size
        self._since += ids.size
        if ids.size and self._since >= self._period * self._residents:
            self._count >>= 1
            self._since = 0
