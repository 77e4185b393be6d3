"""What all layers of one step share: positions and real tokens, checked and brought to the host once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvtier.core.checks import check_positions, spans_of
from kvtier.core.policy import IntArray

__all__ = ["Row", "Step"]


class Row(NamedTuple):
    """The real tokens of one row.

    Parameters
    ----------
    number : int
        Which row.
    span : slice
        Which columns.
    positions : Tensor
        Their positions [1, n], where the caller has them.
    host : array
        A copy of them on the host, int64.
    first, last : int
        The first of them, and the last.
    tokens : int
        How many.
    whole : bool
        Whether the row is the only one, and every column real: tensors of the step are those of the row.
    """

    number: int
    span: slice
    positions: torch.Tensor
    host: IntArray
    first: int
    last: int
    tokens: int
    whole: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The real tokens of a tensor [B, heads, T, D], as [1, heads, n, D]."""
        return tensor if self.whole else tensor[self.number : self.number + 1, :, self.span]


class Step:
    """Positions and spans as a session was given them, and the rows they name.

    Attributes
    ----------
    positions, spans : Tensor, sequence of slice
        The objects that were read: whoever brings them again need not be read again.
    shape : tuple of int
        Rows and columns.
    rows : list of Row
        Those with at least one real token.
    """

    __slots__ = ("positions", "rows", "shape", "spans")

    def __init__(self, positions: torch.Tensor, spans: Sequence[slice] | None, rows: int, tokens: int) -> None:
        check_positions(positions, rows, tokens)
        self.positions, self.spans, self.shape = positions, spans, (rows, tokens)
        real, host = spans_of(spans, rows, tokens), np.array(positions.tolist(), dtype=np.int64)
        self.rows: list[Row] = []
        for number, span in enumerate(real):
            count = span.stop - span.start
            if count:
                source = slice(number, number + 1) if positions.shape[0] > 1 else slice(0, 1)
                where, whole = host[source, span], rows == 1 and count == tokens
                held = positions if whole else positions[source, span]
                ends = int(where[0, 0]), int(where[0, -1])
                self.rows.append(Row(number, span, held, where, *ends, count, whole))
