"""Reading and writing records in segments: what puts, deletes, reads and reclamation have in common."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kvtier.errors import RecordFormatError
from kvtier.record import (
    BLOCK_BYTES,
    KEY_BYTES,
    Grave,
    RecordHeader,
    RecordKind,
    header_seed,
    pack_graves,
    parse_header,
    peek_header_bytes,
)
from kvtier.storage_backends import failpoints
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.segment.allocator import SegmentAllocator
from kvtier.storage_backends.segment.catalog import Catalog
from kvtier.storage_backends.segment.draft import Draft
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.options import SegmentOptions
from kvtier.storage_backends.segment.pool import Segment, SegmentPool
from kvtier.storage_backends.segment.reader import Fetch, read_fetches, whole
from kvtier.storage_backends.segment.rows import Rows
from kvtier.storage_backends.segment.writer import RecordWriter

__all__ = ["Journal"]

failpoints.NAMES |= {
    "segment.put.before-write",
    "segment.put.after-write",
    "segment.put.before-sync",
    "segment.put.after-sync",
    "tombstone.before-write",
    "tombstone.after-sync",
}

_GRAVES_OF_A_TOMBSTONE = (4 * BLOCK_BYTES) // 40


class Journal:
    """The parts of an open store that move records.

    Attributes
    ----------
    gap_bytes : int
        Gaps up to it are read through rather than jumped over.
    degraded : str
        Why the last write failed; empty when it did not.
    """

    def __init__(
        self, options: SegmentOptions, engine: IOEngine, catalog: Catalog, pool: SegmentPool,
        allocator: SegmentAllocator, gap_bytes: int,
    ) -> None:  # fmt: skip
        self.options = options
        self.engine = engine
        self.catalog = catalog
        self.pool = pool
        self.allocator = allocator
        self.gap_bytes = gap_bytes
        self.headers = HeaderCache()
        self._writer = RecordWriter(engine, pool.store)
        self.degraded = ""

    def write(self, drafts: Sequence[Draft], *, sync: bool) -> None:
        """Write drafts that have places, and wait for the medium if asked; each says whether that failed."""
        placed = [draft for draft in drafts if draft.segment is not None]
        failpoints.reach("segment.put.before-write")
        self._writer.write(placed, sealed=Draft.make_row)
        failpoints.reach("segment.put.after-write")
        if not sync:
            return
        failpoints.reach("segment.put.before-sync")
        for segment in {draft.segment for draft in placed if draft.segment is not None and draft.error is None}:
            try:
                segment.sync.wait()
            except OSError as error:
                for draft in placed:
                    if draft.segment is segment:
                        draft.error = draft.error or error
        failpoints.reach("segment.put.after-sync")

    def close(self) -> None:
        """Let go of the memory that writes are staged in; nothing is read or written any more."""
        self._writer.close()

    def read(self, fetches: Iterable[Fetch]) -> None:
        """Carry out fetches of segments that are pinned or cannot go."""
        read_fetches(self.engine, fetches, self.headers, self.pool.store, self.gap_bytes)

    def fetches_of(self, rows: Rows, memory: torch.Tensor) -> list[Fetch]:
        """Fetches of whole records `ROW` [n], one after the other into a part of ``memory``, which must suffice."""
        fetches, start = [], 0
        for key, at in zip(rows["key"], rows["at"].tolist(), strict=True):
            sequence, number, block, size, _, _, _, _, header_blocks, extent, _ = at
            segment = self.pool.segments[number]
            fetch = Fetch(
                key=key.tobytes(),
                sequence=sequence,
                segment=segment,
                epoch=segment.epoch,
                offset=block * BLOCK_BYTES,
                header_bytes=header_blocks * BLOCK_BYTES,
                payload_bytes=size,
                extent_bytes=1 << extent,
                ranges=whole(size),
                into=memory[start : start + size],
            )
            fetches.append(fetch)
            start += round_up(size, BLOCK_BYTES)
        return fetches

    def header_at(self, segment: Segment, offset: int) -> RecordHeader | None:
        """The header at a place, if one of the present life of the segment is there and the medium gives it."""
        size: int | None = BLOCK_BYTES
        for _ in range(2):
            if size is None or offset + size > segment.size:
                return None
            buffer = empty_aligned(size)
            (error,) = self.engine.read([Transfer(segment.file, offset, buffer)])
            if error is not None:
                return None
            view = buffer.numpy().data
            size = peek_header_bytes(view)
            if size is not None and size <= view.nbytes:
                try:
                    return parse_header(view, header_seed(self.pool.store, segment.epoch))
                except RecordFormatError:
                    return None
        return None

    def write_tombstones(self, graves: Sequence[Grave]) -> bool:
        """Write down deletions, durably; False when not all of them are on the medium."""
        failpoints.reach("tombstone.before-write")
        drafts = []
        for at in range(0, len(graves), _GRAVES_OF_A_TOMBSTONE):
            draft = _tombstone(graves[at : at + _GRAVES_OF_A_TOMBSTONE], self.options.extent_bytes)
            if not self.allocator.place_small(draft):
                break
            drafts.append(draft)
        self.write(drafts, sync=True)
        good = [draft for draft in drafts if draft.error is None]
        for draft in good:
            if draft.segment is not None:
                self.catalog.remember_tombstone(draft.segment.number, draft.offset)
        self.allocator.written(drafts)
        failpoints.reach("tombstone.after-sync")
        return len(good) * _GRAVES_OF_A_TOMBSTONE >= len(graves)


def _tombstone(graves: Sequence[Grave], extent_bytes: int) -> Draft:
    payload = empty_aligned(len(pack_graves(graves)))
    payload.numpy()[:] = np.frombuffer(pack_graves(graves), dtype=np.uint8)
    return Draft(
        key=bytes(KEY_BYTES),
        namespace=bytes(KEY_BYTES),
        tenant="default",
        meta=b"",
        buffers=[payload],
        extent_bytes=extent_bytes,
        created_us=time.time_ns() // 1000,
        kind=RecordKind.TOMBSTONE,
    )
