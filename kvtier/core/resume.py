"""A stored prefix put back into a session: read from the store in pieces, verified, appended without attention."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    """Layers that are loaded together, and the first chunk that they need."""

    layers: list[int]
    first_chunk: int


def resume(session: Session, rows: Sequence[StoredRow], columns: int, *, coming: int) -> float | None:
    """Fill an empty session with stored tokens, padded on the left to ``columns``.

    Layers that see everything get all of a row's tokens, sliding windows only the chunks that their next query may see.
    Host memory holds 64 MiB at a time, or one layer of one row.

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
    seconds = 0.0
    for row, stored in enumerate(rows):
        if stored.source is not None:
            restoration.share(stored.source, row)
        if stored.hit is None or not stored.tokens:
            continue
        for piece in _pieces(layout, stored.tokens):
            spent = _load(restoration, layout, row, stored.hit, stored.tokens, piece)
            if spent is None:
                return None
            seconds += spent
    session.restored(columns, [slice(columns - stored.tokens, columns) for stored in rows])
    return seconds


def _pieces(layout: KVLayout, tokens: int) -> list[_Piece]:
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
                pieces.append(_Piece([], first))
                nbytes = 0
            pieces[-1].layers.append(layer)
            nbytes += size
    return pieces


def _load(restoration: Restoration, layout: KVLayout, row: int, hit: Hit, tokens: int, piece: _Piece) -> float | None:
    """Read a piece and append it; the seconds of reading, or None when not all of it is right."""
    chunk, first = layout.chunk_tokens, piece.first_chunk
    count = -(-tokens // chunk) - first
    keys, values = _empty(layout, piece.layers, count * chunk)
    into = [
        KVChunk(*([part[:, at : at + chunk] for part in parts] for parts in (keys, values)))
        for at in range(0, count * chunk, chunk)
    ]
    started = time.perf_counter()
    if len(hit.load(piece.layers, into, first_chunk=first)) < count:
        return None
    seconds = time.perf_counter() - started
    for place, layer in enumerate(piece.layers):
        if first:
            restoration.pass_over(row, layer, first * chunk)
        due = tokens - first * chunk
        restoration.append(row, layer, keys[place][:, :due], values[place][:, :due])
    return seconds


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
