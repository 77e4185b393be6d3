"""Attention of one sequence as a merge of partials, and the statistics of a second pass over the same keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from kvtier.core.policy import IntArray, RetrievalPolicy
from kvtier.core.ring import WindowSequence
from kvtier.core.sequence import LayerSequence, Segment
from kvtier.kernels.column_sums import column_sums
from kvtier.kernels.gather_attention import attend_pages, attend_run
from kvtier.kernels.merge_partials import empty_partial, merge_partials
from kvtier.types import Partial, Visibility

# Partials held before they are merged: a long prompt over many segments would otherwise hold one output for each.
_MERGE_WIDTH = 8

__all__ = ["Queries", "attend_all", "attend_chosen", "key_votes", "segments_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Queries of one sequence and how they attend.

    Parameters
    ----------
    query : Tensor
        [1, Hq, Tq, Dk].
    positions : Tensor
        [1, Tq] int64, on the device of the queries.
    first : int
        Position of the earliest query.
    """

    query: torch.Tensor
    positions: torch.Tensor
    first: int
    scale: float
    window: int | None
    softcap: float | None

    def visibility(self, key_positions: IntArray) -> Visibility | None:
        """Which keys at ``key_positions`` [1 or Hk, n] these queries may see; None when all see all."""
        if self.window is None and int(key_positions[:, -1].max()) <= self.first:
            return None
        keys = torch.from_numpy(np.ascontiguousarray(key_positions)).to(self.query.device)[None]
        return Visibility(self.positions, keys, self.window)


@contextmanager
def segments_of(sequence: LayerSequence | WindowSequence) -> Iterator[Iterable[Segment]]:
    """All slots of a sequence as segments; staging is counted only when some must be fetched."""
    if isinstance(sequence, WindowSequence):
        yield sequence.segments()
    elif not sequence.loose_columns:
        yield sequence.segments(1)
    else:
        with sequence.group.staging(sequence.loose_columns) as columns:
            yield sequence.segments(columns)


def attend_all(sequence: LayerSequence | WindowSequence, queries: Queries) -> Partial:
    """Attention over every slot, in whatever tier it lives."""
    positions = _positions(sequence)
    partials: list[Partial] = []
    with segments_of(sequence) as segments:
        for segment in segments:
            partials.append(_over(segment, queries, positions[:, segment.start : segment.stop]))
            if len(partials) == _MERGE_WIDTH:
                partials = [merge_partials(partials)]
    return _merged(partials, queries, sequence)


def attend_chosen(sequence: LayerSequence, queries: Queries, policy: RetrievalPolicy, read: int) -> tuple[Partial, int]:
    """Attention over the tail and the pages that the policy chooses within ``read`` tokens, and how many pages."""
    group, store = sequence.group, sequence.group.store
    count = (read - sequence.tail_length) // group.page_tokens
    if sequence.sketch is None or count >= sequence.pages.length:
        return attend_all(sequence, queries), sequence.pages.length
    plan = policy.choose(policy.rank(queries.query, sequence.sketch.views()), count)
    columns = plan.pages[0].cpu().numpy()
    chosen = np.take_along_axis(sequence.pages.view, columns, axis=1)
    sequence.chosen = chosen
    positions = _page_positions(sequence, columns)
    partials = []
    for part in _fitting(chosen, group.piece_tokens() // group.page_tokens if store.bounded else chosen.shape[1]):
        held = chosen[:, part]
        store.tick()
        store.touch(held)
        _promote(sequence, held)
        partials.append(_over_pages(sequence, held, queries, positions[:, part]))
    if sequence.tail_length:
        tail = Segment(sequence.sealed, sequence.length, *sequence.tail())
        partials.append(_over(tail, queries, sequence.positions.view[:, tail.start : tail.stop]))
    return _merged(partials, queries, sequence), chosen.shape[1]


def key_votes(sequence: LayerSequence, queries: Queries, lse: torch.Tensor) -> torch.Tensor:
    """Attention of these queries summed per key [1, Hq, slots], from their saved ``lse`` [1, Hq, Tq]."""
    votes = torch.empty(1, queries.query.shape[1], sequence.length, dtype=lse.dtype, device=lse.device)
    positions = sequence.positions.view
    with segments_of(sequence) as segments:
        for segment in segments:
            votes[:, :, segment.start : segment.stop] = column_sums(
                queries.query,
                lse,
                segment.keys,
                scale=queries.scale,
                softcap=queries.softcap,
                visible=queries.visibility(positions[:, segment.start : segment.stop]),
            )
    return votes


def _over(segment: Segment, queries: Queries, positions: IntArray) -> Partial:
    return attend_run(
        queries.query,
        segment.keys,
        segment.values,
        scale=queries.scale,
        softcap=queries.softcap,
        visible=queries.visibility(positions),
    )


def _over_pages(sequence: LayerSequence, pages: IntArray, queries: Queries, positions: IntArray) -> Partial:
    """Attention over resident pages [Hk, n] with positions [Hk, n, P]."""
    frames = sequence.group.store.frames(pages)
    visible = queries.visibility(positions.reshape(positions.shape[0], -1))
    slab = sequence.group.arena.in_one_slab(frames)
    if slab is not None:
        keys, values, first = slab
        index = torch.from_numpy(frames - first).to(keys.device)[None]
        return attend_pages(
            queries.query, keys, values, index, scale=queries.scale, softcap=queries.softcap, visible=visible
        )
    keys, values = sequence.group.arena.read(frames.ravel())
    run_keys = keys.unflatten(0, frames.shape).flatten(1, 2)[None]
    run_values = values.unflatten(0, frames.shape).flatten(1, 2)[None]
    return attend_run(
        queries.query, run_keys, run_values, scale=queries.scale, softcap=queries.softcap, visible=visible
    )


def _promote(sequence: LayerSequence, pages: IntArray) -> None:
    group = sequence.group
    absent = int((~group.store.resident(pages)).sum())
    if not absent:
        return
    with group.staging(-(-absent // group.heads)) as columns:
        group.store.promote(pages.ravel(), batch=columns * group.heads)


def _page_positions(sequence: LayerSequence, columns: IntArray) -> IntArray:
    """Positions [Hk, n, P] of page columns [Hk, n]."""
    page = sequence.group.page_tokens
    held = sequence.positions.view[:, : sequence.sealed]
    paged = held.reshape(held.shape[0], -1, page)
    rows = np.arange(paged.shape[0])[:, None] if paged.shape[0] > 1 else 0
    found: IntArray = paged[rows, columns]
    return found


def _fitting(chosen: IntArray, most: int) -> list[slice]:
    step = max(1, most)
    return [slice(start, min(start + step, chosen.shape[1])) for start in range(0, chosen.shape[1], step)]


def _positions(sequence: LayerSequence | WindowSequence) -> IntArray:
    return sequence.positions[None] if isinstance(sequence, WindowSequence) else sequence.positions.view


def _merged(partials: list[Partial], queries: Queries, sequence: LayerSequence | WindowSequence) -> Partial:
    if not partials:
        layer = sequence.layer if isinstance(sequence, WindowSequence) else sequence.group.layer
        return empty_partial(queries.query, layer.value_dim)
    return partials[0] if len(partials) == 1 else merge_partials(partials)
