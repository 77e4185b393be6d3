"""What all layers of one step share: positions and real tokens, checked and brought to the host once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kvtier.core.checks import check_positions, spans_of
from kvtier.core.policy import IntArray

__all__ = ["Row", "Step", "joined"]


@dataclass(slots=True)
class Row:
    """The real tokens of one row.

    Parameters
    ----------
    number : int
        Which row.
    span : slice
        Which columns.
    positions : Tensor
        Their positions [1, n], where the caller has them.
    numbers : list of int
        The same on the host.
    whole : bool
        Whether the row is the only one, and every column real: tensors of the step are those of the row.
    """

    number: int
    span: slice
    positions: torch.Tensor
    numbers: list[int]
    whole: bool
    first: int = field(init=False)
    tokens: int = field(init=False)
    _host: IntArray | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.first, self.tokens = self.numbers[0], len(self.numbers)

    @property
    def host(self) -> IntArray:
        """Positions [1, n] int64 on the host; an array is made when one is asked for, which few decode steps do."""
        if self._host is None:
            self._host = np.array([self.numbers], dtype=np.int64)
        return self._host

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
        on_host: list[list[int]] = positions.tolist()
        self.rows: list[Row] = []
        for number, span in enumerate(spans_of(spans, rows, tokens)):
            if span.start < span.stop:
                source = number if len(on_host) > 1 else 0
                numbers = on_host[source][span]
                whole = rows == 1 and len(numbers) == tokens
                held = positions if whole else positions[source : source + 1, span]
                self.rows.append(Row(number, span, held, numbers, whole))


def joined(outs: Sequence[torch.Tensor], step: Step, query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """The outputs [1, Hq, n, Dv] of the rows of a step as [B, Hq, Tq, Dv] of the query's type, zeros on padding."""
    if outs and step.rows[0].whole:
        return outs[0] if outs[0].dtype == query.dtype else query.new_empty(outs[0].shape).copy_(outs[0])
    joined = query.new_zeros(*query.shape[:3], value_dim)
    for row, out in zip(step.rows, outs, strict=True):
        joined[row.number, :, row.span] = out[0]
    return joined
