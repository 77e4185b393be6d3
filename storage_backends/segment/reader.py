"""Payload ranges off the segments: whole extents, neighbours in one sweep, each extent verified where it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from kvtier.errors import RecordFormatError
from kvtier.record import BLOCK_BYTES, DIGEST_BYTES, RecordHeader, digest_extents, header_seed, parse_header
from kvtier.storage_backends.engines import EngineFile, IOEngine, Transfer
from kvtier.storage_backends.engines.base import host_bytes
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.records import ByteRange
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.pool import Segment

__all__ = ["Fetch", "Found", "read_fetches", "whole"]

_PIECE_BYTES = 1 << 20
_ROUND_BYTES = 64 << 20
_STAGING_BYTES = 64 << 10


class Found(Enum):
    """How a fetch ended."""

    RIGHT = "right"
    DAMAGED = "damaged"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Fetch:
    """Ranges of one record that are wanted, and what came of it.

    Parameters
    ----------
    key, sequence, segment, offset, header_bytes, payload_bytes, extent_bytes
        The record, as the catalogue knows it.
    ranges : tuple of ByteRange
        Within the payload, ascending.
    into : Tensor
        uint8, as long as the ranges together.
    """

    key: bytes
    sequence: int
    segment: Segment
    epoch: int
    offset: int
    header_bytes: int
    payload_bytes: int
    extent_bytes: int
    ranges: tuple[ByteRange, ...]
    into: torch.Tensor
    header: RecordHeader | None = None
    digests: dict[int, bytes] = field(default_factory=dict)
    error: OSError | None = None
    wrong: str = ""

    @property
    def place(self) -> tuple[int, int, int]:
        """Key of its header in the cache."""
        return (self.segment.number, self.epoch, self.offset)

    def take_header(self, data: memoryview, store: bytes) -> None:
        """Parse the header that was read, and compare it with what the catalogue says."""
        try:
            header = parse_header(data, header_seed(store, self.epoch))
        except RecordFormatError as error:
            self.wrong = str(error)
            return
        got = (header.key, header.sequence, header.epoch, header.payload_bytes, header.extent_bytes)
        if got != (self.key, self.sequence, self.epoch, self.payload_bytes, self.extent_bytes):
            self.wrong = "the header is another record's"
            return
        self.header = header

    def outcome(self) -> Found:
        """Whether every extent that was read is the one that was written."""
        if self.error is not None:
            return Found.FAILED
        header = self.header
        if self.wrong or header is None:
            return Found.DAMAGED
        for first, digests in self.digests.items():
            at = first * DIGEST_BYTES
            if header.digests[at : at + len(digests)] != digests:
                return Found.DAMAGED
        return Found.RIGHT


@lru_cache(maxsize=256)
def whole(size: int) -> tuple[ByteRange, ...]:
    """All of a payload as ranges; shared, since the collector of garbage counts every tuple."""
    return (ByteRange(0, size),)


class _Piece(NamedTuple):
    """Adjacent extents of a fetch, or its header (``extent`` None), on the way into ``buffer``.

    ``copies`` are (from, to, length): bytes of the buffer and of ``into``; empty when the buffer is a part of it.
    """

    fetch: Fetch
    offset: int
    buffer: torch.Tensor
    extent: int | None
    copies: Sequence[tuple[int, int, int]]


def read_fetches(
    engine: IOEngine, fetches: Iterable[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int
) -> None:
    """Carry out fetches, best in the order of the medium; each says in `Fetch.outcome` what came of it.

    They are drawn while the first of them are read.
    """
    coming = iter(fetches)
    for fetch in coming:
        _Round(itertools.chain((fetch,), coming), headers, store, gap_bytes).run(engine)


class _Round:
    """A part of the fetches, of a size that staging memory may have."""

    def __init__(self, fetches: Iterator[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int) -> None:
        self._fetches = fetches
        self._headers = headers
        self._store = store
        self._gap_bytes = gap_bytes
        self._owners: list[_Piece | None] = []
        self._unknown: list[Fetch] = []
        self._between = self._last_gap = self._blocks = torch.empty(0, dtype=torch.uint8)

    def run(self, engine: IOEngine) -> None:
        """Read and verify."""
        results = engine.read(self._transfers(), then=self._arrived)
        for owner, error in zip(self._owners, results, strict=True):
            if owner is not None and error is not None:
                owner.fetch.error = error
        self._headers.add((fetch.place, fetch.header) for fetch in self._unknown if fetch.header is not None)

    def _transfers(self) -> Iterator[Transfer]:
        """Pieces of the fetches, and small gaps between them too, so that neighbours share a transfer."""
        last: EngineFile | None = None
        end = planned = 0
        for fetch in self._fetches:
            file = fetch.segment.file
            for piece in self._pieces(fetch):
                gap = piece.offset - end
                if file is last and 0 < gap <= self._gap_bytes:
                    self._owners.append(None)
                    yield Transfer(file, end, self._gap(gap))
                self._owners.append(piece)
                yield Transfer(file, piece.offset, piece.buffer)
                last, end = file, piece.offset + piece.buffer.numel()
            planned += fetch.header_bytes + fetch.into.numel()
            if planned >= _ROUND_BYTES:
                return

    def _pieces(self, fetch: Fetch) -> Sequence[_Piece]:
        """What is to be read of a fetch, its header where it is not known."""
        (fetch.header,) = self._headers.find((fetch.place,))
        if fetch.ranges == whole(fetch.payload_bytes) and 0 < fetch.payload_bytes <= _PIECE_BYTES:
            payload = [_Piece(fetch, fetch.offset + fetch.header_bytes, fetch.into, 0, ())]
        else:
            payload = _payload_pieces(fetch)
        if fetch.header is not None:
            return payload
        self._unknown.append(fetch)
        return [_Piece(fetch, fetch.offset, self._staging(fetch.header_bytes), None, ()), *payload]

    def _staging(self, size: int) -> torch.Tensor:
        """Memory for a header; of many, since a mapping for each would cost more than its bytes."""
        if self._blocks.numel() < size:
            self._blocks = empty_aligned(max(size, _STAGING_BYTES))
        taken, self._blocks = self._blocks[:size], self._blocks[size:]
        return taken

    def _gap(self, size: int) -> torch.Tensor:
        """Memory for what lies between pieces: nobody looks at it, so all gaps share it."""
        if not self._between.numel():
            self._between = empty_aligned(self._gap_bytes)
        if self._last_gap.numel() != size:
            self._last_gap = self._between[:size]
        return self._last_gap

    def _arrived(self, index: int) -> None:
        """Take the digests of what was read, and copy what is wanted of it."""
        piece = self._owners[index]
        if piece is None:
            return
        fetch, _, buffer, extent, copies = piece
        view = host_bytes(buffer).numpy().data
        if extent is None:
            fetch.take_header(view, self._store)
            return
        fetch.digests[extent] = digest_extents(view, fetch.extent_bytes)
        for source, target, length in copies:
            wanted, got = fetch.into[target : target + length], buffer[source : source + length]
            if wanted.is_cuda:
                wanted.copy_(got)
            else:
                np.copyto(wanted.numpy(), got.numpy())


def _payload_pieces(fetch: Fetch) -> list[_Piece]:
    """Cut the wanted extents into pieces: straight into ``into`` where whole extents are wanted, else by a buffer."""
    size = fetch.extent_bytes
    step = max(1, _PIECE_BYTES // size)
    return [
        _piece(fetch, extent, min(stop, extent + step))
        for first, stop in _extent_runs(fetch)
        for extent in range(first, stop, step)
    ]


def _extent_runs(fetch: Fetch) -> list[tuple[int, int]]:
    """Runs of extents (first, stop) that the ranges touch."""
    runs: list[tuple[int, int]] = []
    for offset, length in fetch.ranges:
        if not length:
            continue
        first, stop = offset // fetch.extent_bytes, -(-(offset + length) // fetch.extent_bytes)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((first, stop))
    return runs


def _piece(fetch: Fetch, first: int, stop: int) -> _Piece:
    start, end = first * fetch.extent_bytes, min(stop * fetch.extent_bytes, fetch.payload_bytes)
    offset = fetch.offset + fetch.header_bytes + start
    copies = _copies(fetch.ranges, start, end)
    if len(copies) == 1 and copies[0][0] == 0 and copies[0][2] == end - start:
        return _Piece(fetch, offset, fetch.into[copies[0][1] : copies[0][1] + end - start], first, ())
    buffer = empty_aligned(round_up(end - start, BLOCK_BYTES))[: end - start]
    return _Piece(fetch, offset, buffer, first, copies)


def _copies(ranges: Sequence[ByteRange], start: int, end: int) -> list[tuple[int, int, int]]:
    """Which bytes of the payload from ``start`` to ``end`` go where."""
    copies: list[tuple[int, int, int]] = []
    into = 0
    for offset, length in ranges:
        low, high = max(offset, start), min(offset + length, end)
        if low < high:
            copies.append((low - start, into + low - offset, high - low))
        into += length
    return copies
