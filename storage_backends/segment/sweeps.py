"""Pieces of records joined into transfers: small neighbours, and the gaps between them, in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvtier.storage_backends.engines import EngineFile, Transfer
from kvtier.storage_backends.memory import empty_aligned

if TYPE_CHECKING:
    from kvtier.storage_backends.segment.reader import Fetch

__all__ = ["SWEEP_BYTES", "Piece", "Sweep", "single", "sweeps"]

SWEEP_BYTES = 256 << 10
"""Of small neighbours; few enough that they are verified while the next ones are read."""


class Piece(NamedTuple):
    """Adjacent extents of a fetch, or its header (``extent`` None), on the way into ``buffer``.

    ``copies`` are (from, to, length): bytes of the buffer and of ``into``; empty when the buffer is a part of it.
    """

    fetch: Fetch
    offset: int
    buffer: torch.Tensor
    extent: int | None
    copies: Sequence[tuple[int, int, int]]


class Sweep(NamedTuple):
    """A transfer, and the pieces among its buffers; the others are gaps."""

    transfer: Transfer
    pieces: Sequence[Piece]


def single(piece: Piece) -> Sweep:
    """A piece by itself."""
    return Sweep(Transfer(piece.fetch.segment.file, piece.offset, piece.buffer), (piece,))


def sweeps(pieces: Iterable[Piece], gap_bytes: int) -> Iterator[Sweep]:
    """Transfers that carry every piece once, in their order; those of neighbours follow one another without a hole.

    Parameters
    ----------
    pieces : iterable of Piece
        Best in the order of the medium. Those of more than `SWEEP_BYTES`, and those on a GPU, share no transfer.
    gap_bytes : int
        Gaps up to it are read too.
    """
    last: EngineFile | None = None
    start = end = room = 0
    buffers: list[torch.Tensor] = []
    members: list[Piece] = []
    for piece in pieces:
        file, offset, buffer = piece.fetch.segment.file, piece.offset, piece.buffer
        size, gap = buffer.numel(), offset - end
        near = last is file and 0 <= gap <= gap_bytes
        if near and gap:
            if gap > room and last is not None:
                yield Sweep(Transfer(last, start, buffers[0], buffers[1:]), members)
                start, room, buffers, members = end, SWEEP_BYTES, [], []
            buffers.append(_unread(gap, gap_bytes))
            room -= gap
        if not near or size > room or buffer.is_cuda:
            if last is not None:
                yield Sweep(Transfer(last, start, buffers[0], buffers[1:]), members)
            start, room, buffers, members = offset, SWEEP_BYTES, [], []
        buffers.append(buffer)
        members.append(piece)
        room = 0 if buffer.is_cuda else room - size
        last, end = file, offset + size
    if last is not None:
        yield Sweep(Transfer(last, start, buffers[0], buffers[1:]), members)


@lru_cache(maxsize=64)
def _unread(size: int, most: int) -> torch.Tensor:
    """Room for a gap: nobody looks at what lies between pieces, so all gaps of all reads share their memory."""
    return _shared(most)[:size]


@lru_cache(maxsize=2)
def _shared(size: int) -> torch.Tensor:
    return empty_aligned(size)
