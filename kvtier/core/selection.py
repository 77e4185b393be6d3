"""Eviction: statistics of a prompt or a step, a policy's plan, and the slots that are left, merged if it says so."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kvtier.core.attention import Queries, key_votes, segments_of
from kvtier.core.kept import KeptSequence
from kvtier.core.merging import merge_into
from kvtier.core.moments import Moments
from kvtier.core.policy import IntArray, KeepPlan, MergePlan, Need, Phase, PositionMode, SelectionPolicy
from kvtier.core.sequence import LayerSequence
from kvtier.core.stats import SlotView, Stats
from kvtier.types import GroupReduce, Rope

__all__ = ["Observed", "PromptWindow", "evict_rows", "evict_slots", "evict_step", "group_reduce", "sums_of"]

_PURPOSE = "statistics"

Evictable: TypeAlias = LayerSequence | KeptSequence


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
    Under a policy that also evicts while it decodes every row becomes a `KeptSequence`.
    """
    done: dict[object, tuple[torch.Tensor, Evictable]] = {}
    result: list[Evictable] = []
    decodes = policy.phase is Phase.DECODE
    for sequence, seen, budget in zip(rows, observed, keep, strict=True):
        if (seen is None and policy.needs) or (sequence.length <= budget and not decodes):
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
        kept, version, total = plan.keep[0], sequence.version, sequence.length
        twin = done.get(version)
        if twin is not None and torch.equal(twin[0], kept):
            sequence.release()
            result.append(twin[1].fork())
            continue
        merge = policy.merge(view, plan)
        left: Evictable = _apply(sequence, plan, merge)
        if decodes:
            left = _opened(sequence, kept, seen, total)
            left.budget = budget
            left.compact = rope if policy.position_mode is PositionMode.COMPACT else None
        left.memory = None if merge is None else merge.memory
        done[version] = (kept, left)
        result.append(left)
    return result


def evict_step(sequence: KeptSequence, queries: Queries, lse: torch.Tensor, policy: SelectionPolicy) -> None:
    """After a decode step: count the attention of its queries, and evict what is beyond the sequence's budget."""
    sums = key_votes(sequence, queries, lse)[0] if policy.needs else None
    if sums is not None:
        sequence.vote(sums)
    if sequence.draft_start is None:
        evict_slots(sequence, sums, policy)


def evict_slots(sequence: KeptSequence, latest: torch.Tensor | None, policy: SelectionPolicy) -> None:
    """Leave each KV head its budget, by all attention so far and that of the latest queries [Hq, n]; merge the rest."""
    if sequence.length <= sequence.budget:
        return
    turn, stats = sequence.in_order(), Stats()
    if policy.needs:
        running = _ordered(sequence.votes[:, : sequence.length], turn, policy.group_reduce)
        window = None if latest is None else _ordered(latest, turn, policy.group_reduce)
        stats = Stats(window_attention=window, column_sums=running)
    view = _view_of_slots(sequence, turn, policy)
    plan = policy.select(policy.score(view, stats), view, sequence.budget)
    merge = policy.merge(view, plan)
    if merge is not None:
        src, dst = (turn.gather(1, slots[0])[None] for slots in (merge.src, merge.dst))
        sequence.merge(MergePlan(src, dst, merge.weight))
    sequence.memory = None if merge is None else merge.memory
    sequence.keep(turn.gather(1, plan.keep[0]))


def group_reduce(values: torch.Tensor, heads: int, how: GroupReduce) -> torch.Tensor:
    """Reduce query heads [B, Hq, ...] to KV heads [B, Hk, ...]."""
    grouped = values.view(values.shape[0], heads, -1, *values.shape[2:])
    if how == "mean":
        return grouped.mean(2)
    return grouped.amax(2) if how == "max" else grouped.sum(2)


def sums_of(sequence: Evictable, queries: Queries, lse: torch.Tensor) -> torch.Tensor:
    """Attention [Hq, slots] that every slot received from these queries; counted as device memory while it lives."""
    ledger, nbytes = sequence.group.ledger, queries.query.shape[1] * sequence.length * lse.element_size()
    ledger.take(_PURPOSE, nbytes)
    sums = key_votes(sequence, queries, lse)[0]
    weakref.finalize(sums, ledger.give, _PURPOSE, nbytes)
    return sums


def _observe(
    sequence: LayerSequence, seen: Observed | None, like: Queries, policy: SelectionPolicy, rope: Rope | None
) -> tuple[Stats, SlotView]:
    """The statistics and the view of slots that the policy declared a need for."""
    heads = sequence.group.heads
    window = sums = moments = None
    if seen is not None and seen.window is not None:
        window = group_reduce(_window_votes(sequence, seen.window, like), heads, policy.group_reduce)
    if seen is not None and seen.sums is not None:
        sums = group_reduce(seen.sums[None], heads, policy.group_reduce)
    if seen is not None and seen.moments is not None and rope is not None:
        moments = seen.moments.stats(rope, like.scale)
    return Stats(window_attention=window, column_sums=sums, query_moments=moments), _view(sequence, policy)


def _window_votes(sequence: Evictable, window: PromptWindow, like: Queries) -> torch.Tensor:
    """Attention of the last queries of a prompt, summed per slot [1, Hq, T]."""
    queries = like._replace(query=window.query, positions=window.positions, first=int(window.positions.min()))
    return key_votes(sequence, queries, window.lse)


def _view(sequence: LayerSequence, policy: SelectionPolicy) -> SlotView:
    shape = (sequence.group.heads, sequence.length)
    positions = torch.from_numpy(np.broadcast_to(sequence.positions.view, shape).copy()).to(sequence.group.device)[None]
    return SlotView(
        positions=positions,
        protected=policy.protected(positions),
        keys=_all_keys(sequence) if Need.KEYS in policy.needs else None,
        value_norms=_value_norms(sequence) if Need.VALUE_NORMS in policy.needs else None,
        memory=sequence.memory,
    )


def _view_of_slots(sequence: KeptSequence, turn: torch.Tensor, policy: SelectionPolicy) -> SlotView:
    """Slots in the order ``turn`` [Hk, n] of their positions."""
    ordered = np.take_along_axis(sequence.positions, turn.cpu().numpy(), axis=1)
    positions = torch.from_numpy(ordered).to(turn.device)[None]
    heads = torch.arange(turn.shape[0], device=turn.device)[:, None]
    norms = sequence.values[heads, turn][None].float().norm(dim=-1) if Need.VALUE_NORMS in policy.needs else None
    return SlotView(
        positions=positions,
        protected=policy.protected(positions),
        keys=sequence.keys[heads, turn][None] if Need.KEYS in policy.needs else None,
        value_norms=norms,
        memory=sequence.memory,
    )


def _ordered(values: torch.Tensor, turn: torch.Tensor, how: GroupReduce) -> torch.Tensor:
    """Values of query heads [Hq, n], reduced to KV heads and in the order of positions: [1, Hk, n]."""
    return group_reduce(values[None], turn.shape[0], how).gather(2, turn[None])


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


def _all_keys(sequence: LayerSequence) -> torch.Tensor:
    """Copies of all keys [1, Hk, T, Dk], as attention sees them."""
    keys = sequence.raw.keys.new_empty(1, sequence.group.heads, sequence.length, sequence.group.layer.key_dim)
    with segments_of(sequence) as segments:
        for segment in segments:
            keys[:, :, segment.start : segment.stop] = segment.keys
    return keys


def _value_norms(sequence: LayerSequence) -> torch.Tensor:
    """Lengths of all values [1, Hk, T] fp32."""
    norms = torch.empty(1, sequence.group.heads, sequence.length, device=sequence.group.device)
    with segments_of(sequence) as segments:
        for segment in segments:
            norms[:, :, segment.start : segment.stop] = segment.values.float().norm(dim=-1)
    return norms


def _slots(sequence: LayerSequence, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor, IntArray]:
    """Copies of these slots [Hk, K]: K [Hk, K, Dk], V [Hk, K, Dv] and positions [Hk, K]."""
    group, layer = sequence.group, sequence.group.layer
    count, like = slots.shape[1], sequence.raw.keys
    keys, values = (
        like.new_empty(group.heads, count, layer.key_dim),
        like.new_empty(group.heads, count, layer.value_dim),
    )
    with segments_of(sequence) as segments:
        for segment in segments:
            head, column = np.nonzero((slots >= segment.start) & (slots < segment.stop))
            source = torch.from_numpy(slots[head, column] - segment.start).to(keys.device)
            heads, columns = torch.from_numpy(head).to(keys.device), torch.from_numpy(column).to(keys.device)
            keys[heads, columns] = segment.keys[0][heads, source]
            values[heads, columns] = segment.values[0][heads, source]
    held = sequence.positions.view
    positions = np.take_along_axis(np.broadcast_to(held, (slots.shape[0], held.shape[1])), slots, axis=1)
    return keys, values, positions
