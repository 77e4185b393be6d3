"""What a policy did to one sequence: the tokens that each layer still holds, and how often decode steps read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtier.core.attention import positions_of
from kvtier.core.ragged import UNSEEN
from kvtier.core.sequence import LayerSequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtier.core.attention import AnySequence
    from kvtier.core.batch import Batch
    from kvtier.core.policy import IntArray

__all__ = ["LayerExplanation", "ReadLog", "explain_layers"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerExplanation:
    """One layer of one sequence.

    Parameters
    ----------
    kept : tuple of array
        Runs of positions held at the end [m, 2] int64, first and one past the last, ascending; one array a KV head, or
        one for all of them.
    read : tuple of array, optional
        Runs of positions with the decode steps that read them [m, 3] int64, one array a KV head; None where every step
        reads everything that is held.
    steps : int
        Decode steps that were watched; 0 where everything is read.
    """

    kept: tuple[IntArray, ...]
    read: tuple[IntArray, ...] | None = None
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        read = None if self.read is None else [runs.tolist() for runs in self.read]
        return {"kept": [runs.tolist() for runs in self.kept], "read": read, "steps": self.steps}


@dataclass(slots=True)
class ReadLog:
    """How often decode steps read each page of a layer and row; the tail counts as pages that are always read.

    Attributes
    ----------
    counts : dict
        [Hk, pages] int64 by (layer, row).
    steps : dict
        Decode steps by (layer, row).
    """

    counts: dict[tuple[int, int], IntArray] = field(default_factory=dict)
    steps: dict[tuple[int, int], int] = field(default_factory=dict)

    def note(self, layer: int, row: int, sequence: LayerSequence, pages: int) -> None:
        """A step read ``pages`` pages of each KV head: those that were chosen, or all."""
        held, total = sequence.pages.length, -(-sequence.length // sequence.group.page_tokens)
        counts = np.zeros((sequence.group.heads, total), dtype=np.int64)
        before = self.counts.get((layer, row))
        if before is not None:
            width = min(total, before.shape[1])
            counts[:, :width] = before[:, :width]
        counts[:, held:] += 1
        if pages == held or sequence.chosen is None:
            counts[:, :held] += 1
        else:
            counts[sequence.group.head_rows, sequence.chosen[0].cpu().numpy()] += 1
        self.counts[layer, row] = counts
        self.steps[layer, row] = self.steps.get((layer, row), 0) + 1

    def reordered(self, rows: Sequence[int]) -> ReadLog:
        """The log after row i became what row ``rows[i]`` was."""
        return ReadLog(
            {(layer, new): self.counts[layer, old] for layer, new, old in _moves(self.counts, rows)},
            {(layer, new): self.steps[layer, old] for layer, new, old in _moves(self.steps, rows)},
        )

    def fork(self) -> ReadLog:
        """A copy that goes its own way."""
        return ReadLog(dict(self.counts), dict(self.steps))


def explain_layers(batch: Batch, row: int) -> tuple[LayerExplanation, ...]:
    """What each layer of a row holds, and what was read of it where that was logged."""
    return tuple(_explain(batch.reads, layer, row, held) for layer, held in enumerate(batch.rows[row]))


def _explain(log: ReadLog | None, layer: int, row: int, sequence: AnySequence) -> LayerExplanation:
    positions = positions_of(sequence)
    kept = tuple(_runs(own) for own in positions)
    counts = None if log is None else log.counts.get((layer, row))
    if log is None or counts is None or not isinstance(sequence, LayerSequence):
        return LayerExplanation(kept=kept)
    slots = np.minimum(np.arange(sequence.length) // sequence.group.page_tokens, counts.shape[1] - 1)
    every = np.broadcast_to(positions, (counts.shape[0], positions.shape[1]))
    read = tuple(_counted(own, times[slots]) for own, times in zip(every, counts, strict=True))
    return LayerExplanation(kept=kept, read=read, steps=log.steps[layer, row])


def _runs(positions: IntArray) -> IntArray:
    """Runs [m, 2] of distinct positions [n] in any order."""
    return _counted(positions, np.zeros_like(positions))[:, :2]


def _counted(positions: IntArray, times: IntArray) -> IntArray:
    """Runs [m, 3] of neighbouring positions [n] with equal counts [n]."""
    order = np.argsort(positions, kind="stable")
    order = order[positions[order] != UNSEEN]
    places, counts = positions[order], times[order]
    if not places.size:
        return np.empty((0, 3), dtype=np.int64)
    cuts = np.flatnonzero((np.diff(places) != 1) | (np.diff(counts) != 0)) + 1
    first = np.concatenate([[0], cuts])
    last = np.concatenate([cuts, [places.size]]) - 1
    return np.stack([places[first], places[last] + 1, counts[first]], axis=1)


def _moves(held: dict[tuple[int, int], Any], rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Layer, new row and old row of every entry that stays."""
    return [(layer, new, old) for layer, old in held for new, source in enumerate(rows) if source == old]
