"""Who leaves a full tier next: the one order that a session's pages and the cache's records are evicted by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["BoolArray", "EvictionOrder", "IdArray", "KeyedOrder"]

IdArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
_Key = TypeVar("_Key", bound=Hashable)
_FIRST_CANDIDATES = 16
_SLACK = 64


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
    """An order over keys of any kind: what a keyed cache tells of every event and asks for candidates.

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
        self._awaited: _Key | None = None

    def __len__(self) -> int:
        return self._order.residents

    @property
    def known(self) -> int:
        """Keys that cost memory: those in the tier, those remembered, and those not collected yet."""
        return len(self._ids)

    def missed(self, key: _Key) -> None:
        """A key was asked for and is not there; room will be made for it.

        A cache that cannot say so may leave it out: the order learns of it when the key is added, one eviction late.
        """
        self._awaited = key
        if key in self._ids:
            self._order.miss(self._one(key))

    def added(self, key: _Key, nbytes: int = 0) -> None:
        """A key came, with so many bytes; all keys count alike."""
        del nbytes
        if key in self._ids and self._awaited != key:
            self._order.miss(self._one(key))
        self._awaited = None
        self._intern(key)
        self._order.admit(self._one(key))
        if len(self._ids) > 2 * self._order.residents + _SLACK:
            self._collect()

    def used(self, key: _Key) -> None:
        """A key was read or leased."""
        if key in self._ids:
            self._order.hit(self._one(key))

    def removed(self, key: _Key, *, evicted: bool) -> None:
        """A key went: for room, or because it was deleted and is to be forgotten."""
        if key not in self._ids:
            return
        one = self._one(key)
        if evicted:
            self._order.evict(one)
        else:
            self._order.forget(one)
            self._release(one)

    def candidates(self) -> Iterator[_Key]:
        """Keys that are there, the first to leave first; nothing may happen to the order while this is read."""
        seen: set[int] = set()
        count = _FIRST_CANDIDATES
        while len(seen) < self._order.residents:
            more = [index for index in self._order.victims(count).tolist() if index not in seen]
            seen.update(more)
            yield from self._named(more)
            count *= 4

    def _one(self, key: _Key) -> IdArray:
        return np.array([self._ids[key]], dtype=np.int64)

    def _named(self, ids: Iterable[int]) -> list[_Key]:
        found = (self._keys[index] for index in ids)
        return [key for key in found if key is not None]

    def _intern(self, key: _Key) -> None:
        if key in self._ids:
            return
        if not self._free:
            self._free.append(len(self._keys))
            self._keys.append(None)
        index = self._ids[key] = self._free.pop()
        self._keys[index] = key

    def _collect(self) -> None:
        """Take ids back from keys that the order no longer knows."""
        ids = np.array(list(self._ids.values()), dtype=np.int64)
        self._release(ids[~self._order.remembers(ids)])

    def _release(self, ids: IdArray) -> None:
        for index in ids.tolist():
            for key in self._named([index]):
                del self._ids[key]
            self._keys[index] = None
            self._free.append(index)
