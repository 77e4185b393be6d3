"""Who leaves a full tier next: the one order that a session's pages and the cache's records are evicted by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["BoolArray", "EvictionOrder", "IdArray"]

IdArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


class EvictionOrder(ABC):
    """What one tier holds, ordered by who leaves first.

    A tier calls `miss` when something asked for is not there, makes room with `victims` and `evict`, and calls `admit`
    when it is; `hit` when it was. Ids are small integers (memory grows with the largest), distinct within a call, and
    keep their meaning until `forget`; an order may remember ids that left, but never more than the tier holds.

    Notes
    -----
    Not synchronised: the tier calls it under the lock that guards its own table.
    """

    @property
    @abstractmethod
    def residents(self) -> int:
        """How many ids are in the tier."""

    @abstractmethod
    def admit(self, ids: IdArray) -> None:
        """These ids [n] came into the tier, the last one latest; none was in it."""

    @abstractmethod
    def hit(self, ids: IdArray) -> None:
        """These ids [n] were used; those that are not in the tier are ignored."""

    def miss(self, ids: IdArray) -> None:
        """These ids [n] were asked for and are not in the tier; called before room is made for them."""
        del ids

    @abstractmethod
    def victims(self, count: int, allowed: BoolArray | None = None) -> IdArray:
        """Who leaves next: up to ``count`` ids in the tier, the first to leave first; nothing leaves yet.

        An order may move its hand when it is asked, so the same question may be answered otherwise later.

        Parameters
        ----------
        count : int
            Fewer are returned only when fewer may leave.
        allowed : array of bool, optional
            By id, who may leave; what a lease, a reader or a copy under way protects may not. All may when None.
        """

    @abstractmethod
    def evict(self, ids: IdArray) -> None:
        """These ids [n] left to make room, in this order; they may come back. Those not in the tier are ignored."""

    @abstractmethod
    def forget(self, ids: IdArray) -> None:
        """These ids [n] mean nothing any more, wherever they were; the numbers may be used again."""

    @abstractmethod
    def remembers(self, ids: IdArray) -> BoolArray:
        """Which of these ids [n] are in the tier, or left it and are still known."""
