"""Where the pages of a layer group lay in its arena, so that a new arena can hold them in the same places.

Attention over pages in one place sums in one order. Where pages lie alike, a restored session gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvtier.core.saved.description import Array, GroupImage

if TYPE_CHECKING:
    from kvtier.core.group import LayerGroup
    from kvtier.core.policy import IntArray
    from kvtier.core.saved.payload import PayloadWriter

__all__ = ["Image", "frames_in_image", "image_of", "rebuilt"]

_MOST_SPARE = 4


def image_of(group: LayerGroup) -> GroupImage:
    """The slabs of a group."""
    bounds = [group.arena.bounds(index) for index in range(group.arena.slabs)]
    return GroupImage(
        slabs=tuple(stop - first for first, stop in bounds),
        planned_frames=group.planned_frames,
        expected_pages=group.expected_pages,
    )


def frames_in_image(group: LayerGroup, pages: IntArray, out: PayloadWriter) -> Array | None:
    """Write where pages [heads, n] lie, counted over the slabs; None where some are not on the device."""
    if not group.store.resident(pages).all():
        return None
    bounds = np.array([group.arena.bounds(index) for index in range(group.arena.slabs)], dtype=np.int64).reshape(-1, 2)
    frames, firsts = group.store.frames(pages), bounds[:, 0]
    slab = np.searchsorted(firsts, frames, side="right") - 1
    before = np.cumsum(bounds[:, 1] - firsts) - (bounds[:, 1] - firsts)
    return out.put(frames - firsts[slab] + before[slab] if frames.size else frames)


@dataclass(frozen=True, slots=True)
class Image:
    """An arena with slabs like those of a saved one.

    Parameters
    ----------
    firsts : array
        First frame of each slab, here.
    ends : array
        Frames of the slabs up to and with each.
    """

    group: LayerGroup
    firsts: IntArray
    ends: IntArray

    def claim(self, places: IntArray) -> IntArray | None:
        """Take frames by their places [heads, n] in the image; None when one is taken, or there is none any more."""
        arena = self.group.arena
        here = [arena.bounds(index)[0] for index in range(arena.slabs)]
        if not np.isin(self.firsts, here).all() or (
            places.size and not 0 <= places.min() <= places.max() < self.ends[-1]
        ):
            return None
        slab = np.searchsorted(self.ends, places, side="right")
        frames: IntArray = places - np.concatenate([[0], self.ends])[slab] + self.firsts[slab]
        return frames if arena.claim(frames) else None


def rebuilt(group: LayerGroup, image: GroupImage, pages: int) -> Image | None:
    """Grow slabs as they were, for ``pages`` pages; None where the arena decides for itself where pages lie.

    It does when the budget has no room, beside other sessions, and when the slabs were mostly empty.
    """
    frames = sum(image.slabs)
    most, room = _MOST_SPARE * (pages + group.one_run_each(group.store.usual_run)), group.ledger.page_room()
    if group.arena.slabs or not frames or max(frames, image.planned_frames) > most:
        return None
    if room is not None and frames * group.arena.frame_bytes > room:
        return None
    for slab in image.slabs:
        group.arena.grow(slab)
    group.planned_frames, group.expected_pages = image.planned_frames, image.expected_pages
    firsts = np.array([group.arena.bounds(index)[0] for index in range(len(image.slabs))], dtype=np.int64)
    return Image(group, firsts, np.cumsum(image.slabs, dtype=np.int64))
