"""The raw, open end of a sequence in one layer: tokens that do not fill a block yet."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from kvtier.core.group import LayerGroup

__all__ = ["Tail"]

_VIEWS_AHEAD = 8

Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class _Views(NamedTuple):
    """Of a tail of some length: its newest token K [1, Hk, 1, Dk], and all of it K [1, Hk, n, Dk]; V alike."""

    newest: Pair
    held: Pair


class Tail:
    """Keys and values of the newest tokens, in a buffer that the device budget counts.

    Attributes
    ----------
    keys, values : Tensor
        The buffers [Hk, capacity, Dk] and [Hk, capacity, Dv]; the first ``length`` tokens mean something.
    """

    __slots__ = ("_batched", "_group", "_views", "keys", "length", "values")

    def __init__(self, group: LayerGroup, capacity: int) -> None:
        self._group = group
        self._hold(*group.new_tail(capacity))

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[1]

    def view(self) -> Pair:
        """K [Hk, n, Dk] and V [Hk, n, Dv], without a copy."""
        return self.keys[:, : self.length], self.values[:, : self.length]

    def batched(self) -> Pair:
        """The same as a batch of one: K [1, Hk, n, Dk] and V [1, Hk, n, Dv]."""
        return self._views_at(self.length).held

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv], or the same as a batch of one; there must be room."""
        added = keys.shape[-2]
        if added == 1:
            into_keys, into_values = self._views_at(self.length + 1).newest
            into_keys.copy_(keys)
            into_values.copy_(values)
        else:
            self.keys[:, self.length : self.length + added] = keys
            self.values[:, self.length : self.length + added] = values
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
        self._batched = keys[None], values[None]
        self._views: dict[int, _Views] = {}

    def _views_at(self, length: int) -> _Views:
        """Made once for every length: to make a view costs a decode step as much as to copy a token.

        Several lengths at a time: the first view of a step is the dear one, since kernels leave none of this in caches.
        """
        found = self._views.get(length)
        if found is None:
            for ahead in range(length, max(length + 1, min(length + _VIEWS_AHEAD, self.capacity + 1))):
                self._views[ahead] = self._made(ahead)
            found = self._views[length]
        return found

    def _made(self, length: int) -> _Views:
        keys, values = self._batched
        newest = max(0, length - 1)
        return _Views(
            newest=(keys.narrow(2, newest, length - newest), values.narrow(2, newest, length - newest)),
            held=(keys.narrow(2, 0, length), values.narrow(2, 0, length)),
        )
