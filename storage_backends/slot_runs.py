"""Slots that lie next to each other, and so go through together: shared by the slot backends on files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvtier.errors import StorageError
from kvtier.storage_backends.slots import IntArray

__all__ = ["Run", "cut_runs", "transfer_error"]


class Run(NamedTuple):
    """Adjacent slots that one transfer moves."""

    first: int
    rows: IntArray  # which rows of the caller they are, in the order of the slots


def cut_runs(slots: IntArray, most: int, multiple: int | None = None) -> list[Run]:
    """Runs of adjacent slots, ascending, of at most ``most`` slots each; equal slots fall into different runs.

    No run goes over a ``multiple`` of slots, where one is given.
    """
    if not slots.size:
        return []
    order = np.argsort(slots, kind="stable")
    ascending = slots[order]
    apart = np.diff(ascending) != 1
    if multiple is not None:
        apart |= np.diff(ascending // multiple) != 0
    breaks = np.flatnonzero(apart) + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), slots.size]
    return [
        Run(int(ascending[at]), order[at : min(at + most, end)])
        for start, end in zip(starts, ends, strict=True)
        for at in range(start, end, most)
    ]


def transfer_error(verb: str, place: str, failures: Sequence[tuple[Run, OSError]]) -> StorageError:
    """Build one error for all runs that failed, naming their slots."""
    slots = sorted(slot for run, _ in failures for slot in range(run.first, run.first + run.rows.size))
    shown = ", ".join(map(str, slots[:16])) + (f" and {len(slots) - 16} more" if len(slots) > 16 else "")
    cause = failures[0][1]
    error = StorageError(f"cannot {verb} slots {shown} of {place} ({cause.strerror}); check the disk below it")
    error.__cause__ = cause
    return error
