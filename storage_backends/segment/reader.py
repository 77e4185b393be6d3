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
from kvtier.storage_backends.engines.bounce import BouncePool
from kvtier.storage_backends.memory import PinnedRegion, empty_aligned, round_up
from kvtier.storage_backends.records import ByteRange
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.pool import Segment

__all__ = ["STAGING_BYTES", "Fetch", "Found", "read_fetches", "whole"]

_PIECE_BYTES = 1 << 20
_ROUND_BYTES = 64 << 20
_SMALL_BYTES = 128 << 10
_FIRST_SWEEP_BYTES = 256 << 10
STAGING_BYTES = 1 << 20
"""Most of one sweep of small pieces."""

_NOTHING = torch.empty(0, dtype=torch.uint8)


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
    """Adjacent extents of a fetch from ``offset`` on, or its header (``extent`` None).

    ``copies`` are (from, to, length): bytes of the piece and of ``into``.
    """

    fetch: Fetch
    offset: int
    size: int
    extent: int | None
    copies: Sequence[tuple[int, int, int]]

    @property
    def straight(self) -> bool:
        """Whether all of it goes to ``into`` as it is."""
        return len(self.copies) == 1 and self.copies[0][2] == self.size


class _Sweep:
    """Pieces that are read at once, with the small gaps between them: one alone where it goes, several by a buffer.

    A copy of a few small pieces, while they are in the cache after their digests, costs less than a transfer to as many
    places.
    """

    def __init__(self, piece: _Piece) -> None:
        self.pieces = [piece]
        self.file = piece.fetch.segment.file
        self.offset = piece.offset
        self.end = piece.offset + piece.size
        self.region: PinnedRegion | None = None
        self.buffer = _NOTHING

    def joins(self, piece: _Piece, gap_bytes: int, most: int) -> bool:
        """Add a piece if it lies next to these and all are small."""
        end = piece.offset + piece.size
        small = piece.size <= _SMALL_BYTES and self.pieces[-1].size <= _SMALL_BYTES
        if not (small and 0 <= piece.offset - self.end <= gap_bytes and end - self.offset <= most):
            return False
        if piece.fetch.segment.file is not self.file:
            return False
        self.pieces.append(piece)
        self.end = end
        return True

    def transfer(self, staging: BouncePool) -> Transfer:
        """Find memory for it."""
        first = self.pieces[0]
        size = self.end - self.offset
        if len(self.pieces) > 1:
            size = round_up(size, BLOCK_BYTES)  # what a payload leaves of its last block is padding
        if len(self.pieces) == 1 and first.straight:
            start = first.copies[0][1]
            self.buffer = first.fetch.into if first.size == first.fetch.into.numel() else first.fetch.into[start:start + size]
        elif size <= staging.size:
            self.region = staging.take()
            self.buffer = self.region.bytes[:size]
        else:
            self.buffer = empty_aligned(size)
        return Transfer(self.file, self.offset, self.buffer)

    def arrived(self, store: bytes) -> None:
        """Take the digests of what was read, and copy what is wanted of it."""
        bytes_read = host_bytes(self.buffer).numpy()
        view = bytes_read.data
        alone = len(self.pieces) == 1
        for piece in self.pieces:
            fetch, offset, size, extent, copies = piece
            at = offset - self.offset
            part = view if alone else view[at : at + size]
            if extent is None:
                fetch.take_header(part, store)
                continue
            fetch.digests[extent] = digest_extents(part, fetch.extent_bytes)
            if alone and piece.straight:
                continue
            for source, target, length in copies:
                wanted = fetch.into if length == fetch.into.numel() else fetch.into[target : target + length]
                if wanted.is_cuda:
                    wanted.copy_(self.buffer[at + source : at + source + length])
                else:
                    np.copyto(wanted.numpy(), bytes_read[at + source : at + source + length])


def read_fetches(
    engine: IOEngine, fetches: Iterable[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int, staging: BouncePool
) -> None:
    """Carry out fetches, best in the order of the medium; each says in `Fetch.outcome` what came of it.

    They are drawn while the first of them are read. ``staging`` lends memory of `STAGING_BYTES`.
    """
    coming = iter(fetches)
    for fetch in coming:
        _Round(itertools.chain((fetch,), coming), headers, store, gap_bytes, staging).run(engine)


class _Round:
    """A part of the fetches, of a size that memory may have where they do not go straight."""

    def __init__(
        self, fetches: Iterator[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int, staging: BouncePool
    ) -> None:
        self._fetches = fetches
        self._headers = headers
        self._store = store
        self._gap_bytes = gap_bytes
        self._staging = staging
        self._sweeps: list[_Sweep] = []
        self._unknown: list[Fetch] = []

    def run(self, engine: IOEngine) -> None:
        """Read and verify."""
        try:
            results = engine.read((sweep.transfer(self._staging) for sweep in self._planned()), then=self._arrived)
        finally:
            for sweep in self._sweeps:
                self._release(sweep)
        for sweep, error in zip(self._sweeps, results, strict=True):
            if error is not None:
                for piece in sweep.pieces:
                    piece.fetch.error = error
        self._headers.add((fetch.place, fetch.header) for fetch in self._unknown if fetch.header is not None)

    def _planned(self) -> Iterator[_Sweep]:
        """Pieces of the fetches, neighbours together; a few at first, so that the drive is at work early."""
        sweep: _Sweep | None = None
        planned = 0
        for fetch in self._fetches:
            most = min(STAGING_BYTES, max(_FIRST_SWEEP_BYTES, planned // 2))
            for piece in self._pieces(fetch):
                if sweep is None or not sweep.joins(piece, self._gap_bytes, most):
                    if sweep is not None:
                        yield sweep
                    sweep = _Sweep(piece)
                    self._sweeps.append(sweep)
            planned += fetch.header_bytes + fetch.into.numel()
            if planned >= _ROUND_BYTES:
                break
        if sweep is not None:
            yield sweep

    def _pieces(self, fetch: Fetch) -> Sequence[_Piece]:
        """What is to be read of a fetch, its header where it is not known."""
        (fetch.header,) = self._headers.find((fetch.place,))
        size = fetch.payload_bytes
        if fetch.ranges == whole(size) and 0 < size <= _PIECE_BYTES:
            payload = [_Piece(fetch, fetch.offset + fetch.header_bytes, size, 0, ((0, 0, size),))]
        else:
            payload = _payload_pieces(fetch)
        if fetch.header is not None:
            return payload
        self._unknown.append(fetch)
        return [_Piece(fetch, fetch.offset, fetch.header_bytes, None, ()), *payload]

    def _arrived(self, index: int) -> None:
        sweep = self._sweeps[index]
        sweep.arrived(self._store)
        self._release(sweep)

    def _release(self, sweep: _Sweep) -> None:
        region, sweep.region = sweep.region, None
        if region is not None:
            self._staging.give(region)


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
    return _Piece(fetch, offset, end - start, first, _copies(fetch.ranges, start, end))


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
