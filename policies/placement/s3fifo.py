"""S3-FIFO: a small queue on probation, a main queue with second chances, and ghosts (Yang et al., SOSP 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtier.core.policy import PlacementPolicy
from kvtier.errors import PolicyError
from kvtier.storage_backends.eviction import BoolArray, EvictionOrder, IdArray
from kvtier.storage_backends.id_queue import Fill, IdQueue, reach

__all__ = ["S3FIFO"]

_MOST_USES = 3  # two bits
_EARNED = 2  # uses on probation that earn a place in the main queue


@dataclass(frozen=True, slots=True, kw_only=True)
class S3FIFO(PlacementPolicy):
    """Evict what was used at most once since it came; what was used more moves on and leaves when it rests.

    As algorithm 1 of the paper, where the uses of an id are cleared when it moves to the main queue. The main queue has
    no bound of its own (published code differs here): the tier bounds both, and the small one is evicted from while
    it holds its share. What may not leave is passed over as if it were not there.

    Parameters
    ----------
    small_percent : int
        Share of the tier that the small queue holds, 1 to 99.
    """

    name: ClassVar[str] = "s3fifo"
    paper: ClassVar[str] = "S3-FIFO, Yang et al., SOSP 2023, algorithm 1"
    scan_resistant: ClassVar[bool] = True

    small_percent: int = 10

    def __post_init__(self) -> None:
        if type(self.small_percent) is not int or not 1 <= self.small_percent <= 99:
            raise PolicyError(f"s3fifo: small_percent must be an integer from 1 to 99, got {self.small_percent!r}")

    def order(self) -> EvictionOrder:
        """Queues S and M, ghosts G."""
        return _S3FIFOOrder(self.small_percent)


class _S3FIFOOrder(EvictionOrder):
    def __init__(self, small_percent: int) -> None:
        self._percent = small_percent
        self._small, self._main, self._ghosts = IdQueue(), IdQueue(), IdQueue()
        self._uses: IdArray = np.zeros(1, dtype=np.int64)
        self._fill = Fill()

    @property
    def residents(self) -> int:
        return self._small.size + self._main.size

    def admit(self, ids: IdArray) -> None:
        self._fill.grew()
        self._uses = reach(self._uses, ids, 0)
        self._uses[ids] = 0
        known = self._ghosts.holds(ids)
        self._ghosts.drop(ids[known])
        self._main.push(ids[known])
        self._small.push(ids[~known])

    def hit(self, ids: IdArray) -> None:
        here = ids[self._small.holds(ids) | self._main.holds(ids)]
        self._uses[here] = np.minimum(self._uses[here] + 1, _MOST_USES)

    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        self._fill.full(self.residents)
        share = -(-self._fill.capacity * self._percent // 100)
        first = self._from_small(count, share, allowed)
        then = self._from_main(count - first.size, allowed)
        rest = count - first.size - then.size
        last = self._small.first(first.size + rest, allowed)[first.size :] if rest else first[:0]
        return np.concatenate([first, then, last])

    def evict(self, ids: IdArray) -> None:
        self._ghosts.push(ids[self._small.holds(ids)])
        self._small.drop(ids)
        self._main.drop(ids)
        most = self._fill.capacity * (100 - self._percent) // 100
        self._ghosts.drop(self._ghosts.first(self._ghosts.size - most))

    def forget(self, ids: IdArray) -> None:
        for queue in (self._small, self._main, self._ghosts):
            queue.drop(ids)

    def remembers(self, ids: IdArray) -> BoolArray:
        return self._small.holds(ids) | self._main.holds(ids) | self._ghosts.holds(ids)

    def _from_small(self, count: int, share: int, allowed: BoolArray | None) -> IdArray:
        """Up to ``count`` ids in order, each while S holds ``share``; the used ones that stand before them move on."""
        ids, width = np.empty(0, dtype=np.int64), 2 * count
        cold = np.empty(0, dtype=np.int64)
        while count and ids.size < self._small.size:
            ids = self._small.first(width, allowed)
            cold = np.flatnonzero(self._uses[ids] < _EARNED)
            if cold.size >= count or ids.size < width:
                break
            width *= 4
        # Before each eviction S must still hold its share: what was passed or taken before is out of it.
        gone = np.concatenate([[0], cold[:count] + 1])
        taken = cold[:count][self._small.size - gone[: cold[:count].size] >= share]
        passed = int(gone[taken.size])
        if taken.size < count and taken.size == cold.size and self._small.size - passed >= share:
            passed = ids.size
        moved = ids[:passed][self._uses[ids[:passed]] >= _EARNED]
        self._uses[moved] = 0
        self._small.drop(moved)
        self._main.push(moved)
        return ids[taken]

    def _from_main(self, count: int, allowed: BoolArray | None) -> IdArray:
        """Up to ``count`` unused ids in order; the used ones that stand before them go to the end with a use less."""
        ids, width = np.empty(0, dtype=np.int64), 2 * count
        while count and ids.size < self._main.size:
            ids = self._main.first(width, allowed)
            cold = np.flatnonzero(self._uses[ids] == 0)[:count]
            if cold.size == count:
                return self._turn(ids[: cold[-1] + 1], cold)
            if ids.size < width:
                break
            width *= 4
        return self._turn_round(ids, count)

    def _turn(self, ids: IdArray, cold: IdArray) -> IdArray:
        passed = np.delete(ids, cold)
        self._uses[passed] -= 1
        self._main.push(passed)
        return ids[cold]

    def _turn_round(self, ids: IdArray, count: int) -> IdArray:
        """As many turns of the whole queue as it takes, at once: they leave by uses, then in order."""
        best = np.argsort(self._uses[ids], kind="stable")[:count]
        if not best.size:
            return ids[best]
        turns, last = int(self._uses[ids[best[-1]]]), int(best[-1])
        again = np.arange(ids.size) < last
        stay = ~np.isin(np.arange(ids.size), best)
        self._uses[ids[stay]] -= turns + again[stay]
        self._uses[ids[best]] = 0
        self._main.push(np.concatenate([ids[stay & ~again], ids[stay & again]]))
        return ids[best]
