"""Where the pages of a layer group lay in its arena, so that a new arena can hold them in the same places.

Attention over pages in one place sums in one order. Where pages lie alike, a restored session gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvtier.core.saved.description import Array, GroupImage
from kvtier.errors import RecordFormatError

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
    """Write where pages [heads, n] lie, counted over the slabs; None where it is the budget that decides it."""
    if group.store.bounded:
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

    def claim(self, places: IntArray) -> IntArray:
        """Take frames by their places [heads, n] in the image; the frames.

        Raises
        ------
        RecordFormatError
            When there is no such frame, or it is taken.
        """
        if places.size and (places.min() < 0 or places.max() >= self.ends[-1]):
            raise RecordFormatError(f"pages must lie in {self.ends[-1]} frames, got frame {places.max()}")
        slab = np.searchsorted(self.ends, places, side="right")
        frames: IntArray = places - np.concatenate([[0], self.ends])[slab] + self.firsts[slab]
        if not self.group.arena.claim(frames):
            raise RecordFormatError("two pages cannot lie in one frame")
        return frames


def rebuilt(group: LayerGroup, image: GroupImage, pages: int) -> Image | None:
    """Grow slabs as they were, for ``pages`` pages; None where that makes no sense: what lies there decides then.

    It makes none under a budget, beside other sessions, and where the slabs were mostly empty.
    """
    frames = sum(image.slabs)
    most = _MOST_SPARE * (pages + group.one_run_each())
    if group.store.bounded or group.arena.slabs or not frames or max(frames, image.planned_frames) > most:
        return None
    for slab in image.slabs:
        group.arena.grow(slab)
    group.planned_frames, group.expected_pages = image.planned_frames, image.expected_pages
    firsts = np.array([group.arena.bounds(index)[0] for index in range(len(image.slabs))], dtype=np.int64)
    return Image(group, firsts, np.cumsum(image.slabs, dtype=np.int64))
