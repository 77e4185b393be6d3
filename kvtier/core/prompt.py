"""Where a prompt ends, and the last queries of it that a selection asks about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from kvtier.core.attention import Queries
from kvtier.core.moments import Moments
from kvtier.core.selection import Observed, PromptWindow
from kvtier.errors import InputError

__all__ = ["PromptTracker"]

_T = TypeVar("_T")


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
    sums : dict
        Attention [Hq, T] that its tokens received from all its queries so far, by layer and row.
    moments : dict
        Mean and covariance of all its queries so far, by layer and row.
    ended : dict
        Queries of the last forward, by layer that has come to the end of the prompt and waits for the others.
    """

    end: int | None = None
    announced: bool = False
    windows: dict[tuple[int, int], PromptWindow] = field(default_factory=dict)
    sums: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    moments: dict[tuple[int, int], Moments] = field(default_factory=dict)
    ended: dict[int, Queries] = field(default_factory=dict)

    @property
    def watched(self) -> bool:
        """Whether anything of a running prompt is remembered for a policy."""
        return bool(self.windows or self.sums or self.moments or self.ended)

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

    def running(self, columns: int) -> bool:
        """Whether more of an announced prompt is to come after ``columns``."""
        return self.announced and self.end is not None and columns < self.end

    def note(self, layer: int, row: int, window: PromptWindow, width: int) -> None:
        """Remember the last ``width`` queries of a running prompt."""
        held = self.windows.get((layer, row))
        self.windows[layer, row] = window if held is None else held.then(window, width)

    def add(self, layer: int, row: int, sums: torch.Tensor) -> None:
        """Count attention [Hq, T] that the tokens so far received from the newest queries."""
        held = self.sums.get((layer, row))
        if held is not None:
            sums[:, : held.shape[1]] += held
        self.sums[layer, row] = sums

    def take(self, layer: int, rows: int) -> list[Observed | None]:
        """Hand out what was seen of the prompt in a layer, None where nothing was, and forget it."""
        places = [(layer, row) for row in range(rows)]
        seen = [
            Observed(self.windows.pop(place, None), self.sums.pop(place, None), self.moments.pop(place, None))
            for place in places
        ]
        return [one if any(part is not None for part in one) else None for one in seen]

    def crop(self, columns: int) -> None:
        """Only ``columns`` are left; queries that were remembered may be gone with the others."""
        self.windows.clear()
        self.sums.clear()
        self.moments.clear()
        if self.end is not None:
            self.end = min(self.end, columns)

    def reordered(self, rows: Sequence[int]) -> PromptTracker:
        """The tracker after row i became what row ``rows[i]`` was."""
        windows, sums, moments = (_moved(self.windows, rows), _moved(self.sums, rows), _moved(self.moments, rows))
        return replace(self, windows=windows, sums=sums, moments=moments)

    def fork(self) -> PromptTracker:
        """A copy that goes its own way."""
        windows, sums, moments = dict(self.windows), dict(self.sums), dict(self.moments)
        return replace(self, windows=windows, sums=sums, moments=moments, ended=dict(self.ended))


def _moved(held: dict[tuple[int, int], _T], rows: Sequence[int]) -> dict[tuple[int, int], _T]:
    """What belongs to the rows after row i became what row ``rows[i]`` was."""
    return {(layer, new): value for (layer, row), value in held.items() for new, old in enumerate(rows) if old == row}
