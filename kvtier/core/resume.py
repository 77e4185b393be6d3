"""A stored prefix put back into a session: read from the store in pieces, verified, appended without attention."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvtier.core.chunks import KVChunk

if TYPE_CHECKING:
    from kvtier.core.hit import Hit
    from kvtier.core.restore import Restoration
    from kvtier.core.session import Session
    from kvtier.types import KVLayout

__all__ = ["StoredRow", "resume"]

_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredRow:
    """What one row of a batch takes from the store.

    Parameters
    ----------
    tokens : int
        Its first tokens, all within the hit's chunks and reaching into the last of them; 0 for none.
    hit : Hit, optional
        Where they are; None when ``source`` has them.
    source : int, optional
        An earlier row with the same tokens, whose pages it shares.
    """

    tokens: int
    hit: Hit | None = None
    source: int | None = None


class _Piece(NamedTuple):
    """Layers of a row that are loaded together, and the first chunk that they need."""

    row: int
    layers: list[int]
    first_chunk: int


class _Loaded(NamedTuple):
    """K [Hk, T, Dk] and V [Hk, T, Dv] of the layers of a piece; whether all of it is right."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    complete: bool
    seconds: float


def resume(session: Session, rows: Sequence[StoredRow], columns: int, *, coming: int) -> float | None:
    """Fill an empty session with stored tokens, padded on the left to ``columns``.

    Layers that see everything get all of a row's tokens, sliding windows only the chunks that their next query may see.
    One piece is read while the one before is appended: host memory holds two, each 64 MiB or one layer of one row.

    Parameters
    ----------
    coming : int
        Columns of the whole prompt.

    Returns
    -------
    float or None
        Seconds of reading; None when a chunk proved damaged or gone. The session can only be closed then.

    Raises
    ------
    CapacityError
        When no tier of the session has room.
    """
    layout = session.memory.layout
    restoration = session.restoring(len(rows), coming=coming)
    pieces = [
        piece
        for row, stored in enumerate(rows)
        if stored.hit is not None
        for piece in _pieces(layout, row, stored.tokens)
    ]
    seconds = 0.0
    for piece, loaded in _read_ahead(layout, rows, pieces):
        if not loaded.complete:
            return None
        _append(restoration, layout, piece, rows[piece.row].tokens, loaded)
        seconds += loaded.seconds
    for row, stored in enumerate(rows):
        if stored.source is not None:
            restoration.share(stored.source, row)
    session.restored(columns, [slice(columns - stored.tokens, columns) for stored in rows])
    return seconds


def _pieces(layout: KVLayout, row: int, tokens: int) -> list[_Piece]:
    """All layers in order, cut where the first chunk changes or the bytes are many."""
    pieces: list[_Piece] = []
    firsts = [
        0 if layer.window is None else max(0, tokens - layer.window + 1) // layout.chunk_tokens
        for layer in layout.layers
    ]
    for first, run in groupby(range(len(firsts)), key=firsts.__getitem__):
        nbytes = _PIECE_BYTES
        for layer in run:
            size = (tokens - first * layout.chunk_tokens) * layout.layers[layer].token_bytes
            if nbytes + size > _PIECE_BYTES:
                pieces.append(_Piece(row, [], first))
                nbytes = 0
            pieces[-1].layers.append(layer)
            nbytes += size
    return pieces


def _read_ahead(
    layout: KVLayout, rows: Sequence[StoredRow], pieces: Sequence[_Piece]
) -> Iterator[tuple[_Piece, _Loaded]]:
    """The pieces in order, each read while the caller works on the one before."""
    with ThreadPoolExecutor(1, thread_name_prefix="kvtier-resume") as reader:
        before: tuple[_Piece, Future[_Loaded]] | None = None
        for piece in pieces:
            reading = reader.submit(_load, layout, rows, piece)
            if before is not None:
                yield before[0], before[1].result()
            before = piece, reading
        if before is not None:
            yield before[0], before[1].result()


def _load(layout: KVLayout, rows: Sequence[StoredRow], piece: _Piece) -> _Loaded:
    """Read a piece, verified."""
    started = time.perf_counter()
    chunk, hit = layout.chunk_tokens, rows[piece.row].hit
    count = -(-rows[piece.row].tokens // chunk) - piece.first_chunk
    keys, values = _empty(layout, piece.layers, count * chunk)
    into = [
        KVChunk(*([part[:, at : at + chunk] for part in parts] for parts in (keys, values)))
        for at in range(0, count * chunk, chunk)
    ]
    loaded = [] if hit is None else hit.load(piece.layers, into, first_chunk=piece.first_chunk)
    return _Loaded(keys, values, len(loaded) == count, time.perf_counter() - started)


def _append(restoration: Restoration, layout: KVLayout, piece: _Piece, tokens: int, loaded: _Loaded) -> None:
    """Put a piece into the session."""
    before = piece.first_chunk * layout.chunk_tokens
    for layer, keys, values in zip(piece.layers, loaded.keys, loaded.values, strict=True):
        if before:
            restoration.pass_over(piece.row, layer, before)
        restoration.append(piece.row, layer, keys[:, : tokens - before], values[:, : tokens - before])


def _empty(layout: KVLayout, layers: Sequence[int], tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Room for K [Hk, T, Dk] and V [Hk, T, Dv] of these layers, on the CPU."""
    shapes = [layout.layers[layer] for layer in layers]
    keys = [
        torch.empty(shape.num_kv_heads, tokens, shape.key_dim, dtype=getattr(torch, shape.dtype)) for shape in shapes
    ]
    values = [
        torch.empty(shape.num_kv_heads, tokens, shape.value_dim, dtype=getattr(torch, shape.dtype)) for shape in shapes
    ]
    return keys, values
