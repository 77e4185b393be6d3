"""Where the next pages of a sequence lie: behind its last ones, else in a run with room to go on."""

from __future__ import annotations

from kvtier.core.policy import IntArray
from kvtier.core.tier import ROOM_BLOCKS, PageStore

__all__ = ["next_pages"]

_ROOM = 8  # an eighth of its pages, if that is more than ROOM_BLOCKS
_SHORT_BLOCKS = 4


def next_pages(store: PageStore, columns: int, held: IntArray, *, since: int | None = None) -> IntArray:
    """Ids [heads, columns] of new pages of the sequence that holds ``held`` [heads, n]; the caller fills them at once.

    If possible they lie right behind those, so that a sequence that grows stays one run. One that was cut down to what
    it should keep, ``since`` sealed columns ago, gets room for about as much again and no more: it may be done soon,
    and memory is what the cut was for.

    Raises
    ------
    CapacityError
        When no tier has room; nothing changed.
    """
    if since is not None and not store.bounded:
        return store.new_pages_at(_modest_run(store, columns, held, since))
    store.free_frames(held.shape[0] * columns)
    frames = _behind(store, columns, held)
    return store.new_pages_at(_roomy(store, columns, held) if frames is None else frames)


def _behind(store: PageStore, columns: int, held: IntArray) -> IntArray | None:
    if not held.size or not store.resident(held[:, -1]).all():
        return None
    return store.arena.extend(store.frames(held[:, -1]), columns)


def _roomy(store: PageStore, columns: int, held: IntArray) -> IntArray:
    """Frames [heads, columns] with room to grow where memory is not scarce."""
    least, after = ROOM_BLOCKS * store.block_pages if held.size else 0, held.shape[1] + columns
    return store.arena.allocate(held.shape[0], columns, spare=0 if store.bounded else max(least, after // _ROOM))


def _modest_run(store: PageStore, columns: int, held: IntArray, since: int) -> IntArray:
    """Frames [heads, columns] behind ``held``, else in a run with room for ``since`` columns, added for all layers.

    A short run that was outgrown moves to the new one: attention over more runs takes longer. What other sequences left
    to grow into is no place: pages there would be in no run, and every step would copy them.
    """
    behind = _behind(store, columns, held)
    if behind is not None:
        return behind
    arena, heads, moving = store.arena, held.shape[0], _short_run(store, held, since)
    wanted = moving.shape[1] + columns
    most = max(ROOM_BLOCKS * store.block_pages, (held.shape[1] + columns) // _ROOM)
    room = min(max(2 * since - wanted, store.block_pages), most)
    frames = arena.allocate_run(heads, wanted, spare=room)
    if frames is None:
        added = store.growth(heads * wanted, wanted + room)
        # Where more than that is free already, it is in pieces, and more memory would be no answer.
        if arena.free_frames <= added:
            arena.grow(added)
            frames = arena.allocate_run(heads, wanted, spare=room)
    if frames is None:
        store.free_frames(heads * columns)
        return arena.allocate(heads, columns)
    if moving.size:
        store.move(moving, frames[:, :-columns])
        store.drop_empty()
    return frames[:, -columns:]


def _short_run(store: PageStore, held: IntArray, since: int) -> IntArray:
    """Of the ``since`` newest pages ``held`` those that are one short run at the end and nobody else's; else none."""
    last, short = store.arena.places(store.frames(held))[0][-1:], min(since, _SHORT_BLOCKS * store.block_pages)
    if last and last[0].stop == held.shape[1] and last[0].stop - last[0].start <= short:
        pages = held[:, last[0].start :]
        if store.resident(pages).all() and (store.table.refs[pages] == 1).all():
            return pages
    return held[:, :0]
