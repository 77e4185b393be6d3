"""Payload ranges off the segments: whole extents, neighbours in one sweep, each extent verified where it arrives."""

from __future__ import annotations

from collections.abc import Sequence
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
    engine: IOEngine, fetches: Sequence[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int
) -> None:
    """Carry out fetches; each says in `Fetch.outcome` what came of it."""
    round_of: list[Fetch] = []
    planned = 0
    for fetch in fetches:
        round_of.append(fetch)
        planned += fetch.header_bytes + fetch.into.numel()
        if planned >= _ROUND_BYTES:
            _read_round(engine, round_of, headers, store, gap_bytes)
            round_of, planned = [], 0
    if round_of:
        _read_round(engine, round_of, headers, store, gap_bytes)


def _read_round(engine: IOEngine, fetches: Sequence[Fetch], headers: HeaderCache, store: bytes, gap_bytes: int) -> None:
    """Read a part of the fetches, of a size that staging memory may have."""
    pieces: list[_Piece] = []
    unknown: list[Fetch] = []
    for fetch, header in zip(fetches, headers.find([fetch.place for fetch in fetches]), strict=True):
        fetch.header = header
        if header is None:
            unknown.append(fetch)
        if fetch.ranges == whole(fetch.payload_bytes) and 0 < fetch.payload_bytes <= _PIECE_BYTES:
            pieces.append(_Piece(fetch, fetch.offset + fetch.header_bytes, fetch.into, 0, ()))
        else:
            pieces += _payload_pieces(fetch)
    if unknown:
        memory, at = empty_aligned(sum(fetch.header_bytes for fetch in unknown)), 0
        for fetch in unknown:
            pieces.append(_Piece(fetch, fetch.offset, memory[at : at + fetch.header_bytes], None, ()))
            at += fetch.header_bytes
    _run(engine, pieces, store, gap_bytes)
    headers.add((fetch.place, fetch.header) for fetch in unknown if fetch.header is not None)


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


def _run(engine: IOEngine, pieces: list[_Piece], store: bytes, gap_bytes: int) -> None:
    """Read pieces in the order of the medium, small gaps between them too, so that neighbours share a system call."""
    pieces.sort(key=_position)
    transfers: list[Transfer] = []
    owners: list[_Piece | None] = []
    between: torch.Tensor | None = None
    last: EngineFile | None = None
    end = 0
    for piece in pieces:
        file, gap = piece.fetch.segment.file, piece.offset - end
        if file is last and 0 < gap <= gap_bytes:
            if between is None:
                between = empty_aligned(gap_bytes)  # nobody looks at it, so all gaps may share it
            transfers.append(Transfer(file, end, between[:gap]))
            owners.append(None)
        transfers.append(Transfer(file, piece.offset, piece.buffer))
        owners.append(piece)
        last, end = file, piece.offset + piece.buffer.numel()

    def verify(index: int) -> None:
        piece = owners[index]
        if piece is not None:
            _arrived(piece, store)

    for owner, error in zip(owners, engine.read(transfers, then=verify), strict=True):
        if owner is not None and error is not None:
            owner.fetch.error = error


def _position(piece: _Piece) -> tuple[int, int]:
    """Where on the medium a piece lies."""
    return (piece.fetch.segment.number, piece.offset)


def _arrived(piece: _Piece, store: bytes) -> None:
    """Take the digests of what was read, and copy what is wanted of it."""
    fetch, _, buffer, extent, copies = piece
    view = host_bytes(buffer).numpy().data
    if extent is None:
        fetch.take_header(view, store)
        return
    fetch.digests[extent] = digest_extents(view, fetch.extent_bytes)
    for source, target, length in copies:
        wanted, got = fetch.into[target : target + length], buffer[source : source + length]
        if wanted.is_cuda:
            wanted.copy_(got)
        else:
            np.copyto(wanted.numpy(), got.numpy())
