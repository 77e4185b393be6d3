"""Which of the columns that a batch has seen were real tokens in which row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["ColumnHistory"]

Spans: TypeAlias = tuple[tuple[int, int], ...]


class ColumnHistory:
    """Columns in the order they were appended, as stretches that agree on padding.

    A stretch is (columns, the span (start, stop) of the real tokens of each row), or (columns, None) where every column
    was a real token in every row.
    """

    def __init__(self, stretches: Sequence[tuple[int, Spans | None]] = ()) -> None:
        self._stretches = list(stretches)

    @property
    def stretches(self) -> Sequence[tuple[int, Spans | None]]:
        """All of them, in order."""
        return self._stretches

    @property
    def empty(self) -> bool:
        """Whether no column was ever noted."""
        return not self._stretches

    def note(self, columns: int, real: Spans | None = None) -> None:
        """Add columns at the end."""
        if real is None and self._stretches and self._stretches[-1][1] is None:
            columns += self._stretches.pop()[0]
        if columns:
            self._stretches.append((columns, real))

    def without(self, remove: int, rows: int) -> tuple[ColumnHistory, list[int]]:
        """The history without its last ``remove`` columns, and how many real tokens of each row those held."""
        left = ColumnHistory(self._stretches)
        counts = [0] * rows
        while remove:
            columns, real = left._stretches.pop()
            part = min(remove, columns)
            stay = columns - part
            spans = ((0, columns),) * rows if real is None else real
            taken = [max(0, stop - max(start, stay)) for start, stop in spans]
            counts = [count + own for count, own in zip(counts, taken, strict=True)]
            if stay:
                cut = None if real is None else tuple((min(start, stay), min(stop, stay)) for start, stop in real)
                left.note(stay, cut)
            remove -= part
        return left, counts

    def reordered(self, rows: Sequence[int]) -> ColumnHistory:
        """The history after row i became what row ``rows[i]`` was."""
        return ColumnHistory(
            [(columns, None if real is None else tuple(real[row] for row in rows)) for columns, real in self._stretches]
        )

    def fork(self) -> ColumnHistory:
        """A copy that goes its own way."""
        return ColumnHistory(self._stretches)
