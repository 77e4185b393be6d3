"""Which of the columns that a batch has seen were real tokens in which row."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ColumnHistory"]


class ColumnHistory:
    """Columns in the order they were appended, as stretches that agree on padding.

    A stretch is (columns, real tokens per row), or (columns, None) where every column was a real token in every row.
    """

    def __init__(self, stretches: Sequence[tuple[int, tuple[int, ...] | None]] = ()) -> None:
        self._stretches = list(stretches)

    @property
    def empty(self) -> bool:
        """Whether no column was ever noted."""
        return not self._stretches

    def note(self, columns: int, real: tuple[int, ...] | None = None) -> None:
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
            taken = (part,) * rows if real is None else tuple(min(part, own) for own in real)
            counts = [count + own for count, own in zip(counts, taken, strict=True)]
            if part < columns:
                kept = None if real is None else tuple(own - gone for own, gone in zip(real, taken, strict=True))
                left.note(columns - part, kept)
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
