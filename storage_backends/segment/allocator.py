"""Where the next record goes: appended to the open segment; after it comes a free one, or the oldest, cleared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvtier.record import BLOCK_BYTES, SegmentKind
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.options import Geometry
from kvtier.storage_backends.segment.pool import Segment, SegmentPool

__all__ = ["SegmentAllocator"]


class SegmentAllocator:
    """Gives places to drafts, and whole segments to whoever needs one.

    Parameters
    ----------
    catalog : Catalog
    pool : SegmentPool
    geometry : Geometry
    clear : callable
        Frees the segment that is worth least; the reason when none can be freed, else nothing. Called with `turn` held.

    Attributes
    ----------
    turn : RLock
        Held by the one thread that takes, clears or gives back segments.
    degraded : str
        Why the last attempt to get a segment failed; empty when it did not.
    """

    def __init__(self, catalog: Catalog, pool: SegmentPool, geometry: Geometry, clear: Callable[[], str]) -> None:
        self._catalog = catalog
        self._pool = pool
        self._clear = clear
        self.turn = threading.RLock()
        self.degraded = ""
        self._open: Segment | None = None
        # Kept back in every segment, so that a store full to the brim still has room to write down what was deleted.
        self._tail = max(
            2 * BLOCK_BYTES, min(16 * BLOCK_BYTES, geometry.segment_bytes // 16 // BLOCK_BYTES * BLOCK_BYTES)
        )
        self.most_record_bytes = geometry.most_record_bytes - self._tail

    @property
    def open_segment(self) -> Segment | None:
        """The one that is appended to."""
        return self._open

    @property
    def room(self) -> int:
        """Bytes that the open segment still takes."""
        with self._catalog.lock:
            return 0 if self._open is None else self._open.end - self._tail - self._open.cursor

    def resume(self, segment: Segment) -> None:
        """Go on appending to a segment that was found."""
        self._open = segment

    def place(self, drafts: Sequence[Draft]) -> str:
        """Give each draft a sequence number and a place, next to each other; the reason why the last ones got none."""
        placed = 0
        while placed < len(drafts):
            with self._catalog.lock:
                placed += self._settle(drafts[placed:])
            if placed < len(drafts) and (reason := self._advance(drafts[placed].record_bytes)):
                return reason
        return ""

    def place_in_open(self, drafts: Sequence[Draft]) -> None:
        """Give places in the open segment to those that fit."""
        with self._catalog.lock:
            for draft in drafts:
                self._settle([draft])

    def place_small(self, draft: Draft) -> bool:
        """Give a tombstone a place, in the room kept back for it if need be; False when there is none."""
        with self._catalog.lock:
            size = draft.record_bytes
            segments = sorted(self._pool.segments.copy().values(), key=lambda segment: -segment.epoch)
            for segment in segments:
                takes = segment.kind is SegmentKind.CACHE and not segment.leaving
                if takes and segment.cursor + size <= segment.end:
                    self._put_into(segment, [draft])
                    return True
            return False

    def written(self, drafts: Sequence[Draft]) -> None:
        """Say that drafts are on the medium, or never will be."""
        with self._catalog.lock:
            for draft in drafts:
                if draft.segment is not None:
                    draft.segment.in_flight.discard(draft.offset)
            self._catalog.drained.notify_all()

    def take(self, kind: SegmentKind) -> Segment | str:
        """Begin a new life of a segment, clearing one if need be; the reason when none can be had. Holds `turn`."""
        reason = ""
        with self.turn:
            try:
                segment = self._pool.take(kind)
                if segment is None:
                    reason = self._clear()
                    segment = None if reason else self._pool.take(kind)
            except OSError as error:
                self.degraded = f"the medium refuses a segment: {error.strerror or error}"
                return self.degraded
            if segment is None:
                return reason or "the capacity is used up"
            self.degraded = ""
            return segment

    def give(self, segment: Segment) -> None:
        """End the life of a segment that was taken."""
        with self.turn:
            self._pool.give(segment)

    def _fits(self, size: int) -> bool:
        return self._open is not None and self._open.cursor + size <= self._open.end - self._tail

    def _settle(self, drafts: Sequence[Draft]) -> int:
        """Give places in the open segment to as many as fit one after the other; how many those are."""
        if self._open is None:
            return 0
        room = self._open.end - self._tail - self._open.cursor
        count = 0
        for draft in drafts:
            room -= draft.record_bytes
            if room < 0:
                break
            count += 1
        self._put_into(self._open, drafts[:count])
        return count

    def _put_into(self, segment: Segment, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            draft.sequence = draft.sequence or self._catalog.take_sequences(1)
            draft.segment, draft.offset = segment, segment.cursor
            segment.in_flight.add(segment.cursor)
            segment.cursor += draft.record_bytes
            segment.min_sequence = min(segment.min_sequence, draft.sequence)

    def _advance(self, size: int) -> str:
        """Open another segment, unless a thread that was faster did; the reason when none can be had."""
        with self.turn:
            if self._fits(size):
                return ""
            segment = self.take(SegmentKind.CACHE)
            if isinstance(segment, str):
                return segment
            with self._catalog.lock:
                self._open = segment
            return ""
