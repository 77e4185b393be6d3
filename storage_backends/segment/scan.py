"""Segments read from end to end: which records lie there, every payload verified, whatever lies in between skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.errors import RecordFormatError
from kvtier.record import (
    BLOCK_BYTES,
    HEADER_EPOCH,
    MAX_HEADER_BYTES,
    RECORD_MAGIC,
    SUPERBLOCK_BYTES,
    Grave,
    RecordHeader,
    RecordKind,
    digest_extents,
    header_seed,
    parse_graves,
    parse_header,
    peek_header_bytes,
)
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.segment.pool import Segment

__all__ = ["ScannedRecord", "SegmentScan", "latest_life", "scan_segment"]

_WINDOW_BYTES = 16 << 20
_PIECE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class ScannedRecord:
    """A record that was found, with all its bytes right."""

    header: RecordHeader
    offset: int


@dataclass(slots=True)
class SegmentScan:
    """What a scan came across beside records.

    Attributes
    ----------
    end : int
        Where the last good record ends.
    tombstones : list of int
        Their offsets.
    torn : list of RecordHeader
        Headers whose payload is not what was written.
    last_sequence : int
        Highest sequence number that any header says.
    failed_bytes : int
        Bytes that the medium did not give.
    """

    end: int
    tombstones: list[int] = field(default_factory=list)
    graves: list[Grave] = field(default_factory=list)
    torn: list[RecordHeader] = field(default_factory=list)
    last_sequence: int = 0
    min_sequence: int = 1 << 63
    failed_bytes: int = 0


class _Window:
    """A stretch of a segment in memory, moved along it."""

    def __init__(self, engine: IOEngine, segment: Segment, advanced: Callable[[int], None]) -> None:
        self._engine = engine
        self._segment = segment
        self._advanced = advanced
        self._memory = empty_aligned(0)
        self._read_to = 0
        self.start = 0
        self.stop = 0
        self.failed_bytes = 0

    def view(self, offset: int, length: int) -> memoryview | None:
        """Bytes of the segment; None where it ends before. Valid until the next call."""
        if offset + length > self._segment.size:
            return None
        if offset < self.start or offset + length > self.stop:
            self._move(offset, length)
        at = offset - self.start
        return self._memory.numpy().data[at : at + length]

    def _move(self, offset: int, length: int) -> None:
        size = min(round_up(max(length, _WINDOW_BYTES), BLOCK_BYTES), self._segment.size - offset)
        if self._memory.numel() < size:
            self._memory = empty_aligned(size)
        pieces = [
            Transfer(self._segment.file, offset + at, self._memory[at : min(at + _PIECE_BYTES, size)])
            for at in range(0, size, _PIECE_BYTES)
        ]
        for piece, error in zip(pieces, self._engine.read(pieces), strict=True):
            if error is not None:
                self._read_by_blocks(piece)
        self.start, self.stop = offset, offset + size
        self._advanced(max(0, self.stop - max(self._read_to, offset)))
        self._read_to = max(self._read_to, self.stop)

    def _read_by_blocks(self, piece: Transfer) -> None:
        """Save what can be read around a bad place; the rest is zeros, which are no record."""
        blocks = [
            Transfer(piece.file, piece.offset + at, piece.buffer[at : at + 16 * BLOCK_BYTES])
            for at in range(0, piece.buffer.numel(), 16 * BLOCK_BYTES)
        ]
        for block, error in zip(blocks, self._engine.read(blocks), strict=True):
            if error is not None:
                torch.zeros(block.buffer.numel(), dtype=torch.uint8, out=block.buffer)
                self.failed_bytes += block.buffer.numel()


def scan_segment(
    engine: IOEngine, segment: Segment, start: int, store: bytes, advanced: Callable[[int], None]
) -> tuple[list[ScannedRecord], SegmentScan]:
    """Find every record of the segment's present life from ``start`` on.

    Parameters
    ----------
    advanced : callable
        Told the number of bytes that were read, as the scan goes on.
    """
    scan = SegmentScan(end=start)
    window = _Window(engine, segment, advanced)
    seed = header_seed(store, segment.epoch)
    records: list[ScannedRecord] = []
    for offset, header, payload in _walk(window, start, segment.size, lambda _: seed):
        if header.epoch != segment.epoch:
            continue
        scan.last_sequence = max(scan.last_sequence, header.sequence)
        if payload is None:
            scan.torn.append(header)
            continue
        scan.min_sequence = min(scan.min_sequence, header.sequence)
        if header.kind is RecordKind.TOMBSTONE:
            _take_tombstone(scan, payload, offset)
        else:
            records.append(ScannedRecord(header, offset))
        scan.end = offset + header.record_bytes
    scan.failed_bytes = window.failed_bytes
    return records, scan


def latest_life(engine: IOEngine, segment: Segment, store: bytes) -> int:
    """The greatest epoch of which a header lies in the segment, which may be in a later one; 0 where there is none."""

    def own_seed(header: memoryview) -> int:
        return header_seed(store, int.from_bytes(header[HEADER_EPOCH], "little"))

    window = _Window(engine, segment, lambda _: None)
    walk = _walk(window, SUPERBLOCK_BYTES, segment.size, own_seed)
    return max((header.epoch for _, header, _ in walk), default=0)


def _walk(
    window: _Window, start: int, size: int, seed_of: Callable[[memoryview], int]
) -> Iterator[tuple[int, RecordHeader, memoryview | None]]:
    """Headers that pass with the seed that goes with their first block, and where; without a payload that is torn."""
    offset = start
    while (offset := _next_magic(window, offset, size)) < size:
        header = _header_at(window, offset, seed_of)
        if header is None:
            offset += BLOCK_BYTES
            continue
        payload = window.view(offset + header.header_bytes, header.payload_bytes)
        whole = payload is not None and digest_extents(payload, header.extent_bytes) == header.digests
        yield offset, header, payload if whole else None
        offset += header.record_bytes if whole else BLOCK_BYTES


def _take_tombstone(scan: SegmentScan, payload: memoryview, offset: int) -> None:
    try:
        scan.graves += parse_graves(payload)
    except RecordFormatError:
        return
    scan.tombstones.append(offset)


def _next_magic(window: _Window, offset: int, size: int) -> int:
    """The next block that begins like a header, or ``size``."""
    magic = np.frombuffer(RECORD_MAGIC, dtype="<u8")[0]
    while offset + BLOCK_BYTES <= size:
        length = window.stop - offset if window.start <= offset < window.stop else BLOCK_BYTES
        view = window.view(offset, max(BLOCK_BYTES, length // BLOCK_BYTES * BLOCK_BYTES))
        if view is None:
            break
        starts = np.frombuffer(view, dtype="<u8")[:: BLOCK_BYTES // 8]
        hits = np.flatnonzero(starts == magic) if starts[0] != magic else np.zeros(1, dtype=np.int64)
        if hits.size:
            return offset + int(hits[0]) * BLOCK_BYTES
        offset += view.nbytes
    return size


def _header_at(window: _Window, offset: int, seed_of: Callable[[memoryview], int]) -> RecordHeader | None:
    first = window.view(offset, BLOCK_BYTES)
    size = peek_header_bytes(first) if first is not None else None
    whole = window.view(offset, min(size, MAX_HEADER_BYTES)) if size is not None else None
    if whole is None:
        return None
    try:
        return parse_header(whole, seed_of(whole))
    except RecordFormatError:
        return None
