"""Attention of one sequence as a merge of partials, and the statistics of a second pass over the same keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kvtier.core.kept import KeptSequence
from kvtier.core.policy import Boxes, IntArray, RetrievalPolicy
from kvtier.core.ragged import RaggedFrames, RaggedSequence
from kvtier.core.ring import WindowSequence
from kvtier.core.rotation import turned
from kvtier.core.sequence import LayerSequence, Segment
from kvtier.core.views import SlabFrames
from kvtier.kernels.column_sums import column_sums
from kvtier.kernels.gather_attention import attend_pages, attend_run
from kvtier.kernels.merge_partials import empty_partial, merge_partials
from kvtier.kernels.ranked_attention import attend_ranked
from kvtier.types import Partial, Visibility

# Partials held before they are merged: a long prompt over many segments would otherwise hold one output for each.
_MERGE_WIDTH = 8

__all__ = ["AnySequence", "Queries", "attend_all", "attend_chosen", "key_votes", "positions_of", "segments_of"]


AnySequence: TypeAlias = "LayerSequence | WindowSequence | KeptSequence | RaggedSequence"


class Queries(NamedTuple):
    """Queries of one sequence and how they attend.

    Parameters
    ----------
    query : Tensor
        [1, Hq, Tq, Dk].
    positions : Tensor
        [1, Tq] int64.
    first : int
        Position of the earliest query.
    """

    query: torch.Tensor
    positions: torch.Tensor
    first: int
    scale: float
    window: int | None
    softcap: float | None

    def see_all(self, sequence: AnySequence) -> bool:
        """Whether every query sees every slot, as in a decode step."""
        last = sequence.last_position
        return self.window is None and last is not None and last <= self.first

    def places(self) -> IntArray:
        """Positions [Tq] on the host; of a single query without waiting for the device."""
        if self.positions.shape[1] == 1:
            return np.array([self.first])
        places: IntArray = self.positions[0].cpu().numpy()
        return places

    def visibility(self, key_positions: IntArray) -> Visibility | None:
        """Which keys at ``key_positions`` [1 or Hk, n] these queries may see; None when all see all."""
        if self.window is None and int(key_positions.max()) <= self.first:
            return None
        keys = torch.from_numpy(np.ascontiguousarray(key_positions)).to(self.query.device)[None]
        return Visibility(self.positions.to(keys.device), keys, self.window)


@contextmanager
def segments_of(sequence: AnySequence) -> Iterator[Iterable[Segment]]:
    """All slots of a sequence as segments; staging is counted only when some must be fetched."""
    in_place = _in_place(sequence)
    if in_place is not None:
        yield in_place
    elif isinstance(sequence, (LayerSequence, RaggedSequence)):
        with sequence.group.staging(sequence.loose_columns) as columns:
            yield sequence.segments(columns)


def attend_all(sequence: AnySequence, queries: Queries) -> Partial:
    """Attention over every slot, in whatever tier it lives."""
    if isinstance(sequence, RaggedSequence):
        return _over_ragged(sequence, queries)
    positions = None if queries.see_all(sequence) else positions_of(sequence)
    in_place = _in_place(sequence)
    if in_place is not None:
        return _over(in_place, queries, positions, sequence)
    with segments_of(sequence) as segments:
        return _over(segments, queries, positions, sequence)


def attend_chosen(sequence: LayerSequence, queries: Queries, policy: RetrievalPolicy, read: int) -> tuple[Partial, int]:
    """Attention over the tail and the pages that the policy chooses within ``read`` tokens, and how many pages."""
    raw, sketch = sequence.raw, sequence.sketch
    count = max(0, read - raw.length) // sequence.group.page_tokens
    if sketch is None or count >= sequence.pages.length:
        return attend_all(sequence, queries), sequence.pages.length
    all_seen = queries.see_all(sequence)
    slab = sequence.slab_in_place() if all_seen else None
    boxes = policy.boxes(sketch.views()) if slab is not None and count else None
    if slab is not None and boxes is not None:
        return _over_best(sequence, queries, slab, boxes, count), count
    chosen = sequence.chosen = policy.choose(policy.rank(queries.query, sketch.views()), count).pages
    if slab is None:
        partials = _over_chosen(sequence, queries, chosen, all_seen=all_seen)
    else:
        frames = slab.at(chosen)
        query, scale, softcap = queries.query, queries.scale, queries.softcap
        partials = [attend_pages(query, slab.keys, slab.values, frames, scale=scale, softcap=softcap)]
    if raw.length:
        partials.append(_over([sequence.tail()], queries, None if all_seen else sequence.positions.view, sequence))
    return _merged(partials, queries, sequence), count


def _over_best(sequence: LayerSequence, queries: Queries, slab: SlabFrames, boxes: Boxes, count: int) -> Partial:
    """Attention over the tail and the ``count`` pages with the highest bounds, chosen and attended in one call."""
    raw = sequence.raw
    partial, sequence.chosen = attend_ranked(
        queries.query,
        boxes.low,
        boxes.high,
        slab.keys,
        slab.values,
        slab.frames,
        count,
        newest=raw.batched() if raw.length else None,
        group_reduce=boxes.group_reduce,
        scale=queries.scale,
        softcap=queries.softcap,
    )
    return partial


def key_votes(sequence: AnySequence, queries: Queries, lse: torch.Tensor) -> torch.Tensor:
    """Attention of these queries summed per key [1, Hq, slots], from their saved ``lse`` [1, Hq, Tq]."""
    all_seen = not isinstance(sequence, RaggedSequence) and queries.see_all(sequence)
    positions = None if all_seen else positions_of(sequence)
    in_place = _in_place(sequence)
    if in_place is not None and len(in_place) == 1:
        return _votes_for(in_place[0], sequence, queries, lse, positions)
    votes = torch.empty(1, queries.query.shape[1], sequence.length, dtype=lse.dtype, device=lse.device)
    with segments_of(sequence) as segments:
        for segment in segments:
            found = _votes_for(segment, sequence, queries, lse, positions)
            votes[:, :, segment.start : segment.stop] = found
    return votes


def _votes_for(
    segment: Segment, sequence: AnySequence, queries: Queries, lse: torch.Tensor, positions: IntArray | None
) -> torch.Tensor:
    """``key_votes`` of one segment, by the positions [1 or Hk, slots] of all slots or, for None, all seen."""
    seen = None if positions is None else queries.visibility(positions[:, segment.start : segment.stop])
    query = _meeting(sequence, segment, queries)
    return column_sums(query, lse, segment.keys, scale=queries.scale, softcap=queries.softcap, visible=seen)


def _meeting(sequence: AnySequence, segment: Segment, queries: Queries) -> torch.Tensor:
    """The queries as the keys of a segment must be met: turned where positions are compact."""
    if not isinstance(sequence, KeptSequence) or sequence.compact is None:
        return queries.query
    tokens = segment.ahead - sequence.ahead(queries.places())
    return turned(sequence.compact, queries.query, torch.from_numpy(tokens)) if tokens.any() else queries.query


def _in_place(sequence: AnySequence) -> Sequence[Segment] | None:
    """All slots as views where they lie; None when some must be fetched."""
    if isinstance(sequence, RaggedSequence):
        return None
    if isinstance(sequence, LayerSequence):
        return sequence.segments_in_place()
    return sequence.segments() if isinstance(sequence, KeptSequence) else list(sequence.segments())


def _over(
    segments: Iterable[Segment],
    queries: Queries,
    positions: IntArray | None,
    sequence: AnySequence,
) -> Partial:
    """Attention over segments, by the positions [1 or Hk, slots] of all slots or, for None, all seen."""
    found: list[Partial] = []
    for segment in segments:
        seen = None if positions is None else queries.visibility(positions[:, segment.start : segment.stop])
        found.append(
            attend_run(
                _meeting(sequence, segment, queries),
                segment.keys,
                segment.values,
                scale=queries.scale,
                softcap=queries.softcap,
                visible=seen,
            )
        )
        if len(found) >= _MERGE_WIDTH:
            found = [merge_partials(found)]
    return _merged(found, queries, sequence)


def _merged(partials: Sequence[Partial], queries: Queries, sequence: AnySequence) -> Partial:
    """Partials over all that was read, of which there may be nothing."""
    if not partials:
        layer = sequence.layer if isinstance(sequence, WindowSequence) else sequence.group.layer
        return empty_partial(queries.query, layer.value_dim)
    return partials[0] if len(partials) == 1 else merge_partials(partials)


def _over_ragged(sequence: RaggedSequence, queries: Queries) -> Partial:
    """Attention over heads of different lengths, and over what they have in common."""
    all_seen = queries.window is None and sequence.newest <= queries.first
    slabs = sequence.kept.in_place() if all_seen else None
    if slabs is None:
        with segments_of(sequence) as segments:
            return _over(segments, queries, sequence.positions, sequence)
    partials = [_over_heads(slab, queries) for slab in slabs]
    if sequence.recent.length:
        partials.append(attend_all(sequence.recent, queries))
    return partials[0] if len(partials) == 1 else merge_partials(partials)


def _over_heads(slab: RaggedFrames, queries: Queries) -> Partial:
    """Attention of each KV head over its own number of tokens in one slab; every query sees them."""
    if slab.runs is not None:
        parts = [
            attend_run(query, *run, scale=queries.scale, softcap=queries.softcap)
            for query, run in zip(queries.query.chunk(len(slab.runs), dim=1), slab.runs, strict=True)
        ]
        return Partial(torch.cat([part.out for part in parts], dim=1), torch.cat([part.lse for part in parts], dim=1))
    return attend_pages(
        queries.query,
        slab.keys,
        slab.values,
        slab.frames,
        scale=queries.scale,
        softcap=queries.softcap,
        lengths=slab.lengths,
    )


def _over_chosen(sequence: LayerSequence, queries: Queries, chosen: torch.Tensor, *, all_seen: bool) -> list[Partial]:
    """Attention over page columns [1, Hk, n] that may lie in any slab and tier."""
    columns = chosen[0].cpu().numpy()
    positions = None if all_seen else _page_positions(sequence, columns)
    partials = []
    for part, frames in _brought(sequence, columns):
        partials += _over_pages(sequence, frames, queries, None if positions is None else positions[:, part])
    return partials


def _over_pages(
    sequence: LayerSequence, frames: IntArray, queries: Queries, positions: IntArray | None
) -> list[Partial]:
    """Attention over frames [Hk, n] at positions [Hk, n, P], one partial for each slab that holds some."""
    partials = []
    for slab in sequence.group.arena.slabs_of(frames):
        index, places, lengths, device = frames - slab.first, positions, None, slab.keys.device
        if slab.inside is not None:
            order, counts = _left(slab.inside)
            index = np.where(np.arange(order.shape[1]) < counts, np.take_along_axis(index, order, axis=1), 0)
            lengths = torch.from_numpy(counts * sequence.group.page_tokens).to(device).view(1, -1)
            if places is not None:
                places = np.take_along_axis(places, order[:, :, None], axis=1)
        seen = None if places is None else queries.visibility(places.reshape(places.shape[0], -1))
        partials.append(
            attend_pages(
                queries.query,
                slab.keys,
                slab.values,
                torch.from_numpy(index).to(device)[None],
                scale=queries.scale,
                softcap=queries.softcap,
                visible=seen,
                lengths=lengths,
            )
        )
    return partials


def _left(inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> tuple[IntArray, IntArray]:
    """An order of the pages [Hk, m] that begins with those ``inside`` [Hk, n], and how many they are [Hk, 1]."""
    counts: IntArray = inside.sum(axis=1, keepdims=True, dtype=np.int64)
    order: IntArray = np.argsort(~inside, axis=1, kind="stable")[:, : int(counts.max())]
    return order, counts


def _brought(sequence: LayerSequence, columns: IntArray) -> Iterator[tuple[slice, IntArray]]:
    """Parts of the page columns [Hk, n], as many at once as the device holds, and the frames where they are then."""
    group, store = sequence.group, sequence.group.store
    chosen = sequence.pages.view[group.head_rows, columns]
    if not store.bounded:
        yield slice(columns.shape[1]), store.frames(chosen)
        return
    for part in _fitting(chosen, group.piece_tokens() // group.page_tokens):
        held = chosen[:, part]
        store.tick()
        store.touch(held)
        _promote(sequence, held)
        yield part, store.frames(held)


def _promote(sequence: LayerSequence, pages: IntArray) -> None:
    group = sequence.group
    absent = pages.size - int(np.count_nonzero(group.store.resident(pages)))
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


def positions_of(sequence: AnySequence) -> IntArray:
    """Positions [1 or Hk, slots] of all slots of a sequence."""
    if isinstance(sequence, (KeptSequence, RaggedSequence)):
        return sequence.positions
    return sequence.positions[None] if isinstance(sequence, WindowSequence) else sequence.positions.view
