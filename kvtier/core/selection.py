"""Eviction at the end of a prompt: votes from a second pass, a policy's plan, and its application to the pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvtier.core.attention import Queries, key_votes, segments_of
from kvtier.core.policy import IntArray, Need, SelectionPolicy
from kvtier.core.sequence import LayerSequence
from kvtier.core.stats import SlotView, Stats
from kvtier.types import GroupReduce

__all__ = ["PromptWindow", "evict_rows", "group_reduce"]


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
        first = max(0, lse.shape[2] - width)
        return cls(queries.query[:, :, first:].clone(), lse[:, :, first:].clone(), queries.positions[:, first:].clone())

    def then(self, later: PromptWindow, width: int) -> PromptWindow:
        """The last ``width`` of these queries followed by ``later``."""
        first = max(0, self.lse.shape[2] + later.lse.shape[2] - width)
        return PromptWindow(
            torch.cat([self.query, later.query], dim=2)[:, :, first:],
            torch.cat([self.lse, later.lse], dim=2)[:, :, first:],
            torch.cat([self.positions, later.positions], dim=1)[:, first:],
        )


def evict_rows(
    rows: Sequence[LayerSequence],
    windows: Sequence[PromptWindow | None],
    like: Queries,
    policy: SelectionPolicy,
    keep: int,
) -> list[LayerSequence]:
    """Apply a policy to every row of one layer; rows that were forks of each other and keep the same stay forks."""
    done: dict[object, tuple[torch.Tensor, LayerSequence]] = {}
    result = []
    for sequence, window in zip(rows, windows, strict=True):
        if window is None or sequence.length <= keep:
            result.append(sequence)
            continue
        kept = _plan(sequence, window, like, policy, keep)
        version = sequence.version
        twin = done.get(version)
        if twin is not None and torch.equal(twin[0], kept):
            sequence.release()
            result.append(twin[1].fork())
            continue
        _apply(sequence, kept)
        done[version] = (kept, sequence)
        result.append(sequence)
    return result


def group_reduce(values: torch.Tensor, heads: int, how: GroupReduce) -> torch.Tensor:
    """Reduce query heads [B, Hq, ...] to KV heads [B, Hk, ...]."""
    grouped = values.view(values.shape[0], heads, -1, *values.shape[2:])
    if how == "mean":
        return grouped.mean(2)
    return grouped.amax(2) if how == "max" else grouped.sum(2)


def _plan(
    sequence: LayerSequence, window: PromptWindow, like: Queries, policy: SelectionPolicy, keep: int
) -> torch.Tensor:
    """Slots to keep [Hk, K]."""
    heads = sequence.group.heads
    positions = torch.from_numpy(np.broadcast_to(sequence.positions.view, (heads, sequence.length)).copy())
    positions = positions.to(window.query.device)[None]
    view = SlotView(positions=positions, protected=policy.protected(positions))
    stats = Stats()
    if Need.WINDOW_ATTENTION in policy.needs:
        stats = Stats(window_attention=_votes(sequence, window, like, policy.group_reduce))
    return policy.select(policy.score(view, stats), view, keep).keep[0]


def _votes(sequence: LayerSequence, window: PromptWindow, like: Queries, how: GroupReduce) -> torch.Tensor:
    """Attention of the last queries per key, reduced to KV heads [1, Hk, T]."""
    queries = Queries(
        query=window.query,
        positions=window.positions,
        first=int(window.positions.min()),
        scale=like.scale,
        window=like.window,
        softcap=like.softcap,
    )
    return group_reduce(key_votes(sequence, queries, window.lse), sequence.group.heads, how)


def _apply(sequence: LayerSequence, keep: torch.Tensor) -> None:
    """Leave only the slots ``keep`` [Hk, K], ascending."""
    group = sequence.group
    slots = keep.cpu().numpy()
    nbytes = slots.shape[1] * group.layer.token_bytes
    with group.ledger.lent("staging", nbytes):
        sequence.replace(*_kept(sequence, slots))


def _kept(sequence: LayerSequence, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor, IntArray]:
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
