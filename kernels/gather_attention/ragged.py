"""Heads with different numbers of keys, as problems of equal ones: neighbours of one length are attended together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from kvtier.errors import InputError
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.kernels.gather_attention.sources import HeadSource
from kvtier.types import Partial, Visibility

__all__ = ["Piece", "over_pieces", "pieces"]

S = TypeVar("S", bound=HeadSource)


class Piece(NamedTuple):
    """Neighbouring KV heads of batch rows that have the same number of keys."""

    rows: slice
    heads: slice
    length: int

    def queries(self, group: int) -> tuple[slice, slice]:
        """Batch rows and query heads of these KV heads, ``group`` to each."""
        return self.rows, slice(self.heads.start * group, self.heads.stop * group)

    def visible(self, visible: Visibility | None) -> Visibility | None:
        """The positions of this piece alone."""
        if visible is None:
            return None
        heads = self.heads if visible.k_pos.shape[1] > 1 else slice(None)
        return visible._replace(q_pos=visible.q_pos[self.rows], k_pos=visible.k_pos[self.rows, heads, : self.length])

    def extras(self, extras: Extras, kv_heads: int) -> Extras:
        """The options of this piece alone, whose heads are no longer ragged."""
        bias, tree = extras.bias, extras.tree
        if bias is not None:
            bias = bias[*self.queries(bias.shape[1] // kv_heads), : self.length]
        if tree is not None:
            tree = tree._replace(ancestors=tree.ancestors[self.rows], first=min(tree.first, self.length))
        return extras._replace(bias=bias, tree=tree, lengths=None)


def pieces(lengths: torch.Tensor, keys: int) -> list[Piece]:
    """Cut lengths [B, Hk] of at most ``keys`` into neighbours of one length; one piece when all are equal.

    Raises
    ------
    InputError
        For a length that is negative or more than ``keys``.
    """
    table: list[list[int]] = lengths.tolist()
    found = {length for row in table for length in row}
    if found and not 0 <= min(found) <= max(found) <= keys:
        raise InputError(f"lengths must lie in [0, {keys}], got {min(found)} to {max(found)}")
    if len(found) <= 1:
        return [Piece(slice(0, len(table)), slice(0, lengths.shape[1]), max(found, default=0))]
    cut = []
    for number, row in enumerate(table):
        edges = [0, *(head for head in range(1, len(row)) if row[head] != row[head - 1]), len(row)]
        for start, stop in itertools.pairwise(edges):
            cut.append(Piece(slice(number, number + 1), slice(start, stop), row[start]))
    return cut


def over_pieces(
    q: torch.Tensor,
    source: S,
    visible: Visibility | None,
    extras: Extras,
    attend: Callable[[torch.Tensor, S, Visibility | None, Extras], Partial],
) -> Partial:
    """Attention over a source whose heads end where ``extras.lengths`` says, piece by piece."""
    if extras.lengths is None:
        return attend(q, source, visible, extras)
    group = q.shape[1] // source.kv_heads
    cut = pieces(extras.lengths, source.length)
    parts = [
        attend(
            q[piece.queries(group)],
            source.of(piece.rows, piece.heads).before(piece.length),
            piece.visible(visible),
            piece.extras(extras, source.kv_heads),
        )
        for piece in cut
    ]
    if len(parts) == 1:
        return parts[0]
    out = parts[0].out.new_empty(*q.shape[:3], parts[0].out.shape[-1])
    lse = parts[0].lse.new_empty(q.shape[:3])
    for piece, part in zip(cut, parts, strict=True):
        out[piece.queries(group)] = part.out
        lse[piece.queries(group)] = part.lse
    return Partial(out, lse)
