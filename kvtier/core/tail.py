"""The raw, open end of a sequence in one layer: tokens that do not fill a block yet."""

from __future__ import annotations

from typing import TypeAlias

import torch

from kvtier.core.group import LayerGroup

__all__ = ["Tail"]

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class Tail:
    """Keys and values of the newest tokens, in a buffer that the device budget counts.

    Attributes
    ----------
    keys, values : Tensor
        The buffers [Hk, capacity, Dk] and [Hk, capacity, Dv]; the first ``length`` tokens mean something.
    """

    __slots__ = ("_group", "_prefixes", "_slots", "keys", "length", "values")

    def __init__(self, group: LayerGroup, capacity: int) -> None:
        self._group = group
        self._hold(*group.new_tail(capacity))

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[1]

    def view(self) -> Pair:
        """K [Hk, n, Dk] and V [Hk, n, Dv], without a copy."""
        return self.keys.narrow(1, 0, self.length), self.values.narrow(1, 0, self.length)

    def batched(self) -> Pair:
        """The same as a batch of one: K [1, Hk, n, Dk] and V [1, Hk, n, Dv]."""
        found = self._prefixes.get(self.length)
        if found is None:
            keys, values = self.view()
            found = self._prefixes[self.length] = (keys[None], values[None])
        return found

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv]; there must be room."""
        added = keys.shape[1]
        into_keys, into_values = self._slot() if added == 1 else self._next(added)
        into_keys.copy_(keys)
        into_values.copy_(values)
        self.length += added

    def resize(self, capacity: int) -> None:
        """Move to a buffer of another capacity, which holds what there is."""
        if capacity == self.capacity:
            return
        held, (keys, values) = self.capacity, self.view()
        self._hold(*self._group.new_tail(capacity))
        self.extend(keys, values)
        self._group.give_tail(held)

    def fork(self) -> Tail:
        """A copy."""
        twin = Tail(self._group, self.capacity)
        twin.extend(*self.view())
        return twin

    def release(self) -> None:
        """Give the buffer back; the tail must not be used again."""
        self._group.give_tail(self.capacity)
        self._hold(self.keys[:, :0], self.values[:, :0])

    def _hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """These buffers from now on, nothing in them yet."""
        self.keys, self.values, self.length = keys, values, 0
        # Views that every block needs again: to make one costs as much as to copy a token.
        self._prefixes: dict[int, Pair] = {}
        self._slots: dict[int, Pair] = {}

    def _next(self, tokens: int) -> Pair:
        return self.keys.narrow(1, self.length, tokens), self.values.narrow(1, self.length, tokens)

    def _slot(self) -> Pair:
        found = self._slots.get(self.length)
        if found is None:
            found = self._slots[self.length] = self._next(1)
        return found
