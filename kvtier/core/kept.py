"""One sequence in one layer under a policy that evicts while it decodes: slots that are overwritten in place."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.group import LayerGroup
from kvtier.core.merging import fold_slots
from kvtier.core.policy import IntArray, MergePlan
from kvtier.core.rotation import turned
from kvtier.core.sequence import Segment
from kvtier.errors import SessionStateError
from kvtier.types import Rope

__all__ = ["KeptSequence", "kept_bytes"]

_PURPOSE = "slots"
_SLACK = 16
_MOST_STRETCHES = 4


@dataclass(slots=True)
class KeptSequence:
    """Tokens that a policy kept, each KV head its own, always on the device.

    Never sealed, so never in pages, sketched or demoted. A dropped token's slot is taken by the newest one: slots are
    in no order, and ``positions`` say which token each holds.

    Attributes
    ----------
    keys, values : Tensor
        Buffers [Hk, capacity, Dk] and [Hk, capacity, Dv]; the first ``length`` slots mean something.
    positions : array
        Logical positions [Hk, length] int64.
    votes : Tensor
        Attention that each slot has received since its token came, summed over queries, per query head
        [Hq, capacity] fp32; the running column sums.
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
    positions: IntArray
    votes: torch.Tensor
    last_position: int | None = None
    seen: int = 0
    evicted: bool = False
    version: object = field(default_factory=object)
    budget: int = 0
    memory: torch.Tensor | None = None
    compact: Rope | None = None

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
        return cls(group, held_keys, held_values, positions.copy(), votes, last_position=last, seen=count)

    @property
    def length(self) -> int:
        """Slots held by each KV head."""
        return self.positions.shape[1]

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
        self.keys[:, held : held + added], self.values[:, held : held + added] = keys[0], values[0]
        self.votes[:, held : held + added] = 0.0
        fresh = np.broadcast_to(positions, (self.group.heads, added))
        self.positions = np.concatenate([self.positions, fresh], axis=1)
        self.last_position = int(positions[0, -1])
        self.seen += added
        self.version = object()

    def segments(self) -> Iterator[Segment]:
        """All slots, as one view; where positions are compact, as one for every stretch that is rotated alike."""
        if not self.length:
            return
        keys, values = self.keys[None, :, : self.length], self.values[None, :, : self.length]
        if self.compact is None:
            yield Segment(0, self.length, keys, values)
            return
        ahead = self.positions - _ranks(self.positions)
        cuts = np.flatnonzero((np.diff(ahead, axis=1) != 0).any(axis=0)) + 1
        if cuts.size >= _MOST_STRETCHES or (ahead != ahead[0]).any():
            yield Segment(0, self.length, self._turned_back(self.compact, keys, ahead), values)
            return
        for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), self.length], strict=True):
            yield Segment(start, stop, keys[:, :, start:stop], values[:, :, start:stop], int(ahead[0, start]))

    def ahead(self, positions: IntArray) -> IntArray:
        """How many positions queries at ``positions`` [n], whose tokens are held, lie before their compact ones."""
        return positions - np.searchsorted(np.sort(self.positions[0]), positions)

    def in_order(self) -> torch.Tensor:
        """The slots of each KV head in the order of their positions [Hk, length]."""
        return torch.from_numpy(np.argsort(self.positions, axis=1, kind="stable")).to(self.keys.device)

    def vote(self, sums: torch.Tensor) -> None:
        """Add attention [Hq, length] that the slots received."""
        self.votes[:, : self.length] += sums

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
        self.positions[heads, targets] = self.positions[heads, origins]
        self.positions = self.positions[:, :count].copy()
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
            positions=self.positions.copy(),
            votes=self.votes.clone(),
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
            self.positions = self.positions[:, : self.length - remove]
            self.seen -= remove
            self.last_position = int(self.positions.max()) if self.length else None
            self.version = object()

    def release(self) -> None:
        """Give the buffers back; the sequence must not be used again."""
        self.group.ledger.give(_PURPOSE, _slot_bytes(self.group) * self.capacity)
        self.keys, self.values, self.votes = self.keys[:, :0], self.values[:, :0], self.votes[:, :0]
        self.positions = self.positions[:, :0]

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
        self.keys, self.values, self.votes = keys, values, votes
        self.group.ledger.give(_PURPOSE, _slot_bytes(self.group) * old)


def _ranks(positions: IntArray) -> IntArray:
    """Places [Hk, n] of distinct positions in their order, head by head."""
    ranks = np.empty_like(positions)
    np.put_along_axis(ranks, np.argsort(positions, axis=1), np.arange(positions.shape[1])[None], axis=1)
    return ranks


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
