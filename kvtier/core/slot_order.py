"""Which token each slot of a KV head holds, and the slots in the order of their tokens, kept step by step."""

from __future__ import annotations

import numpy as np

from kvtier.core.policy import IntArray

__all__ = ["SlotOrder"]

_ROOM = 64


class SlotOrder:
    """Positions of slots that are in no order, and that order; on the host.

    Nothing is sorted after the start: a step adds the newest token at the end and takes one out of each head, which
    moves what comes behind it by one.

    Parameters
    ----------
    positions : array
        Distinct logical positions [Hk, n] int64 of the tokens in slots 0 to n - 1, in any order.

    Notes
    -----
    Arrays that are returned are views, and mean something until the next change.
    """

    __slots__ = ("_by_slot", "_ordered", "_rows", "length")

    def __init__(self, positions: IntArray) -> None:
        heads, self.length = positions.shape
        self._rows = np.arange(heads)
        self._allocate(self.length + _ROOM)
        self._by_slot[:, : self.length] = positions
        slots = np.argsort(positions, axis=1, kind="stable")
        self._ordered[0, :, : self.length] = slots
        self._ordered[1, :, : self.length] = np.take_along_axis(positions, slots, axis=1)

    @property
    def positions(self) -> IntArray:
        """Position of each slot's token [Hk, length]."""
        return self._by_slot[:, : self.length]

    @property
    def slots(self) -> IntArray:
        """Slots [Hk, length] in the order of their positions."""
        slots: IntArray = self._ordered[0, :, : self.length]
        return slots

    @property
    def ascending(self) -> IntArray:
        """Positions [Hk, length] in order."""
        ascending: IntArray = self._ordered[1, :, : self.length]
        return ascending

    def extend(self, positions: IntArray) -> None:
        """Tokens at ``positions`` [1 or Hk, n], ascending and after all held, take the next slots."""
        end = self.length + positions.shape[1]
        if end > self._by_slot.shape[1]:
            self._grow(end)
        self._by_slot[:, self.length : end] = positions
        self._ordered[0, :, self.length : end] = np.arange(self.length, end)
        self._ordered[1, :, self.length : end] = positions
        self.length = end

    def remove(self, ranks: IntArray) -> IntArray:
        """Take out of each head the token that is ``ranks`` [Hk] in order; returns the slots [Hk] that held them.

        The token in the last slot of each head moves into the slot that became free.
        """
        held, last = self.length, self.length - 1
        freed: IntArray = self._ordered[0, self._rows, ranks]
        moving = (self._ordered[0, :, :held] == last).argmax(axis=1)
        self._ordered[0, self._rows, moving] = freed
        self._by_slot[self._rows, freed] = self._by_slot[:, last]
        first = int(ranks[0])
        if (ranks == first).all():
            self._ordered[:, :, first:last] = self._ordered[:, :, first + 1 : held]
        else:
            # One move of memory a head is quicker than a gather over all of them.
            for head, rank in enumerate(ranks.tolist()):
                self._ordered[:, head, rank:last] = self._ordered[:, head, rank + 1 : held]
        self.length = last
        return freed

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on, which hold the newest tokens."""
        self.length = length

    def fork(self) -> SlotOrder:
        """A copy."""
        twin: SlotOrder = SlotOrder.__new__(SlotOrder)
        twin._rows, twin.length = self._rows, self.length
        twin._by_slot, twin._ordered = self._by_slot.copy(), self._ordered.copy()
        return twin

    def _allocate(self, capacity: int) -> None:
        self._by_slot: IntArray = np.empty((self._rows.size, capacity), dtype=np.int64)
        self._ordered: IntArray = np.empty((2, self._rows.size, capacity), dtype=np.int64)

    def _grow(self, least: int) -> None:
        by_slot, ordered = self._by_slot, self._ordered
        self._allocate(least + _ROOM)
        self._by_slot[:, : self.length] = by_slot[:, : self.length]
        self._ordered[:, :, : self.length] = ordered[:, :, : self.length]
