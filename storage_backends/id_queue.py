"""A queue of ids as arrays: the list that orders of eviction are made of, without an object for each id."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvtier.storage_backends.eviction import BoolArray, IdArray

__all__ = ["Fill", "IdQueue", "reach"]

_SmallArray: TypeAlias = npt.NDArray[np.int32]
_Ints = TypeVar("_Ints", npt.NDArray[np.int32], npt.NDArray[np.int64])

_LEAST = 64


class IdQueue:
    """Distinct ids, the oldest first.

    A log of arrivals and, of each id, its place in the log: an entry counts only if its id is still placed there. So
    moving n ids to the end costs n writes, and the oldest are found by reading from the start. 12 to 14 bytes an id.

    Attributes
    ----------
    size : int
        Ids in the queue.
    """

    __slots__ = ("_log", "_place", "_start", "_stop", "size")

    def __init__(self) -> None:
        self._log: _SmallArray = np.empty(_LEAST, dtype=np.int32)
        self._place: _SmallArray = np.full(_LEAST, -1, dtype=np.int32)
        self._start = self._stop = self.size = 0

    def holds(self, ids: IdArray) -> BoolArray:
        """Which of these ids [n] are in the queue."""
        try:
            held: BoolArray = self._place[ids] >= 0
        except IndexError:  # to look first would cost as much as all else
            self._place = reach(self._place, ids, -1)
            held = self._place[ids] >= 0
        return held

    def push(self, ids: IdArray) -> None:
        """Make these ids [n] the youngest, the last one youngest of all; those in the queue move."""
        self.size += ids.size - int(np.count_nonzero(self.holds(ids)))
        self._append(ids)

    def renew(self, ids: IdArray) -> None:
        """The same with those of these ids [n] that are in the queue."""
        self._append(ids[self.holds(ids)])

    def _append(self, ids: IdArray) -> None:
        if self._stop + ids.size > self._log.size:
            self._tidy(ids.size)
        stop = self._stop + ids.size
        self._log[self._stop : stop] = ids
        self._place[ids] = np.arange(self._stop, stop)
        self._stop = stop

    def drop(self, ids: IdArray) -> None:
        """Take these ids [n] out; those not in the queue are ignored."""
        held = ids[self.holds(ids)]
        self._place[held] = -1
        self.size -= held.size

    def first(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        """The oldest ``count`` ids that are allowed (an array by id; all when None), the oldest first."""
        found: list[IdArray] = []
        place, width = self._start, max(_LEAST, 2 * count)
        while count > 0 and place < self._stop:
            window = self._log[place : min(place + width, self._stop)]
            alive = self._place[window] == np.arange(place, place + window.size)
            if place == self._start:
                self._start += int(alive.argmax()) if alive.any() else window.size
            ids = window[alive].astype(np.int64)
            found.append((ids if allowed is None else ids[allowed[ids]])[:count])
            count -= found[-1].size
            place, width = place + window.size, 2 * width
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _tidy(self, more: int) -> None:
        """Leave out what moved or left, with room for ``more`` and as much again."""
        ids = self.first(self._stop - self._start)
        self._log = np.empty(max(_LEAST, 2 * (ids.size + more)), dtype=np.int32)
        self._log[: ids.size] = ids
        self._place[ids] = np.arange(ids.size)
        self._start, self._stop = 0, ids.size


class Fill:
    """How many ids a tier holds when it is full: learned when it asks for victims, so that bytes need no count.

    Attributes
    ----------
    capacity : int
        Residents at the first request for victims after the last admission; 0 before any.
    """

    __slots__ = ("_grown", "capacity")

    def __init__(self) -> None:
        self._grown = False
        self.capacity = 0

    def grew(self) -> None:
        """Something was admitted."""
        self._grown = True

    def full(self, residents: int) -> None:
        """The tier asks for victims; it is as full as it gets."""
        if self._grown:
            self.capacity, self._grown = residents, False


def reach(values: _Ints, ids: IdArray, fill: int) -> _Ints:
    """An array by id that has a place for each of these ids [n], new ones filled with ``fill``."""
    need = int(ids.max()) + 1 if ids.size else 0
    if need <= values.size:
        return values
    grown = np.full(max(need, values.size + values.size // 2), fill, dtype=values.dtype)
    grown[: values.size] = values
    return grown
