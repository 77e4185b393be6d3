"""Eviction while decoding: what a step's attention adds, and the slots that leave a `KeptSequence` after it."""

from __future__ import annotations

import numpy as np
import torch

from kvtier.core.attention import Queries, attend_all, key_votes
from kvtier.core.kept import KeptSequence
from kvtier.core.policy import IntArray, KeepPlan, MergePlan, Need, SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.kernels.merge_partials import merge_partials, sink_partial
from kvtier.kernels.weighed_attention import attend_weighing
from kvtier.types import GroupReduce, Partial

__all__ = ["attend_step", "evict_slots", "evict_step", "group_reduce", "told_by_rule"]

_ATTENTION = frozenset({Need.COLUMN_SUMS, Need.WINDOW_ATTENTION})


def attend_step(
    sequence: KeptSequence, queries: Queries, sink: torch.Tensor | None, policy: SelectionPolicy
) -> Partial:
    """Attention of a decode step, with the logits of a sink [Hq] if there is one, and the eviction that follows it."""
    partial, votes = _attended(sequence, queries, policy)
    if sink is not None:
        whole = merge_partials([partial, sink_partial(sink, partial)])
        if votes is not None:
            votes = votes * (partial.lse - whole.lse).exp().sum(2, keepdim=True)
        partial = whole
    if votes is None and policy.needs & _ATTENTION:
        votes = key_votes(sequence, queries, partial.lse)
    evict_step(sequence, None if votes is None else votes[0], policy)
    return partial


def evict_step(sequence: KeptSequence, latest: torch.Tensor | None, policy: SelectionPolicy) -> None:
    """After a decode step: count the attention of its queries [Hq, n], and evict what is beyond the budget."""
    if latest is not None and Need.COLUMN_SUMS in policy.needs:
        sequence.vote(latest)
    evict_slots(sequence, latest, policy)


def evict_slots(sequence: KeptSequence, latest: torch.Tensor | None, policy: SelectionPolicy) -> None:
    """Leave each KV head its budget, by all attention so far and that of the latest queries [Hq, n]; merge the rest."""
    excess = sequence.length - sequence.budget
    if excess <= 0:
        return
    worst = told_by_rule(sequence, latest, policy) if excess == 1 else None
    if worst is not None and not policy.merges_steps:
        sequence.drop(worst)
        return
    turn = sequence.in_order()
    view = _view(sequence, turn, policy)
    if worst is None:
        scores = policy.score(view, _stats(sequence, turn, latest, policy))
        worst = _worst(scores, view.protected) if excess == 1 and _ranks_only(policy) else None
    if worst is None:
        plan = policy.select(scores, view, sequence.budget)
        _merge(sequence, turn, policy.merge(view, plan))
        sequence.keep(turn.gather(1, plan.keep[0]))
        return
    if policy.merges_steps:
        _merge(sequence, turn, policy.merge(view, _all_but(worst, view.protected)))
    sequence.drop(worst)


def group_reduce(values: torch.Tensor, heads: int, how: GroupReduce) -> torch.Tensor:
    """Reduce query heads [B, Hq, ...] to KV heads [B, Hk, ...]."""
    grouped = values.view(values.shape[0], heads, -1, *values.shape[2:])
    if how == "mean":
        return grouped.mean(2)
    return grouped.amax(2) if how == "max" else grouped.sum(2)


def _ranks_only(policy: SelectionPolicy) -> bool:
    """Whether a policy leaves it to the runtime to choose by its scores."""
    return type(policy).select is SelectionPolicy.select


def _attended(sequence: KeptSequence, queries: Queries, policy: SelectionPolicy) -> tuple[Partial, torch.Tensor | None]:
    """Attention over all slots, and how much of it each received [1, Hq, n] if the policy asks and one pass tells."""
    if policy.needs & _ATTENTION and sequence.compact is None and queries.see_all(sequence):
        (whole,) = sequence.segments()
        return attend_weighing(queries.query, whole.keys, whole.values, scale=queries.scale, softcap=queries.softcap)
    return attend_all(sequence, queries), None


def told_by_rule(sequence: KeptSequence, latest: torch.Tensor | None, policy: SelectionPolicy) -> IntArray | None:
    """Which token of each KV head [Hk] leaves by the rule of the policy, in order of positions; None if it has none."""
    rule, order = policy.step_rule, sequence.order
    if rule is None:
        return None
    if rule.by is None:
        return order.oldest(sinks=rule.sinks, recent=rule.recent)
    votes = sequence.votes if rule.by is Need.COLUMN_SUMS else latest
    if votes is None:
        return None
    # On the host: a look at some thousand numbers is done before torch has woken its threads.
    grouped = votes.cpu().numpy().reshape(order.heads, -1, order.length)
    # The least mean is the least sum.
    scores = np.maximum.reduce(grouped, axis=1) if policy.group_reduce == "max" else np.add.reduce(grouped, axis=1)
    return order.least(scores, sinks=rule.sinks, recent=rule.recent)


def _all_but(worst: IntArray, slots: torch.Tensor) -> KeepPlan:
    """The plan that drops one slot of each KV head [Hk], of slots [1, Hk, n]."""
    left = torch.arange(slots.shape[-1] - 1, device=slots.device)
    return KeepPlan((left + (left >= torch.from_numpy(worst).to(slots.device)[:, None]))[None])


def _merge(sequence: KeptSequence, turn: torch.Tensor, merge: MergePlan | None) -> None:
    """Fold slots as a plan says, whose slots are in the order ``turn`` [Hk, n] of positions."""
    if merge is not None:
        src, dst = (turn.gather(1, slots[0])[None] for slots in (merge.src, merge.dst))
        sequence.merge(MergePlan(src, dst, merge.weight))
    sequence.memory = None if merge is None else merge.memory


def _worst(scores: torch.Tensor, protected: torch.Tensor) -> IntArray | None:
    """The slot of each KV head [Hk] that `SelectionPolicy.select` drops when one must leave, by scores [1, Hk, n].

    That is the last of the least; None where one cannot tell it by a look at scores that are not protected.
    """
    # On the host: a look at some thousand numbers is done before torch has woken its threads.
    ranked = scores[0].masked_fill(protected[0], torch.inf).cpu().numpy()
    worst: IntArray = scores.shape[-1] - 1 - ranked[:, ::-1].argmin(axis=1)
    return worst if np.isfinite(ranked[np.arange(worst.size), worst]).all() else None


def _stats(sequence: KeptSequence, turn: torch.Tensor, latest: torch.Tensor | None, policy: SelectionPolicy) -> Stats:
    """What the policy declared a need for, in the order ``turn`` [Hk, n] of positions."""
    sums = window = None
    if Need.COLUMN_SUMS in policy.needs:
        sums = _ordered(sequence.votes, turn, policy.group_reduce)
    if Need.WINDOW_ATTENTION in policy.needs and latest is not None:
        window = _ordered(latest, turn, policy.group_reduce)
    return Stats(window_attention=window, column_sums=sums)


def _view(sequence: KeptSequence, turn: torch.Tensor, policy: SelectionPolicy) -> SlotView:
    """Slots in the order ``turn`` [Hk, n] of their positions."""
    positions = torch.from_numpy(sequence.order.ascending).to(turn.device)[None]
    keys = norms = None
    if Need.KEYS in policy.needs or Need.VALUE_NORMS in policy.needs:
        rows = (turn + torch.arange(turn.shape[0], device=turn.device)[:, None] * sequence.capacity).flatten()
        shape = (1, *turn.shape, -1)
        keys = sequence.keys.flatten(0, 1).index_select(0, rows).view(shape) if Need.KEYS in policy.needs else None
        if Need.VALUE_NORMS in policy.needs:
            norms = sequence.values.flatten(0, 1).index_select(0, rows).view(shape).float().norm(dim=-1)
    return SlotView(
        positions=positions,
        protected=policy.protected(positions),
        keys=keys,
        value_norms=norms,
        memory=sequence.memory,
    )


def _ordered(values: torch.Tensor, turn: torch.Tensor, how: GroupReduce) -> torch.Tensor:
    """Values of query heads [Hq, n], reduced to KV heads and in the order of positions: [1, Hk, n]."""
    return group_reduce(values[None], turn.shape[0], how).gather(2, turn[None])
