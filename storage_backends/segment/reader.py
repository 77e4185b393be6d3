"""Payload ranges off the segments: whole extents, neighbours in one sweep, each extent verified where it arrives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

import numpy as np
import torch

from kvtier.errors import RecordFormatError
from kvtier.record import BLOCK_BYTES, DIGEST_BYTES, RecordHeader, digest_extents, header_seed, parse_header
from kvtier.storage_backends.engines import IOEngine, Transfer
from kvtier.storage_backends.engines.base import host_bytes
from kvtier.storage_backends.memory import empty_aligned, round_up
from kvtier.storage_backends.records import ByteRange
from kvtier.storage_backends.segment.headers import HeaderCache
from kvtier.storage_backends.segment.pool import Segment
from kvtier.storage_backends.segment.sweeps import Piece, Sweep, single, sweeps

__all__ = ["Fetch", "Found", "read_fetches", "whole"]

_PIECE_BYTES = 1 << 20
_ROUND_BYTES = 64 << 20
_STAGING_BYTES = 64 << 10

_CHUNK = 8
"""Fetches that are planned together, while those before are under way."""


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

    def take_digests(self, first: int, digests: bytes) -> None:
        """Compare digests of extents from ``first`` on with what the header says, once it is known."""
        at = first * DIGEST_BYTES
        if self.header is None:
            self.digests[first] = digests
        elif self.header.digests[at : at + len(digests)] != digests:
            self.wrong = f"extents from {first} on are not those that were written"

    def outcome(self) -> Found:
        """Whether every extent that was read is the one that was written."""
        if self.error is not None:
            return Found.FAILED
        if self.header is not None:
            for first, digests in self.digests.items():
                self.take_digests(first, digests)
        return Found.DAMAGED if self.wrong or self.header is None else Found.RIGHT


@lru_cache(maxsize=256)
def whole(size: int) -> tuple[ByteRange, ...]:
    """All of a payload as ranges; shared, since the collector of garbage counts every tuple."""
    return (ByteRange(0, size),)


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
        self._sweeps: list[Sweep] = []
        self._unknown: list[Fetch] = []
        self._blocks = torch.empty(0, dtype=torch.uint8)

    def run(self, engine: IOEngine) -> None:
        """Read and verify; where pieces failed together, each is tried by itself, so that it has its own error."""
        failed = self._read(engine, sweeps(self._pieces(), self._gap_bytes))
        if failed:
            together = [piece for sweep, _ in failed if sweep.transfer.behind for piece in sweep.pieces]
            failed = [(sweep, error) for sweep, error in failed if not sweep.transfer.behind]
            failed += self._read(engine, map(single, together))
        for sweep, error in failed:
            for piece in sweep.pieces:
                piece.fetch.error = error
        if self._unknown:
            self._headers.add((fetch.place, fetch.header) for fetch in self._unknown if fetch.header is not None)

    def _read(self, engine: IOEngine, coming: Iterable[Sweep]) -> list[tuple[Sweep, OSError]]:
        """Read and verify; those that failed, and why."""
        begun: list[Sweep] = []

        def drawn() -> Iterator[Transfer]:
            for sweep in coming:
                begun.append(sweep)
                yield sweep.transfer

        def arrived(index: int) -> None:
            for piece in begun[index].pieces:
                self._take(piece)

        results = engine.read(drawn(), then=arrived)
        return [(sweep, error) for sweep, error in zip(begun, results, strict=True) if error is not None]

    def _pieces(self) -> Iterator[Piece]:
        """What is to be read of the fetches, their headers where they are not known."""
        planned = 0
        while planned < _ROUND_BYTES and (chunk := list(itertools.islice(self._fetches, _CHUNK))):
            for fetch, header in zip(chunk, self._headers.find([fetch.place for fetch in chunk]), strict=True):
                fetch.header = header
                if header is None:
                    self._unknown.append(fetch)
                    yield Piece(fetch, fetch.offset, self._staging(fetch.header_bytes), None, ())
                if fetch.into.numel() == fetch.payload_bytes <= _PIECE_BYTES:
                    if fetch.payload_bytes:
                        yield Piece(fetch, fetch.offset + fetch.header_bytes, fetch.into, 0, ())
                else:
                    yield from _payload_pieces(fetch)
                planned += fetch.header_bytes + fetch.into.numel()

    def _staging(self, size: int) -> torch.Tensor:
        """Memory for a header; of many, since a mapping for each would cost more than its bytes."""
        if self._blocks.numel() < size:
            self._blocks = empty_aligned(max(size, _STAGING_BYTES))
        taken, self._blocks = self._blocks[:size], self._blocks[size:]
        return taken

    def _take(self, piece: Piece) -> None:
        """Take the digests of what was read, and copy what is wanted of it."""
        fetch, _, buffer, extent, copies = piece
        view = host_bytes(buffer).numpy().data
        if extent is None:
            fetch.take_header(view, self._store)
            return
        fetch.take_digests(extent, digest_extents(view, fetch.extent_bytes))
        for source, target, length in copies:
            wanted, got = fetch.into[target : target + length], buffer[source : source + length]
            if wanted.is_cuda:
                wanted.copy_(got)
            else:
                np.copyto(wanted.numpy(), got.numpy())


def _payload_pieces(fetch: Fetch) -> list[Piece]:
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


def _piece(fetch: Fetch, first: int, stop: int) -> Piece:
    start, end = first * fetch.extent_bytes, min(stop * fetch.extent_bytes, fetch.payload_bytes)
    offset = fetch.offset + fetch.header_bytes + start
    copies = _copies(fetch.ranges, start, end)
    if len(copies) == 1 and copies[0][0] == 0 and copies[0][2] == end - start:
        return Piece(fetch, offset, fetch.into[copies[0][1] : copies[0][1] + end - start], first, ())
    buffer = empty_aligned(round_up(end - start, BLOCK_BYTES))[: end - start]
    return Piece(fetch, offset, buffer, first, copies)


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
