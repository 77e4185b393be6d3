"""Who leaves a full tier next: the one order that a session's pages and the cache's records are evicted by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["BoolArray", "EvictionOrder", "IdArray", "KeyedOrder"]

IdArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
_Key = TypeVar("_Key", bound=Hashable)


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


class KeyedOrder(Generic[_Key]):
    """An order over keys of any kind: what a keyed cache talks to.

    Parameters
    ----------
    order : EvictionOrder
        A fresh one, used by nobody else.

    Notes
    -----
    A key costs an id as long as the order remembers it; ids of what it forgot are collected from time to time.
    """

    def __init__(self, order: EvictionOrder) -> None:
        self._order = order
        self._ids: dict[_Key, int] = {}
        self._keys: list[_Key | None] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return self._order.residents

    @property
    def known(self) -> int:
        """Keys that cost memory: those in the tier, those remembered, and those not collected yet."""
        return len(self._ids)

    def admit(self, keys: Sequence[_Key]) -> None:
        """These keys came into the tier."""
        self._order.admit(np.array([self._id(key) for key in keys], dtype=np.int64))
        if len(self._ids) > 2 * self._order.residents + 64:
            self._collect()

    def hit(self, keys: Iterable[_Key]) -> None:
        """These keys were used."""
        self._order.hit(self._known(keys))

    def miss(self, keys: Iterable[_Key]) -> None:
        """These keys were asked for and are not in the tier."""
        self._order.miss(self._known(keys))

    def victims(self, count: int, protected: Container[_Key] = ()) -> list[_Key]:
        """Who leaves next: up to ``count`` keys that are not ``protected``, the first to leave first."""
        chosen = self._named(self._order.victims(count))
        if not any(key in protected for key in chosen):
            return chosen
        safe = [key is not None and key not in protected for key in self._keys]
        return self._named(self._order.victims(count, np.array(safe, dtype=np.bool_)))

    def evict(self, keys: Iterable[_Key]) -> None:
        """These keys left to make room."""
        self._order.evict(self._known(keys))

    def forget(self, keys: Iterable[_Key]) -> None:
        """These keys were deleted: nothing is to be remembered of them."""
        ids = self._known(keys)
        self._order.forget(ids)
        self._release(ids)

    def _named(self, ids: IdArray) -> list[_Key]:
        found = (self._keys[index] for index in ids.tolist())
        return [key for key in found if key is not None]

    def _known(self, keys: Iterable[_Key]) -> IdArray:
        return np.array([self._ids[key] for key in keys if key in self._ids], dtype=np.int64)

    def _id(self, key: _Key) -> int:
        index = self._ids.get(key)
        if index is None:
            if not self._free:
                self._free.append(len(self._keys))
                self._keys.append(None)
            index = self._ids[key] = self._free.pop()
            self._keys[index] = key
        return index

    def _collect(self) -> None:
        """Take ids back from keys that the order no longer knows."""
        ids = np.array(list(self._ids.values()), dtype=np.int64)
        self._release(ids[~self._order.remembers(ids)])

    def _release(self, ids: IdArray) -> None:
        for index, key in zip(ids.tolist(), self._named(ids), strict=True):
            del self._ids[key]
            self._keys[index] = None
            self._free.append(index)
