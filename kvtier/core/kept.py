"""One sequence in one layer under a policy that evicts while it decodes: slots that are overwritten in place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.group import LayerGroup
from kvtier.core.merging import fold_slots
from kvtier.core.policy import IntArray, MergePlan
from kvtier.core.rotation import turned
from kvtier.core.sequence import Segment
from kvtier.core.slot_order import SlotOrder
from kvtier.errors import SessionStateError
from kvtier.types import Rope

__all__ = ["KeptSequence", "kept_bytes"]

_PURPOSE = "slots"
_SLACK = 16
_MOST_STRETCHES = 4


class _Views(NamedTuple):
    """Of buffers filled to some length: the newest slot K [1, Hk, 1, Dk], V [1, Hk, 1, Dv], and all of them."""

    newest: tuple[torch.Tensor, torch.Tensor]
    held: Segment


@dataclass(slots=True)
class KeptSequence:
    """Tokens that a policy kept, each KV head its own, always on the device.

    Never sealed, so never in pages, sketched or demoted. A dropped token's slot is taken by the newest one: slots are
    in no order, and ``order`` says which token each holds.

    Attributes
    ----------
    keys, values : Tensor
        Buffers [Hk, capacity, Dk] and [Hk, capacity, Dv]; the first ``length`` slots mean something.
    order : SlotOrder
        Which token each slot holds.
    votes : Tensor
        Attention that each slot has received since its token came, summed over queries, per query head
        [Hq, capacity] fp32; the running column sums.
    voted : bool
        Whether any votes were counted; zeros need not follow their tokens.
    seen : int
        Tokens ever appended and not cropped.
    budget : int
        Slots that each KV head keeps after a step.
    memory : Tensor, optional
        What the policy remembers of its last merge [1, Hk, S].
    compact : Rope, optional
        Where kept tokens are numbered without gaps: how the model rotates. Keys stay as they came; queries are turned
        to meet them.
    """

    group: LayerGroup
    keys: torch.Tensor
    values: torch.Tensor
    order: SlotOrder
    votes: torch.Tensor
    voted: bool = False
    last_position: int | None = None
    seen: int = 0
    evicted: bool = False
    version: object = field(default_factory=object)
    budget: int = 0
    memory: torch.Tensor | None = None
    compact: Rope | None = None
    _views: _Views | None = None

    @classmethod
    def of(
        cls, group: LayerGroup, keys: torch.Tensor, values: torch.Tensor, positions: IntArray, *, capacity: int = 0
    ) -> KeptSequence:
        """Slots K [Hk, n, Dk], V [Hk, n, Dv] at positions [Hk, n], without votes, with ``capacity`` if close."""
        count = keys.shape[1]
        room = capacity if count < capacity <= count + 4 * _SLACK else count + _SLACK
        held_keys, held_values = _buffers(group, room)
        held_keys[:, :count], held_values[:, :count] = keys, values
        votes, last = _no_votes(group, room), int(positions.max(initial=-1))
        return cls(group, held_keys, held_values, SlotOrder(positions), votes, last_position=last, seen=count)

    @property
    def positions(self) -> IntArray:
        """Logical positions [Hk, length] of what the slots hold; a view."""
        return self.order.positions

    @property
    def length(self) -> int:
        """Slots held by each KV head."""
        return self.order.length

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return self.keys.shape[1]

    @property
    def croppable(self) -> int:
        """Tokens that a crop may take: what a step evicted cannot come back."""
        return 0 if self.evicted else self.seen

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: IntArray) -> None:
        """Add tokens K [1, Hk, n, Dk], V [1, Hk, n, Dv] at ``positions`` [1, n], ascending from ``last_position``."""
        added, held = keys.shape[2], self.length
        if held + added > self.capacity:
            self._resize(held + added + _SLACK)
        if added == 1:
            newest_keys, newest_values = self._views_at(held + 1).newest
            newest_keys.copy_(keys)
            newest_values.copy_(values)
        else:
            self.keys[:, held : held + added], self.values[:, held : held + added] = keys[0], values[0]
        if self.voted:
            self.votes[:, held : held + added] = 0.0
        self.order.extend(positions)
        self.last_position = int(positions[0, -1])
        self.seen += added
        self.version = object()

    def segments(self) -> Sequence[Segment]:
        """All slots, as one view; where positions are compact, as one for every stretch that is rotated alike."""
        if not self.length:
            return []
        whole = self._views_at(self.length).held
        return [whole] if self.compact is None else self._stretches(self.compact, whole)

    def _stretches(self, rope: Rope, whole: Segment) -> list[Segment]:
        in_order = self.order.ascending - np.arange(self.length)
        ahead = np.empty_like(in_order)
        np.put_along_axis(ahead, self.order.slots, in_order, axis=1)
        cuts = np.flatnonzero((np.diff(ahead, axis=1) != 0).any(axis=0)) + 1
        _, _, keys, values, _ = whole
        if cuts.size >= _MOST_STRETCHES or (ahead != ahead[0]).any():
            return [Segment(0, self.length, self._turned_back(rope, keys, ahead), values)]
        return [
            Segment(start, stop, keys[:, :, start:stop], values[:, :, start:stop], int(ahead[0, start]))
            for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), self.length], strict=True)
        ]

    def ahead(self, positions: IntArray) -> IntArray:
        """How many positions queries at ``positions`` [n], whose tokens are held, lie before their compact ones."""
        return positions - np.searchsorted(self.order.ascending[0], positions)

    def in_order(self) -> torch.Tensor:
        """The slots of each KV head in the order of their positions [Hk, length], until the next change."""
        return torch.from_numpy(self.order.slots).to(self.keys.device)

    def vote(self, sums: torch.Tensor) -> None:
        """Add attention [Hq, length] that the slots received."""
        self.votes[:, : self.length] += sums
        self.voted = True

    def drop(self, ranks: IntArray) -> None:
        """Leave all but one token of each KV head, the one that is ``ranks`` [Hk] in the order of positions.

        As ``keep`` of the others, without a look at each slot: what every step of most policies does.
        """
        last = self.length - 1
        freed = self.order.remove(ranks)
        slot = int(freed[0])
        if (freed == slot).all():
            # As where age alone decides.
            self.keys[:, slot], self.values[:, slot] = self.keys[:, last], self.values[:, last]
        else:
            place = torch.from_numpy(freed + self.group.head_rows[:, 0] * self.capacity).to(self.keys.device)
            for part in (self.keys, self.values):
                part.view(-1, part.shape[2]).index_copy_(0, place, part[:, last].clone())
        if self.voted:
            votes = self.votes.view(self.group.heads, -1, self.capacity)
            into = torch.from_numpy(freed).to(votes.device)[:, None, None].expand(-1, votes.shape[1], 1)
            votes.scatter_(2, into, votes.narrow(2, last, 1).clone())
        self.evicted, self.version = True, object()

    def keep(self, slots: torch.Tensor) -> None:
        """Leave only these slots [Hk, K], ascending; those at the end move into the places of the dropped."""
        count, held = slots.shape[1], self.length
        if count == held:
            return
        stays = torch.zeros(self.group.heads, held, dtype=torch.bool, device=slots.device)
        stays.scatter_(1, slots, value=True)
        # As many are dropped below `count` as stay above it, in every head.
        into = (~stays[:, :count]).nonzero()
        source = stays[:, count:].nonzero()
        head, target, origin = into[:, 0], into[:, 1], source[:, 1] + count
        self.keys[head, target] = self.keys[head, origin]
        self.values[head, target] = self.values[head, origin]
        votes = self.votes.view(self.group.heads, -1, self.capacity)
        votes[head, :, target] = votes[head, :, origin]
        heads, targets, origins = (index.cpu().numpy() for index in (head, target, origin))
        positions = self.positions
        positions[heads, targets] = positions[heads, origins]
        self.order = SlotOrder(positions[:, :count])
        self.evicted, self.version = True, object()
        if self.capacity > count + 4 * _SLACK:
            self._resize(count + _SLACK)

    def merge(self, plan: MergePlan) -> None:
        """Fold slots into others, as entries [1, Hk, M] of slots here say."""
        head, entry = (plan.weight[0] > 0).nonzero(as_tuple=True)
        source, target, weight = (part[0, head, entry] for part in (plan.src, plan.dst, plan.weight))
        fold_slots(self.keys, head, source, target, weight)
        fold_slots(self.values, head, source, target, weight)

    def fork(self) -> KeptSequence:
        """A second sequence with the same slots, copied."""
        keys, values = _buffers(self.group, self.capacity)
        keys.copy_(self.keys)
        values.copy_(self.values)
        return KeptSequence(
            group=self.group,
            keys=keys,
            values=values,
            order=self.order.fork(),
            votes=self.votes.clone(),
            voted=self.voted,
            last_position=self.last_position,
            seen=self.seen,
            evicted=self.evicted,
            version=self.version,
            budget=self.budget,
            memory=self.memory,
            compact=self.compact,
        )

    def check_crop(self, remove: int) -> None:
        """Raise ``SessionStateError`` when tokens would be needed that were evicted."""
        if remove > self.croppable:
            raise SessionStateError(
                f"cannot remove {remove} tokens: this policy evicts while it decodes, and what it evicted since cannot "
                "come back; draft them with append(..., tree=) and accept(), or start a new session"
            )

    def crop(self, remove: int) -> None:
        """Forget the newest ``remove`` tokens; nothing was evicted, so they are the last slots."""
        if remove:
            self.order.truncate(self.length - remove)
            self.seen -= remove
            self.last_position = int(self.positions.max()) if self.length else None
            self.version = object()

    def release(self) -> None:
        """Give the buffers back; the sequence must not be used again."""
        self.group.ledger.give(_PURPOSE, _slot_bytes(self.group) * self.capacity)
        self.keys, self.values, self.votes = self.keys[:, :0], self.values[:, :0], self.votes[:, :0]
        self.order, self._views = SlotOrder(self.positions[:, :0]), None

    def _turned_back(self, rope: Rope, keys: torch.Tensor, ahead: IntArray) -> torch.Tensor:
        """Keys [1, Hk, n, Dk] at their compact positions, counted while they live."""
        back = turned(rope, keys, torch.from_numpy(-ahead)[None])
        self.group.ledger.take("staging", back.nbytes)
        weakref.finalize(back, self.group.ledger.give, "staging", back.nbytes)
        return back

    def _resize(self, capacity: int) -> None:
        held, old = self.length, self.capacity
        keys, values = _buffers(self.group, capacity)
        votes = _no_votes(self.group, capacity)
        for new, now in ((keys, self.keys), (values, self.values), (votes, self.votes)):
            new[:, :held] = now[:, :held]
        self.keys, self.values, self.votes, self._views = keys, values, votes, None
        self.group.ledger.give(_PURPOSE, _slot_bytes(self.group) * old)

    def _views_at(self, length: int) -> _Views:
        """Kept for the next step, which ends at the same length: to make a view costs as much as to copy a token."""
        views = self._views
        if views is None or views.held.stop != length:
            keys, values = self.keys[None, :, :length], self.values[None, :, :length]
            newest = keys[:, :, length - 1 :], values[:, :, length - 1 :]
            views = self._views = _Views(newest, Segment(0, length, keys, values))
        return views


def kept_bytes(group: LayerGroup, tokens: int) -> int:
    """Device bytes of a sequence that keeps ``tokens`` in one layer."""
    return _slot_bytes(group) * (tokens + _SLACK)


def _slot_bytes(group: LayerGroup) -> int:
    """Bytes of one slot of every KV head, votes included."""
    return group.layer.token_bytes + 4 * group.layer.num_query_heads


def _buffers(group: LayerGroup, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    group.ledger.take(_PURPOSE, _slot_bytes(group) * tokens)
    shape = (group.heads, tokens)
    keys = torch.empty(*shape, group.layer.key_dim, dtype=group.dtype, device=group.device)
    return keys, torch.empty(*shape, group.layer.value_dim, dtype=group.dtype, device=group.device)


def _no_votes(group: LayerGroup, tokens: int) -> torch.Tensor:
    return torch.zeros(group.layer.num_query_heads, tokens, dtype=torch.float32, device=group.device)
