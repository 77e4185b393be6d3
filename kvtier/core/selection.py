"""Eviction after a prompt: its statistics, a policy's plan, and the slots that are left, merged if it says so."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kvtier.core.attention import Queries, key_votes, positions_of, segments_of
from kvtier.core.kept import KeptSequence
from kvtier.core.merging import merge_into
from kvtier.core.moments import Moments
from kvtier.core.policy import IntArray, KeepPlan, MergePlan, Need, Phase, PositionMode, SelectionPolicy
from kvtier.core.ragged import UNSEEN, RaggedSequence
from kvtier.core.sequence import LayerSequence
from kvtier.core.slot_eviction import evict_slots, group_reduce
from kvtier.core.stats import SlotView, Stats
from kvtier.types import Rope

__all__ = ["Observed", "PromptWindow", "evict_rows", "group_reduce", "sums_of"]

_PURPOSE = "statistics"

Evictable: TypeAlias = LayerSequence | KeptSequence | RaggedSequence
Paged: TypeAlias = LayerSequence | RaggedSequence


@dataclass(slots=True)
class PromptWindow:
    """The last queries of a prompt and the log-sum-exp of their attention, gathered over its chunks.

    ``query`` [1, Hq, w, Dk], ``lse`` [1, Hq, w], ``positions`` [1, w].
    """

    query: torch.Tensor
    lse: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, queries: Queries, lse: torch.Tensor, width: int) -> PromptWindow:
        """The last ``width`` of these queries."""
        return cls(
            queries.query[:, :, -width:].clone(), lse[:, :, -width:].clone(), queries.positions[:, -width:].clone()
        )

    def then(self, later: PromptWindow, width: int) -> PromptWindow:
        """The last ``width`` of these queries followed by ``later``."""
        return PromptWindow(
            torch.cat([self.query, later.query], dim=2)[:, :, -width:],
            torch.cat([self.lse, later.lse], dim=2)[:, :, -width:],
            torch.cat([self.positions, later.positions], dim=1)[:, -width:],
        )


class Observed(NamedTuple):
    """What was seen of a prompt in one row and layer: its last queries, the column sums [Hq, T] and moments of all."""

    window: PromptWindow | None
    sums: torch.Tensor | None
    moments: Moments | None


def evict_rows(
    rows: Sequence[Evictable],
    observed: Sequence[Observed | None],
    like: Queries,
    policy: SelectionPolicy,
    keep: Sequence[int],
    rope: Rope | None,
) -> list[Evictable]:
    """Apply a policy to every row of one layer, whose prompt has ended; row b keeps ``keep[b]`` tokens a KV head.

    ``rope`` is how the layer rotates, if known. Rows that were forks of each other and keep the same stay forks.
    Under a policy that also evicts while it decodes every row becomes a `KeptSequence`, under one whose heads share a
    budget a `RaggedSequence`.
    """
    done: dict[object, tuple[torch.Tensor, Evictable]] = {}
    result: list[Evictable] = []
    decodes = policy.phase is Phase.DECODE
    for sequence, seen, budget in zip(rows, observed, keep, strict=True):
        if (seen is None and policy.needs) or (_within(sequence, budget) and not decodes):
            result.append(sequence)
            continue
        if isinstance(sequence, KeptSequence):
            if seen is not None and seen.sums is not None:
                sequence.vote(seen.sums)
            window = None if seen is None or seen.window is None else _window_votes(sequence, seen.window, like)[0]
            sequence.budget = budget
            evict_slots(sequence, window, policy)
            result.append(sequence)
            continue
        stats, view = _observe(sequence, seen, like, policy, rope)
        plan = policy.select(policy.score(view, stats), view, budget)
        version, stays = sequence.version, plan.stays(sequence.length)[0]
        twin = done.get(version)
        if twin is not None and torch.equal(twin[0], stays):
            sequence.release()
            result.append(twin[1].fork())
            continue
        if isinstance(sequence, RaggedSequence) or plan.counts is not None:
            left: Evictable = _shared_out(sequence, stays)
        else:
            left = _evicted(sequence, plan, view, seen, policy)
        if isinstance(left, KeptSequence):
            left.budget = budget
            left.compact = rope if policy.position_mode is PositionMode.COMPACT else None
        done[version] = (stays, left)
        result.append(left)
    return result


def sums_of(sequence: Evictable, queries: Queries, lse: torch.Tensor) -> torch.Tensor:
    """Attention [Hq, slots] that every slot received from these queries; counted as device memory while it lives."""
    ledger, nbytes = sequence.group.ledger, queries.query.shape[1] * sequence.length * lse.element_size()
    ledger.take(_PURPOSE, nbytes)
    sums = key_votes(sequence, queries, lse)[0]
    weakref.finalize(sums, ledger.give, _PURPOSE, nbytes)
    return sums


def _within(sequence: Evictable, keep: int) -> bool:
    """Whether a sequence holds no more than ``keep`` tokens a KV head, on average where heads differ."""
    if isinstance(sequence, RaggedSequence):
        return int(sequence.counts.sum()) <= keep * sequence.group.heads
    return sequence.length <= keep


def _observe(
    sequence: Paged, seen: Observed | None, like: Queries, policy: SelectionPolicy, rope: Rope | None
) -> tuple[Stats, SlotView]:
    """The statistics and the view of slots that the policy declared a need for, in the order of their positions."""
    heads = sequence.group.heads
    turn = sequence.in_order() if isinstance(sequence, RaggedSequence) else None
    window = sums = moments = None
    if seen is not None and seen.window is not None:
        votes = group_reduce(_window_votes(sequence, seen.window, like), heads, policy.group_reduce)
        window = _turned(votes, turn)
    if seen is not None and seen.sums is not None:
        sums = _turned(group_reduce(seen.sums[None], heads, policy.group_reduce), turn)
    if seen is not None and seen.moments is not None and rope is not None:
        moments = seen.moments.stats(rope, like.scale)
    return Stats(window_attention=window, column_sums=sums, query_moments=moments), _view(sequence, policy, turn)


def _window_votes(sequence: Evictable, window: PromptWindow, like: Queries) -> torch.Tensor:
    """Attention of the last queries of a prompt, summed per slot [1, Hq, T]."""
    queries = like._replace(query=window.query, positions=window.positions, first=int(window.positions.min()))
    return key_votes(sequence, queries, window.lse)


def _view(sequence: Paged, policy: SelectionPolicy, turn: torch.Tensor | None) -> SlotView:
    """Slots in the order ``turn`` [Hk, T] of their positions; None where they lie in it."""
    held, shape = positions_of(sequence), (sequence.group.heads, sequence.length)
    positions = torch.from_numpy(np.broadcast_to(held, shape).copy()).to(sequence.group.device)[None]
    positions = _turned(positions, turn)
    valid = None if turn is None else positions != UNSEEN
    protected = policy.protected(positions)
    return SlotView(
        positions=positions,
        protected=protected if valid is None else protected & valid,
        keys=_turned(_all_keys(sequence), turn) if Need.KEYS in policy.needs else None,
        value_norms=_turned(_value_norms(sequence), turn) if Need.VALUE_NORMS in policy.needs else None,
        memory=None if isinstance(sequence, RaggedSequence) else sequence.memory,
        valid=valid,
    )


def _turned(values: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """Values of slots [1, Hk, T] or [1, Hk, T, D] in the order ``turn`` [Hk, T]."""
    if turn is None:
        return values
    return values[:, torch.arange(turn.shape[0], device=turn.device)[:, None], turn]


def _evicted(
    sequence: LayerSequence, plan: KeepPlan, view: SlotView, seen: Observed | None, policy: SelectionPolicy
) -> LayerSequence | KeptSequence:
    """What a plan with one budget for every KV head leaves."""
    total, merge = sequence.length, policy.merge(view, plan)
    left: LayerSequence | KeptSequence = _apply(sequence, plan, merge)
    if policy.phase is Phase.DECODE:
        left = _opened(sequence, plan.keep[0], seen, total)
    left.memory = None if merge is None else merge.memory
    return left


def _apply(sequence: LayerSequence, plan: KeepPlan, merge: MergePlan | None) -> LayerSequence:
    """Leave only the slots of the plan, with others merged into them as the policy says."""
    group, keep = sequence.group, plan.keep[0]
    slots = keep.cpu().numpy()
    entries = 0 if merge is None else merge.src.shape[2]
    with group.ledger.lent("staging", (slots.shape[1] + entries) * group.layer.token_bytes):
        keys, values, positions = _slots(sequence, slots)
        if merge is not None and entries:
            parts = _slots(sequence, merge.src[0].cpu().numpy())
            keys, values = merge_into(keys, values, keep, merge, parts[0], parts[1])
        sequence.replace(keys, values, positions)
    return sequence


def _shared_out(sequence: Paged, stays: torch.Tensor) -> RaggedSequence:
    """Leave the slots that stay [Hk, T], in the order of their positions, each KV head its own number."""
    group, page = sequence.group, sequence.group.page_tokens
    held = positions_of(sequence)
    if isinstance(sequence, RaggedSequence):
        stays = torch.zeros_like(stays).scatter_(1, sequence.in_order(), stays)
    head, slot = np.nonzero(stays.cpu().numpy())
    counts = np.bincount(head, minlength=group.heads)
    place = np.arange(head.size) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = -(-counts // page)
    row = ((np.cumsum(columns) - columns) * page)[head] + place
    positions = np.full((group.heads, int(counts.max())), UNSEEN)
    positions[head, place] = np.broadcast_to(held, (group.heads, held.shape[1]))[head, slot]
    pages = int(columns.sum())
    with group.ledger.lent("staging", pages * group.arena.frame_bytes):
        keys, values = _copied(sequence, head, slot, row, pages * page)
        ragged = sequence if isinstance(sequence, RaggedSequence) else RaggedSequence.after(sequence)
        ragged.keep(counts, keys.unflatten(0, (pages, page)), values.unflatten(0, (pages, page)), positions)
    return ragged


def _opened(sequence: LayerSequence, kept: torch.Tensor, seen: Observed | None, total: int) -> KeptSequence:
    """The slots that are left of ``total``, where they can be overwritten one by one; the sequence is released."""
    layer, shape = sequence.group.layer, (sequence.group.heads, sequence.length)
    keys, values = (sequence.raw.keys.new_empty(*shape, dim) for dim in (layer.key_dim, layer.value_dim))
    with segments_of(sequence) as segments:
        for segment in segments:
            place = slice(segment.start, segment.stop)
            keys[:, place], values[:, place] = segment.keys[0], segment.values[0]
    positions = np.broadcast_to(sequence.positions.view, (sequence.group.heads, sequence.length))
    opened = KeptSequence.of(sequence.group, keys, values, positions)
    if seen is not None and seen.sums is not None:
        opened.vote(_taken(seen.sums, kept))
    opened.seen, opened.evicted = total, kept.shape[1] < total
    sequence.release()
    return opened


def _taken(sums: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Column sums [Hq, T] of the kept slots [Hk, K]: [Hq, K]."""
    return sums.gather(1, keep.repeat_interleave(sums.shape[0] // keep.shape[0], dim=0))


def _all_keys(sequence: Paged) -> torch.Tensor:
    """Copies of all keys [1, Hk, T, Dk], as attention sees them."""
    group = sequence.group
    keys = torch.empty(1, group.heads, sequence.length, group.layer.key_dim, dtype=group.dtype, device=group.device)
    with segments_of(sequence) as segments:
        for segment in segments:
            keys[:, :, segment.start : segment.stop] = segment.keys
    return keys


def _value_norms(sequence: Paged) -> torch.Tensor:
    """Lengths of all values [1, Hk, T] fp32."""
    norms = torch.empty(1, sequence.group.heads, sequence.length, device=sequence.group.device)
    with segments_of(sequence) as segments:
        for segment in segments:
            norms[:, :, segment.start : segment.stop] = segment.values.float().norm(dim=-1)
    return norms


def _slots(sequence: LayerSequence, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor, IntArray]:
    """Copies of these slots [Hk, K]: K [Hk, K, Dk], V [Hk, K, Dv] and positions [Hk, K]."""
    heads = np.repeat(np.arange(slots.shape[0]), slots.shape[1])
    keys, values = _copied(sequence, heads, slots.ravel(), np.arange(slots.size), slots.size)
    held = sequence.positions.view
    positions = np.take_along_axis(np.broadcast_to(held, (slots.shape[0], held.shape[1])), slots, axis=1)
    return keys.unflatten(0, slots.shape), values.unflatten(0, slots.shape), positions


def _copied(
    sequence: Paged, heads: IntArray, slots: IntArray, rows: IntArray, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [total, Dk] and V [total, Dv], zeros but for slot ``slots[i]`` of KV head ``heads[i]`` in row ``rows[i]``."""
    layer, device, like = sequence.group.layer, sequence.group.device, torch.empty(0, dtype=sequence.group.dtype)
    keys = like.new_zeros(total, layer.key_dim, device=device)
    values = like.new_zeros(total, layer.value_dim, device=device)
    with segments_of(sequence) as segments:
        for segment in segments:
            inside = np.flatnonzero((slots >= segment.start) & (slots < segment.stop))
            head, source, row = (
                torch.from_numpy(index).to(device)
                for index in (heads[inside], slots[inside] - segment.start, rows[inside])
            )
            keys[row] = segment.keys[0][head, source]
            values[row] = segment.values[0][head, source]
    return keys, values
