"""Which slots are free: first-fit accounting, vectorised, shared by the slot backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvtier.errors import CapacityError, InputError

__all__ = ["IntArray", "Rows", "SlotAllocator", "as_slots", "compact", "is_run"]

IntArray: TypeAlias = npt.NDArray[np.int64]

Rows: TypeAlias = slice | IntArray
"""Indices of rows, as a slice when they are neighbours."""


def as_slots(slots: npt.ArrayLike, capacity: int) -> IntArray:
    """Slot numbers as int64 [n], each checked to be at least 0 and below ``capacity``.

    Raises
    ------
    InputError
        Not a vector of integers, or a slot out of range.
    """
    array = np.asarray(slots)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise InputError(f"slots must be a vector of integers, got {array.dtype} {list(array.shape)}")
    array = array.astype(np.int64, copy=False)
    if array.size and (array.min() < 0 or array.max() >= capacity):
        raise InputError(f"slots must lie in [0, {capacity}), got {array.min()} to {array.max()}")
    return array


def is_run(slots: IntArray) -> bool:
    """Whether the slots ascend by one."""
    return slots.size < 2 or bool((np.diff(slots) == 1).all())


def compact(indices: IntArray) -> Rows:
    """Turn ascending neighbours into a slice, which copies in one go."""
    return slice(int(indices[0]), int(indices[0]) + indices.size) if indices.size and is_run(indices) else indices


class SlotAllocator:
    """Free and reserved slots of a space of ``capacity`` slots.

    A reservation is one ascending run where one is free, the lowest such within a part, else across parts; else the
    lowest free slots, ascending. Low slots are used first, so that what lies above them can shrink. Not thread-safe:
    the owner holds a lock.

    Parameters
    ----------
    capacity : int
    starts : sequence of int
        First slot of each part of the space, ascending from 0; one part by default.

    Notes
    -----
    Filling up costs time in proportion to the slots reserved; a fragmented part costs a scan of it, about a
    millisecond for a million slots.
    """

    def __init__(self, capacity: int, starts: Sequence[int] = (0,)) -> None:
        self.capacity = capacity
        self._reserved = np.zeros(capacity, dtype=np.bool_)
        self._bounds = np.array([*starts, capacity], dtype=np.int64)
        self._stops: list[int] = self._bounds[1:].tolist()
        self._low = list(starts)  # of each part, every slot below it is reserved
        self._used: IntArray = np.zeros(len(starts), dtype=np.int64)

    @property
    def free(self) -> int:
        """Slots that can still be reserved."""
        return self.capacity - int(self._used.sum())

    @property
    def used(self) -> list[int]:
        """Reserved slots of each part."""
        used: list[int] = self._used.tolist()
        return used

    def reserve(self, count: int) -> IntArray:
        """Take ``count`` slots, ascending int64 [count].

        Raises
        ------
        CapacityError
            Fewer are free; nothing was reserved.
        """
        if count < 0:
            raise InputError(f"the number of slots to reserve must be at least 0, got {count}")
        if count > self.free:
            raise CapacityError(
                f"required {count} free slots, got {self.free} of {self.capacity}; "
                "release slots or give the tier more capacity"
            )
        if count == 0:
            return np.empty(0, dtype=np.int64)
        start = self._first_run(count)
        if start is None:
            slots = np.flatnonzero(~self._reserved)[:count]
        else:
            slots = np.arange(start, start + count, dtype=np.int64)
        self._reserved[slots] = True
        self._used += self._per_part(slots)
        return slots

    def release(self, slots: IntArray) -> None:
        """Free slots; all of them, or none when one is not reserved or is named twice (`InputError`)."""
        slots = self.require_reserved(slots, distinct=True)
        if slots.size:
            self._reserved[slots] = False
            freed = self._per_part(slots)
            self._used -= freed
            for part in np.flatnonzero(freed).tolist():
                lowest = max(int(self._bounds[part]), int(slots.min()))
                self._low[part] = min(self._low[part], lowest)

    def require_reserved(self, slots: IntArray, *, distinct: bool) -> IntArray:
        """Return the slots as int64 [n], after a check that each is reserved and, if ``distinct``, named once.

        Raises
        ------
        InputError
            A slot that is out of range, not reserved, or named twice.
        """
        slots = as_slots(slots, self.capacity)
        missing = slots[~self._reserved[slots]]
        if missing.size:
            raise InputError(f"slots must be reserved, got free slots {_some(missing)}; were they released twice?")
        if distinct and not bool((np.diff(slots) > 0).all()):
            ordered = np.sort(slots)
            twice = ordered[1:][np.diff(ordered) == 0]
            if twice.size:
                raise InputError(f"each slot may be named once, got {_some(np.unique(twice))} more than once")
        return slots

    def _first_run(self, count: int) -> int | None:
        """Lowest start of ``count`` adjacent free slots of one part; of several where none has so many."""
        for part, (stop, used) in enumerate(zip(self._stops, self.used, strict=True)):
            if stop - int(self._bounds[part]) - used >= count:
                low = self._low[part]
                ahead = self._reserved[low : min(low + count, stop)]
                if ahead.size < count or ahead.any():
                    self._low[part], start = self._scan(low, stop, count)
                else:
                    start = low
                if start is not None:
                    self._low[part] += count if start == self._low[part] else 0
                    return start
        return self._scan(0, self.capacity, count)[1] if len(self._stops) > 1 else None

    def _scan(self, low: int, stop: int, count: int) -> tuple[int, int | None]:
        """Of the slots from ``low`` up to ``stop`` the lowest that is free, and the lowest run of ``count``."""
        edges = np.flatnonzero(np.diff(self._reserved[low:stop], prepend=True, append=True))
        starts, ends = edges[::2], edges[1::2]
        long_enough = starts[ends - starts >= count]
        return low + int(starts[0]), low + int(long_enough[0]) if long_enough.size else None

    def _per_part(self, slots: IntArray) -> IntArray:
        """How many of some slots lie in each part."""
        if len(self._stops) == 1:
            return np.array([slots.size])
        return np.bincount(np.searchsorted(self._bounds, slots, side="right") - 1, minlength=len(self._stops))


def _some(slots: IntArray, most: int = 8) -> str:
    """Write out the first few slots, for a message."""
    return ", ".join(map(str, slots[:most].tolist())) + (f" and {slots.size - most} more" if slots.size > most else "")
