"""Where a prompt ends, and the last queries of it that a selection asks about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvtier.core.selection import PromptWindow
from kvtier.errors import InputError

__all__ = ["PromptTracker"]


@dataclass(slots=True)
class PromptTracker:
    """Tells prefill from decode.

    Attributes
    ----------
    end : int, optional
        Columns at which the running or last prompt ends; None before any.
    announced : bool
        Prompts are announced; otherwise each append of several tokens is one.
    windows : dict
        Last queries of the running prompt, by layer and row.
    """

    end: int | None = None
    announced: bool = False
    windows: dict[tuple[int, int], PromptWindow] = field(default_factory=dict)

    def announce(self, end: int) -> None:
        """A prompt ends at column ``end``."""
        self.announced, self.end = True, end

    def check(self, columns: int, tokens: int) -> None:
        """Refuse ``tokens`` that would begin inside an announced prompt, after ``columns``, and end behind it.

        Raises
        ------
        InputError
        """
        if self.announced and self.end is not None and columns < self.end < columns + tokens:
            raise InputError(
                f"{self.end - columns} tokens are left of the announced prompt, got {tokens}; append what follows apart"
            )

    def appended(self, columns: int, tokens: int) -> None:
        """A layer now has ``columns``, the last ``tokens`` of them new."""
        if not self.announced and tokens > 1:
            self.end = columns

    def decoding(self, columns: int) -> bool:
        """Whether a layer with ``columns`` is past its prompt."""
        return self.end is None or columns > self.end

    def note(self, layer: int, row: int, window: PromptWindow, width: int) -> None:
        """Remember the last ``width`` queries of a running prompt."""
        held = self.windows.get((layer, row))
        self.windows[layer, row] = window if held is None else held.then(window, width)

    def take(self, layer: int, rows: int) -> list[PromptWindow | None]:
        """Hand out the windows of a layer and forget them."""
        return [self.windows.pop((layer, row), None) for row in range(rows)]

    def crop(self, columns: int) -> None:
        """Only ``columns`` are left; queries that were remembered may be gone with the others."""
        self.windows.clear()
        if self.end is not None:
            self.end = min(self.end, columns)

    def reordered(self, rows: Sequence[int]) -> PromptTracker:
        """The tracker after row i became what row ``rows[i]`` was."""
        moved = {
            (layer, new): window
            for (layer, held), window in self.windows.items()
            for new, row in enumerate(rows)
            if row == held
        }
        return replace(self, windows=moved)

    def fork(self) -> PromptTracker:
        """A copy that goes its own way."""
        return replace(self, windows=dict(self.windows))
