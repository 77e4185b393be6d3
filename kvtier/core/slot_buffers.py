"""Keys, values and votes of slots that are overwritten in place, on the device, counted while they are held."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from kvtier.core.group import LayerGroup
from kvtier.core.policy import IntArray

__all__ = ["SlotBuffers", "slot_bytes"]

_PURPOSE = "slots"

_Rows: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[Any]]"


class _Views(NamedTuple):
    """Of buffers filled to some length: the newest slot K [1, Hk, 1, Dk], V [1, Hk, 1, Dv], and all, votes too."""

    length: int
    newest: tuple[torch.Tensor, torch.Tensor]
    held: tuple[torch.Tensor, torch.Tensor]
    votes: torch.Tensor


class SlotBuffers:
    """Room for ``capacity`` slots of every KV head.

    Attributes
    ----------
    keys, values : Tensor
        [Hk, capacity, Dk] and [Hk, capacity, Dv].
    votes : Tensor
        Attention that each slot has received since its token came, summed over queries, per query head
        [Hq, capacity] fp32; the running column sums.
    """

    __slots__ = ("_group", "_heads", "_rows", "_views", "keys", "values", "votes")

    def __init__(self, group: LayerGroup, capacity: int) -> None:
        group.ledger.take(_PURPOSE, slot_bytes(group) * capacity)
        layer, shape = group.layer, (group.heads, capacity)
        self._group = group
        self.keys = torch.empty(*shape, layer.key_dim, dtype=group.dtype, device=group.device)
        self.values = torch.empty(*shape, layer.value_dim, dtype=group.dtype, device=group.device)
        self.votes = torch.zeros(layer.num_query_heads, capacity, dtype=torch.float32, device=group.device)
        self._heads: IntArray = np.arange(group.heads)
        self._views: _Views | None = None
        self._rows: tuple[_Rows, ...] | None = None
        if self.keys.device.type == "cpu":
            self._rows = _as_rows(self.keys), _as_rows(self.values), self.votes.view(*shape[:1], -1, capacity).numpy()

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return self.keys.shape[1]

    def at(self, length: int) -> _Views:
        """Views of the first ``length`` slots.

        Kept for the next step, which ends at the same length: to make a view costs as much as to copy a token.
        """
        views = self._views
        if views is None or views.length != length:
            keys, values = self.keys[None, :, :length], self.values[None, :, :length]
            newest = keys[:, :, length - 1 :], values[:, :, length - 1 :]
            views = self._views = _Views(length, newest, (keys, values), self.votes[:, :length])
        return views

    def move(self, source: int, into: IntArray, *, votes: bool) -> None:
        """Overwrite slot ``into`` [Hk] of each KV head with slot ``source``, and its votes where there are any."""
        if self._rows is not None:
            # One indexed assignment of numpy is a fraction of what a torch operation costs to start.
            keys, values, counted = self._rows
            keys[self._heads, into], values[self._heads, into] = keys[:, source], values[:, source]
            if votes:
                counted[self._heads, :, into] = counted[:, :, source]
            return
        place = torch.from_numpy(into + self._heads * self.capacity).to(self.keys.device)
        for part in (self.keys, self.values):
            part.view(-1, part.shape[2]).index_copy_(0, place, part[:, source].clone())
        if votes:
            by_head = self.votes.view(self._heads.size, -1, self.capacity)
            index = torch.from_numpy(into).to(by_head.device)[:, None, None].expand(-1, by_head.shape[1], 1)
            by_head.scatter_(2, index, by_head.narrow(2, source, 1).clone())

    def gather(self, head: torch.Tensor, source: torch.Tensor, into: torch.Tensor) -> None:
        """Overwrite slots ``into`` of KV heads ``head`` with slots ``source``, entry by entry [M]."""
        self.keys[head, into] = self.keys[head, source]
        self.values[head, into] = self.values[head, source]
        votes = self.votes.view(self._heads.size, -1, self.capacity)
        votes[head, :, into] = votes[head, :, source]

    def copy(self, held: int, capacity: int) -> SlotBuffers:
        """Others of some capacity with the first ``held`` slots of these."""
        others = SlotBuffers(self._group, capacity)
        for new, old in ((others.keys, self.keys), (others.values, self.values), (others.votes, self.votes)):
            new[:, :held] = old[:, :held]
        return others

    def release(self) -> None:
        """Give the memory back; nothing is held any more."""
        self._group.ledger.give(_PURPOSE, slot_bytes(self._group) * self.capacity)
        self.keys, self.values, self.votes = (
            part.new_empty(part.shape[0], 0, *part.shape[2:]) for part in (self.keys, self.values, self.votes)
        )
        self._rows = self._views = None


def slot_bytes(group: LayerGroup) -> int:
    """Bytes of one slot of every KV head, votes included."""
    return group.layer.token_bytes + 4 * group.layer.num_query_heads


def _as_rows(slots: torch.Tensor) -> _Rows:
    """Slots [Hk, capacity, D] in host memory as an array [Hk, capacity] of rows of bytes."""
    whole = np.dtype((np.void, slots.shape[2] * slots.element_size()))
    rows: _Rows = slots.view(torch.uint8).numpy().view(whole)[..., 0]
    return rows
