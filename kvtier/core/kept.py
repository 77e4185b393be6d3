"""One sequence in one layer under a policy that evicts while it decodes: slots that are overwritten in place."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.group import LayerGroup
from kvtier.core.merging import fold_slots
from kvtier.core.policy import IntArray, MergePlan
from kvtier.core.rotation import turned
from kvtier.core.sequence import Segment
from kvtier.core.slot_buffers import SlotBuffers, slot_bytes
from kvtier.core.slot_order import SlotOrder
from kvtier.errors import SessionStateError
from kvtier.types import Rope

__all__ = ["KeptSequence", "kept_bytes"]

_SLACK = 16
_MOST_STRETCHES = 4


@dataclass(slots=True)
class KeptSequence:
    """Tokens that a policy kept, each KV head its own, always on the device.

    Never sealed, so never in pages, sketched or demoted. A dropped token's slot is taken by the newest one: slots are
    in no order, and ``order`` says which token each holds.

    Attributes
    ----------
    slots : SlotBuffers
        Keys, values and votes; the first ``length`` slots mean something.
    order : SlotOrder
        Which token each slot holds.
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
    slots: SlotBuffers
    order: SlotOrder
    voted: bool = False
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
        slots, last = SlotBuffers(group, room), int(positions.max(initial=-1))
        slots.keys[:, :count], slots.values[:, :count] = keys, values
        return cls(group, slots, SlotOrder(positions), last_position=last, seen=count)

    @property
    def keys(self) -> torch.Tensor:
        """The buffer [Hk, capacity, Dk]."""
        return self.slots.keys

    @property
    def values(self) -> torch.Tensor:
        """The buffer [Hk, capacity, Dv]."""
        return self.slots.values

    @property
    def votes(self) -> torch.Tensor:
        """Attention that each slot has received [Hq, length]; a view."""
        return self.slots.at(self.length).votes

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
        return self.slots.capacity

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
            newest_keys, newest_values = self.slots.at(held + 1).newest
            newest_keys.copy_(keys)
            newest_values.copy_(values)
        else:
            self.keys[:, held : held + added], self.values[:, held : held + added] = keys[0], values[0]
        if self.voted:
            self.slots.votes[:, held : held + added] = 0.0
        self.order.extend(positions)
        self.last_position = int(positions[0, -1])
        self.seen += added
        self.version = object()

    def segments(self) -> Sequence[Segment]:
        """All slots, as one view; where positions are compact, as one for every stretch that is rotated alike."""
        if not self.length:
            return []
        whole = Segment(0, self.length, *self.slots.at(self.length).held)
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
        self.votes.add_(sums)
        self.voted = True

    def drop(self, ranks: IntArray) -> None:
        """Leave all but one token of each KV head, the one that is ``ranks`` [Hk] in the order of positions.

        As ``keep`` of the others, without a look at each slot: what every step of most policies does.
        """
        freed = self.order.remove(ranks)
        self.slots.move(self.length, freed, votes=self.voted)
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
        self.slots.gather(head, origin, target)
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
        fold_slots((self.keys, self.values), head, source, target, weight)

    def fork(self) -> KeptSequence:
        """A second sequence with the same slots, copied."""
        return KeptSequence(
            group=self.group,
            slots=self.slots.copy(self.length, self.capacity),
            order=self.order.fork(),
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
        self.slots.release()
        self.order = SlotOrder(self.positions[:, :0])

    def _turned_back(self, rope: Rope, keys: torch.Tensor, ahead: IntArray) -> torch.Tensor:
        """Keys [1, Hk, n, Dk] at their compact positions, counted while they live."""
        back = turned(rope, keys, torch.from_numpy(-ahead)[None])
        self.group.ledger.take("staging", back.nbytes)
        weakref.finalize(back, self.group.ledger.give, "staging", back.nbytes)
        return back

    def _resize(self, capacity: int) -> None:
        now = self.slots
        self.slots = now.copy(self.length, capacity)
        now.release()


def kept_bytes(group: LayerGroup, tokens: int) -> int:
    """Device bytes of a sequence that keeps ``tokens`` in one layer."""
    return slot_bytes(group) * (tokens + _SLACK)
