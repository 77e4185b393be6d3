"""The raw, open end of a sequence in one layer: tokens that do not fill a block yet."""

from __future__ import annotations

import torch

from kvtier.core.group import LayerGroup

__all__ = ["Tail"]


class Tail:
    """Keys and values of the newest tokens, in a buffer that the device budget counts.

    Attributes
    ----------
    keys, values : Tensor
        The buffers [Hk, capacity, Dk] and [Hk, capacity, Dv]; the first ``length`` tokens mean something.
    """

    __slots__ = ("_group", "keys", "length", "values")

    def __init__(self, group: LayerGroup, capacity: int) -> None:
        self._group = group
        self.keys, self.values = group.new_tail(capacity)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[1]

    def view(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K [Hk, n, Dk] and V [Hk, n, Dv], without a copy."""
        return self.keys[:, : self.length], self.values[:, : self.length]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens K [Hk, n, Dk], V [Hk, n, Dv]; there must be room."""
        end = self.length + keys.shape[1]
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end

    def resize(self, capacity: int) -> None:
        """Move to a buffer of another capacity, which holds what there is."""
        if capacity == self.capacity:
            return
        held, (keys, values) = self.capacity, self.view()
        self.keys, self.values = self._group.new_tail(capacity)
        self.length = 0
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
        self.keys, self.values, self.length = self.keys[:, :0], self.values[:, :0], 0
