"""ARC: two lists, by recency and by frequency, that share the room by their ghosts (Megiddo & Modha, FAST 2003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtier.core.policy import PlacementPolicy
from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray
from kvtier.storage_backends.id_queue import Fill, IdQueue

__all__ = ["ARC"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ARC(PlacementPolicy):
    """Evict from what was used once, or from what was used again, whichever the ghosts say is too large.

    As figure 4 of the paper, one request at a time; a batch of misses moves the target once, by the sum of their steps,
    and the ghosts are trimmed when the new ids are admitted, which leaves the same lists.
    """

    name: ClassVar[str] = "arc"
    paper: ClassVar[str] = "ARC, Megiddo & Modha, FAST 2003, figure 4"
    scan_resistant: ClassVar[bool] = True

    def order(self) -> EvictionOrder:
        """Lists T1 and T2, ghosts B1 and B2."""
        return _ARCOrder()


class _ARCOrder(EvictionOrder):
    def __init__(self) -> None:
        self._once, self._again = IdQueue(), IdQueue()
        self._ghosts_once, self._ghosts_again = IdQueue(), IdQueue()
        self._fill = Fill()
        self._target = 0.0  # of T1: p in the paper
        self._spares_tie = True  # T1 at its target gives way only to an id that comes back from B2

    @property
    def residents(self) -> int:
        return self._once.size + self._again.size

    def miss(self, ids: IdArray) -> None:
        once = int(np.count_nonzero(self._ghosts_once.holds(ids)))
        again = int(np.count_nonzero(self._ghosts_again.holds(ids)))
        step = 0.0
        if once:
            step += once * max(1.0, self._ghosts_again.size / self._ghosts_once.size)
        if again:
            step -= again * max(1.0, self._ghosts_once.size / self._ghosts_again.size)
        self._target = min(float(self._fill.capacity), max(0.0, self._target + step))
        self._spares_tie = not again

    def admit(self, ids: IdArray) -> None:
        self._fill.grew()
        known = self._ghosts_once.holds(ids) | self._ghosts_again.holds(ids)
        self._ghosts_once.drop(ids[known])
        self._ghosts_again.drop(ids[known])
        self._again.push(ids[known])
        self._once.push(ids[~known])
        self._spares_tie = True
        self._trim()

    def hit(self, ids: IdArray) -> None:
        here = ids[self._once.holds(ids) | self._again.holds(ids)]
        self._once.drop(here)
        self._again.push(here)

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        self._fill.full(self.residents)
        gives_way = not self._spares_tie and self._target.is_integer()
        surplus = max(0, self._once.size - int(self._target) + gives_way)
        first = self._once.first(min(count, surplus), allowed)
        then = self._again.first(count - first.size, allowed)
        rest = count - first.size - then.size
        if not rest:
            return np.concatenate([first, then])
        last = self._once.first(first.size + rest, allowed)[first.size :]
        return np.concatenate([first, then, last])

    def evict(self, ids: IdArray) -> None:
        for living, ghosts in ((self._once, self._ghosts_once), (self._again, self._ghosts_again)):
            here = ids[living.holds(ids)]
            living.drop(here)
            ghosts.push(here)

    def forget(self, ids: IdArray) -> None:
        for queue in self._queues:
            queue.drop(ids)

    def remembers(self, ids: IdArray) -> BoolArray:
        found = np.zeros(ids.size, dtype=np.bool_)
        for queue in self._queues:
            found |= queue.holds(ids)
        return found

    @property
    def _queues(self) -> tuple[IdQueue, IdQueue, IdQueue, IdQueue]:
        return self._once, self._again, self._ghosts_once, self._ghosts_again

    def _trim(self) -> None:
        """At most c ids in T1 and B1, and 2c in all."""
        capacity = max(self._fill.capacity, self.residents)
        over = self._once.size + self._ghosts_once.size - capacity
        self._ghosts_once.drop(self._ghosts_once.first(over))
        over = sum(queue.size for queue in self._queues) - 2 * capacity
        self._ghosts_again.drop(self._ghosts_again.first(over))
