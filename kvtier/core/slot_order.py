"""Which token each slot of a KV head holds, and the slots in the order of their tokens, kept step by step."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from kvtier.core.policy import IntArray

__all__ = ["SlotOrder"]

_ROOM = 64

_Scores: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[Any]]"


class SlotOrder:
    """Positions of slots that are in no order, and that order; on the host.

    Nothing is sorted after the start: a step adds the newest token at the end and takes one out of each head, and what
    lies before it or behind it, whichever is less, moves by one.

    Parameters
    ----------
    positions : array
        Distinct logical positions [Hk, n] int64 of the tokens in slots 0 to n - 1, in any order.

    Attributes
    ----------
    length : int
        Slots of each KV head.

    Notes
    -----
    Arrays that are returned are views, and mean something until the next change.
    """

    __slots__ = ("_by_slot", "_heads", "_ordered", "_start", "length")

    def __init__(self, positions: IntArray) -> None:
        self.length = positions.shape[1]
        self._heads = np.arange(positions.shape[0])
        slots = np.argsort(positions, axis=1, kind="stable")
        self._hold(positions, np.stack([slots, np.take_along_axis(positions, slots, axis=1)]), self.length)

    @property
    def heads(self) -> int:
        """KV heads."""
        return self._heads.size

    @property
    def positions(self) -> IntArray:
        """Position of each slot's token [Hk, length]."""
        return self._by_slot[:, : self.length]

    @property
    def slots(self) -> IntArray:
        """Slots [Hk, length] in the order of their positions."""
        slots: IntArray = self._ordered[0, :, self._start : self._start + self.length]
        return slots

    @property
    def ascending(self) -> IntArray:
        """Positions [Hk, length] in order."""
        ascending: IntArray = self._ordered[1, :, self._start : self._start + self.length]
        return ascending

    def extend(self, positions: IntArray) -> None:
        """Tokens at ``positions`` [1 or Hk, n], ascending and after all held, take the next slots."""
        held, total = self.length, self.length + positions.shape[1]
        if self._start + total > self._ordered.shape[2]:
            self._hold(self.positions, self._held(), total)
        end, taken = self._start + total, slice(self._start + held, self._start + total)
        self._by_slot[:, held:total] = positions
        self._ordered[0, :, taken] = held if end - taken.start == 1 else np.arange(held, total)
        self._ordered[1, :, taken] = positions
        self.length = total

    def oldest(self, *, sinks: int, recent: int) -> IntArray | None:
        """The rank of the oldest token of each head [Hk] that is at ``sinks`` or later; None when one is too recent."""
        ranks: IntArray = (self.ascending[:, :sinks] < sinks).sum(axis=1)
        return ranks if int(ranks.max()) < self.length - recent else None

    def least(self, scores: _Scores, *, sinks: int, recent: int) -> IntArray | None:
        """The rank of the least score of each head [Hk], of equal ones the last, by scores of slots [Hk, length].

        Tokens at positions below ``sinks`` and the ``recent`` newest do not count; their scores are overwritten. None
        where what is left is no number.
        """
        slots, rows = self.slots, self._heads[:, None]
        if recent:
            scores[rows, slots[:, -recent:]] = np.inf
        if sinks:
            oldest, safe = slots[:, :sinks], self.ascending[:, :sinks] < sinks
            scores[rows, oldest] = np.where(safe, np.inf, scores[rows, oldest])
        best = scores.argmin(axis=1)
        least = scores[self._heads, best]
        if not np.isfinite(least).all():
            return None
        ties = scores == least[:, None]
        if np.count_nonzero(ties) == best.size:
            found: IntArray = (slots == best[:, None]).argmax(axis=1)
        else:
            found = self.length - 1 - np.take_along_axis(ties, slots, axis=1)[:, ::-1].argmax(axis=1)
        return found

    def remove(self, ranks: IntArray) -> IntArray:
        """Take out of each head the token that is ``ranks`` [Hk] in order; returns the slots [Hk] that held them.

        The token in the last slot of each head moves into the slot that became free.
        """
        last, held, heads = self.length - 1, self._held(), self._heads
        freed: IntArray = held[0, heads, ranks]
        self._by_slot[heads, freed] = self._by_slot[:, last]
        newest = held[0, :, last]
        if (newest == last).all():
            newest[:] = freed
        else:
            held[0, heads, (held[0] == last).argmax(axis=1)] = freed
        if 2 * int(ranks.sum()) < heads.size * last:
            for head, rank in enumerate(ranks.tolist()):
                held[:, head, 1 : rank + 1] = held[:, head, :rank]
            self._start += 1
        else:
            for head, rank in enumerate(ranks.tolist()):
                held[:, head, rank:last] = held[:, head, rank + 1 :]
        self.length = last
        return freed

    def truncate(self, length: int) -> None:
        """Forget the slots from ``length`` on, which hold the newest tokens."""
        self.length = length

    def fork(self) -> SlotOrder:
        """A copy."""
        twin: SlotOrder = SlotOrder.__new__(SlotOrder)
        twin.length, twin._heads = self.length, self._heads
        twin._hold(self.positions, self._held(), self.length)
        return twin

    def _held(self) -> IntArray:
        """Slots and positions [2, Hk, length], in order."""
        return self._ordered[:, :, self._start : self._start + self.length]

    def _hold(self, positions: IntArray, ordered: IntArray, least: int) -> None:
        """Copies of these, with room for ``least`` slots and for some steps that move none."""
        held, capacity = positions.shape[1], least + _ROOM
        by_slot, both = (np.empty((*part.shape[:-1], capacity), dtype=np.int64) for part in (positions, ordered))
        by_slot[:, :held], both[:, :, :held] = positions, ordered
        self._by_slot: IntArray = by_slot
        self._ordered: IntArray = both
        self._start = 0
