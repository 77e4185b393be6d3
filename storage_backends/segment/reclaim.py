"""Room for new records: the oldest segment goes, first in first out, and what was read in it gets a second chance."""

from __future__ import annotations

import numpy as np
import torch

from kvtier.errors import RecordFormatError
from kvtier.record import Grave, RecordHeader, RecordKind, SegmentKind, parse_graves
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.memory import empty_aligned
from kvtier.storage_backends.records import ByteRange
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.journal import Journal
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.reader import Fetch, Found
from kvtier.storage_backends.segment.rows import Rows, record_bytes, rows_of

__all__ = ["Reclaimer"]

failpoints.NAMES |= {
    "reclaim.before-carry",
    "reclaim.after-carry",
    "reclaim.before-drop",
    "reclaim.before-give",
    "reclaim.after-give",
}

_CARRY_BATCH_BYTES = 16 << 20
_CARRIED_PART = 8  # at most an eighth of a segment is carried on, so seven eighths are won


class Reclaimer:
    """Clears segments. Every call holds the allocator's turn.

    Parameters
    ----------
    journal : Journal
        Reads and writes the records that are carried on.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._catalog = journal.catalog
        self._pool = journal.pool

    def clear(self) -> str:
        """Free the oldest segment that may go; the reason when none may, else nothing."""
        passed: set[int] = set()
        while (victim := self._oldest(passed)) is not None:
            if self._evict(victim):
                return ""
            passed.add(victim.number)
        return "the capacity is used up, and every segment is leased or in use; release leases or raise the capacity"

    def prepare(self) -> None:
        """Clear the next segment while the open one still takes what is worth carrying on."""
        allocator = self._journal.allocator
        victim = self._oldest(set())
        open_segment = allocator.open_segment
        if victim is None or open_segment is None:
            return
        failpoints.reach("reclaim.before-carry")
        self._carry(victim, min(allocator.room, open_segment.size // _CARRIED_PART))
        failpoints.reach("reclaim.after-carry")
        self._evict(victim)

    @property
    def is_due(self) -> bool:
        """Whether `prepare` should run now."""
        allocator = self._journal.allocator
        open_segment = allocator.open_segment
        if open_segment is None or self._pool.available:
            return False
        return allocator.room < open_segment.size // _CARRIED_PART

    def _oldest(self, but: set[int]) -> Segment | None:
        """The oldest segment without leases that nobody writes to."""
        with self._catalog.lock:
            leased = self._catalog.leased_segments()
            open_segment = self._journal.allocator.open_segment
            candidates = [
                segment
                for segment in list(self._pool.segments.values())
                if segment.kind is SegmentKind.CACHE
                and segment is not open_segment
                and not segment.in_flight
                and segment.number not in leased
                and segment.number not in but
            ]
            return min(candidates, key=lambda segment: segment.epoch, default=None)

    def _evict(self, victim: Segment) -> bool:
        """Drop what is left in a segment and free it; False when that may not be."""
        catalog = self._catalog
        with catalog.lock:
            if victim.in_flight:
                return False
            victim.leaving = True
        failpoints.reach("reclaim.before-drop")
        kept = self._carry_tombstones(victim)
        with catalog.lock:
            if not kept or victim.number in catalog.leased_segments():
                victim.leaving = False
                return False
            rows = catalog.table.lying_at(victim.number)
            catalog.remove(rows, forever=False)
            catalog.counters.evicted += rows.size
            catalog.drained.wait_for(lambda: not victim.pins)
        failpoints.reach("reclaim.before-give")
        self._pool.give(victim)
        catalog.drop_segment(victim.number)  # only now: the index must know of the dead as long as they could come back
        failpoints.reach("reclaim.after-give")
        return True

    def _carry(self, victim: Segment, budget: int) -> None:
        """Copy records that were read since they were written, most read first, while they fit into ``budget``."""
        with self._catalog.lock:
            rows = self._catalog.table.lying_at(victim.number)
            at = self._catalog.table.at[rows]
            hot = rows[at["touched"] == 1]
            hot = hot[np.argsort(-self._catalog.table.at["hits"][hot].astype(np.int64), kind="stable")]
            fits = np.cumsum(record_bytes(self._catalog.table.at[hot])) <= budget
            chosen = self._catalog.rows(hot[fits])
        chosen = chosen[np.argsort(chosen["at"]["block"])]
        sizes = record_bytes(chosen["at"])
        batches = np.cumsum(sizes) // _CARRY_BATCH_BYTES
        for batch in np.unique(batches):
            self._carry_batch(chosen[batches == batch])

    def _carry_batch(self, rows: Rows) -> None:
        fetches = self._journal.fetches_of(rows, empty_aligned(int(record_bytes(rows["at"]).sum())))
        self._journal.read(fetches)
        moved: list[tuple[Draft, Rows]] = []
        for fetch, row in zip(fetches, rows, strict=True):
            if fetch.outcome() is Found.RIGHT and fetch.header is not None:
                moved.append((_copy(fetch.header, fetch.into, row), row))
        drafts = [draft for draft, _ in moved]
        self._journal.allocator.place_in_open(drafts)
        # Synced also where puts are not: the place that they leave may be the only one on the medium.
        self._journal.write(drafts, sync=True)
        arrived = []
        for draft, row in moved:
            if draft.arrived:
                new = rows_of([draft.row])
                new["at"]["hits"] = row["at"]["hits"]
                arrived.append(new)
        if arrived:
            self._catalog.move(np.concatenate(arrived))
        self._journal.allocator.written(drafts)

    def _carry_tombstones(self, victim: Segment) -> bool:
        """Write down again what was deleted, where an older record may still lie elsewhere; False when that failed."""
        graves: list[Grave] = []
        for offset in self._catalog.tombstones.get(victim.number, []):
            graves += self._graves_at(victim, offset)
        with self._catalog.lock:
            others = [
                segment.min_sequence
                for segment in list(self._pool.segments.values())
                if segment.kind is SegmentKind.CACHE and segment is not victim
            ]
        needed = [grave for grave in graves if grave.before > min(others, default=1 << 63)]
        return not needed or self._journal.write_tombstones(needed)

    def _graves_at(self, segment: Segment, offset: int) -> list[Grave]:
        header = self._journal.header_at(segment, offset)
        if header is None or header.kind is not RecordKind.TOMBSTONE:
            return []
        into = empty_aligned(header.payload_bytes)
        fetch = Fetch(
            key=header.key,
            sequence=header.sequence,
            segment=segment,
            epoch=segment.epoch,
            offset=offset,
            header_bytes=header.header_bytes,
            payload_bytes=header.payload_bytes,
            extent_bytes=header.extent_bytes,
            ranges=(ByteRange(0, header.payload_bytes),),
            into=into,
        )
        self._journal.read([fetch])
        if fetch.outcome() is not Found.RIGHT:
            return []
        try:
            return parse_graves(into.numpy().data)
        except RecordFormatError:
            return []


def _copy(header: RecordHeader, payload: torch.Tensor, row: Rows) -> Draft:
    """The same record, for another place: its sequence number stays, so that whatever killed it still does."""
    return Draft(
        key=header.key,
        namespace=header.namespace,
        tenant=header.tenant,
        meta=header.meta,
        buffers=[payload],
        extent_bytes=header.extent_bytes,
        created_us=header.created_us,
        codec=header.codec,
        sequence=header.sequence,
        tenant_number=int(row["at"]["tenant"]),
        namespace_number=int(row["at"]["namespace"]),
    )
