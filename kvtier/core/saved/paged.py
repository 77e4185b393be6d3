"""Pages of saved sequences: read from whatever tier holds them, put back within the budget of a new session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.core.growable import GrowingArray
from kvtier.core.growing import next_pages
from kvtier.core.ragged import HeadPages, RaggedSequence
from kvtier.core.saved.description import Array, PagedState, RaggedState, Shared
from kvtier.core.saved.image import Image, frames_in_image
from kvtier.core.saved.payload import PayloadReader, PayloadWriter, read_memory, require
from kvtier.core.sequence import LayerSequence
from kvtier.errors import RecordFormatError

if TYPE_CHECKING:
    from kvtier.core.attention import AnySequence
    from kvtier.core.group import LayerGroup
    from kvtier.core.policy import IntArray

__all__ = ["fill_paged", "fill_ragged", "save_paged", "save_ragged"]


def save_paged(sequence: LayerSequence, earlier: Sequence[AnySequence], out: PayloadWriter) -> PagedState:
    """Write a sequence, but for the pages that ``earlier`` rows hold in the same layer.

    Raises
    ------
    PagesLostError
        When a page in a lower tier is damaged or cannot be read.
    CapacityError
        When the device has no room to read pages of lower tiers into.
    """
    group, pages = sequence.group, sequence.pages.view
    shared = _shared(pages, earlier)
    own = pages[:, 0 if shared is None else shared.columns :]
    keys, values = sequence.raw.view()
    sketch = sequence.sketch
    return PagedState(
        shared=shared,
        pages=out.stream(
            (own.shape[1], group.heads, _page_width(group)), group.dtype, _page_rows(group, own.T.ravel())
        ),
        frames=frames_in_image(group, own, out),
        positions=out.put(sequence.positions.view),
        sketch=None if sketch is None else {name: out.put(held[0]) for name, held in sketch.views().items()},
        tail_keys=out.put(keys),
        tail_values=out.put(values),
        evicted=sequence.evicted_length,
        memory=None if sequence.memory is None else out.put(sequence.memory),
    )


def fill_paged(
    sequence: LayerSequence,
    state: PagedState,
    earlier: Sequence[AnySequence],
    payload: PayloadReader,
    image: Image | None,
) -> None:
    """Put a saved sequence into an empty one, its pages where they lay if there is an image of that.

    Raises
    ------
    RecordFormatError
        When the file is damaged, or contradicts itself.
    CapacityError
        When no tier has room.
    """
    group, layer = sequence.group, sequence.group.layer
    tail = state.tail_keys.shape[-2] if len(state.tail_keys.shape) == 3 else 0
    require(state.pages, layer.dtype, (None, group.heads, _page_width(group)))
    require(state.tail_keys, layer.dtype, (group.heads, tail, layer.key_dim))
    require(state.tail_values, layer.dtype, (group.heads, tail, layer.value_dim))
    if state.shared is not None:
        _share(sequence, state.shared, earlier)
    slots = (sequence.pages.length + state.pages.shape[0]) * group.page_tokens + tail
    require(state.positions, "int64", (None, slots))
    if tail >= group.block_tokens or state.positions.shape[0] not in (1, group.heads) or state.evicted > slots:
        raise RecordFormatError(f"a sequence of {slots} slots, {tail} of them not sealed, contradicts itself")
    _fill_pages(group, sequence.pages, state.pages, state.frames, payload, image)
    sequence.positions.append(payload.read(state.positions).numpy())
    _fill_sketch(sequence, state, payload)
    sequence.raw.extend(*(payload.read(part).to(group.device) for part in (state.tail_keys, state.tail_values)))
    sequence.evicted_length = state.evicted
    sequence.memory = read_memory(payload, state.memory, group)
    sequence.last_position = int(sequence.positions.view[:, -1].max()) if slots else None
    sequence.version = object()


def save_ragged(sequence: RaggedSequence, earlier: Sequence[AnySequence], out: PayloadWriter) -> RaggedState:
    """Write a sequence, but for what ``earlier`` rows hold in the same layer; raises as `save_paged`."""
    group, kept = sequence.group, sequence.kept
    for row, other in enumerate(earlier):
        if isinstance(other, RaggedSequence) and other.kept is kept:
            recent = save_paged(sequence.recent, earlier, out)
            return RaggedState(
                shared=row, pages=None, frames=None, counts=None, positions=None, newest=sequence.newest, recent=recent
            )
    ids = kept.ids
    return RaggedState(
        shared=None,
        pages=out.stream((ids.size, _page_width(group)), group.dtype, _page_rows(group, ids)),
        frames=frames_in_image(group, ids[None], out),
        counts=out.put(kept.counts),
        positions=out.put(kept.positions),
        newest=sequence.newest,
        recent=save_paged(sequence.recent, earlier, out),
    )


def fill_ragged(
    recent: LayerSequence,
    state: RaggedState,
    earlier: Sequence[AnySequence],
    payload: PayloadReader,
    image: Image | None,
) -> RaggedSequence:
    """A saved sequence over an empty one, which becomes its common part; raises as `fill_paged`."""
    sequence = RaggedSequence(recent.group, HeadPages.none(recent.group), recent, state.newest)
    try:
        sequence.kept = _kept_pages(recent.group, state, earlier, payload, image)
        fill_paged(recent, state.recent, earlier, payload, image)
    except BaseException:
        sequence.kept.release()
        raise
    return sequence


def _kept_pages(
    group: LayerGroup, state: RaggedState, earlier: Sequence[AnySequence], payload: PayloadReader, image: Image | None
) -> HeadPages:
    if state.shared is not None:
        source = earlier[state.shared] if state.shared < len(earlier) else None
        if not isinstance(source, RaggedSequence):
            raise RecordFormatError(f"row {state.shared} has no pages to share")
        source.kept.retain()
        return source.kept
    if state.pages is None or state.counts is None or state.positions is None:
        raise RecordFormatError("a sequence of heads of different lengths has neither pages nor a row to share")
    require(state.counts, "int64", (group.heads,))
    require(state.pages, group.layer.dtype, (None, _page_width(group)))
    require(state.positions, "int64", (group.heads, None))
    counts, positions = (payload.read(part).numpy() for part in (state.counts, state.positions))
    columns = -(-counts // group.page_tokens)
    if counts.min() < 0 or counts.max() != positions.shape[1] or columns.sum() != state.pages.shape[0]:
        raise RecordFormatError(f"heads of {counts.tolist()} tokens in {state.pages.shape[0]} pages contradict it")
    ids: GrowingArray[np.int64] = GrowingArray(1, np.int64)
    try:
        _fill_pages(group, ids, state.pages, state.frames, payload, image)
    except BaseException:
        group.store.release(ids.view.ravel())
        raise
    return HeadPages.over(group, ids.view[0], counts, positions)


def _page_width(group: LayerGroup) -> int:
    """Numbers of one page, K then V."""
    return group.page_tokens * (group.layer.key_dim + group.layer.value_dim)


def _pages_at_once(group: LayerGroup) -> int:
    """Pages that are staged together, and fit half of a bounded arena."""
    columns = group.staging_columns
    if group.store.bounded:
        columns = min(columns, group.piece_tokens() // group.page_tokens)
    return max(1, columns) * group.heads


def _page_rows(group: LayerGroup, ids: IntArray) -> Iterator[torch.Tensor]:
    """Pages as rows [n, P * (Dk + Dv)], of each K, then V, verified if they come from a file; a few at a time."""
    step = _pages_at_once(group)
    for start in range(0, ids.size, step):
        part = ids[start : start + step]
        with group.ledger.lent("staging", part.size * group.arena.frame_bytes):
            keys, values = group.store.read(part)
            yield torch.cat([keys.flatten(1), values.flatten(1)], dim=1)


def _fill_pages(
    group: LayerGroup,
    into: GrowingArray[np.int64],
    pages: Array,
    frames: Array | None,
    payload: PayloadReader,
    image: Image | None,
) -> None:
    """Add new pages [heads, n] to ``into``, with the contents of ``pages`` [n, heads, width] or [n, width].

    Where memory is not scarce all get their places at once; else those that are filled may leave for those to come.
    """
    store, total, heads = group.store, pages.shape[0], into.view.shape[0]
    step = min(max(1, _pages_at_once(group) // heads), max(1, total))
    # Staging is counted first: to make room for it, pages may be moved that have no contents yet.
    with group.ledger.lent("staging", step * heads * group.arena.frame_bytes):
        store.tick()
        lying = _placed(group, heads, total, frames, payload, image)
        if lying is None and not store.bounded and total:
            lying = next_pages(store, total, into.view)
        if lying is not None:
            into.append(lying)
        for start, rows in zip(range(0, total, step), payload.pieces(pages, step), strict=True):
            if lying is not None:
                _write(group, lying[:, start : start + rows.shape[0]], rows)
                continue
            store.tick()
            new = next_pages(store, rows.shape[0], into.view)
            into.append(new)
            _write(group, new, rows)
            store.write_behind(group.low_water())


def _placed(
    group: LayerGroup, heads: int, total: int, frames: Array | None, payload: PayloadReader, image: Image | None
) -> IntArray | None:
    """New pages where they lay when they were saved; None where that is not known."""
    if image is None or frames is None:
        return None
    require(frames, "int64", (heads, total))
    claimed = image.claim(payload.read(frames).numpy())
    return None if claimed is None else group.store.new_pages_at(claimed)


def _write(group: LayerGroup, ids: IntArray, rows: torch.Tensor) -> None:
    """Fill pages [heads, n] from rows [n, heads, width] or [n, width]."""
    layer, page = group.layer, group.page_tokens
    flat = rows.to(group.device).reshape(ids.size, -1)
    keys = flat[:, : page * layer.key_dim].unflatten(1, (page, layer.key_dim))
    values = flat[:, page * layer.key_dim :].unflatten(1, (page, layer.value_dim))
    group.arena.write(group.store.frames(ids.T.ravel()), keys, values)


def _fill_sketch(sequence: LayerSequence, state: PagedState, payload: PayloadReader) -> None:
    group, pages = sequence.group, sequence.pages.length
    if (sequence.sketch is None) != (state.sketch is None) or (pages and state.sketch == {}):
        raise RecordFormatError("sketches are there for a layer that ranks no pages, or not for one that does")
    if sequence.sketch is None or state.sketch is None or not pages:
        return
    for array in state.sketch.values():
        if array.shape[:2] != (group.heads, pages):
            raise RecordFormatError(f"sketches of {pages} pages must be [{group.heads}, {pages}, ...]")
    made = {name: payload.read(array).to(group.device) for name, array in state.sketch.items()}
    sequence.sketch.append(made, max(pages, group.expected_pages))


def _share(sequence: LayerSequence, shared: Shared, earlier: Sequence[AnySequence]) -> None:
    """Begin an empty sequence with the first pages of an earlier row."""
    source = _pages_of(earlier[shared.row]) if shared.row < len(earlier) else None
    if source is None or source.shape[1] < shared.columns:
        raise RecordFormatError(f"row {shared.row} has no {shared.columns} page columns to share")
    sequence.group.store.table.retain(source[:, : shared.columns])
    sequence.pages.append(source[:, : shared.columns])


def _shared(pages: IntArray, earlier: Sequence[AnySequence]) -> Shared | None:
    """The earlier row that has the most of the first page columns in common."""
    best: Shared | None = None
    for row, sequence in enumerate(earlier):
        held = _pages_of(sequence)
        if held is None:
            continue
        width = min(held.shape[1], pages.shape[1])
        apart = np.flatnonzero(held[0, :width] != pages[0, :width])
        columns = int(apart[0]) if apart.size else width
        if columns > (0 if best is None else best.columns):
            best = Shared(row=row, columns=columns)
    return best


def _pages_of(sequence: AnySequence) -> IntArray | None:
    """Page columns [Hk, n] that another row may share."""
    if isinstance(sequence, RaggedSequence):
        sequence = sequence.recent
    return sequence.pages.view if isinstance(sequence, LayerSequence) else None
