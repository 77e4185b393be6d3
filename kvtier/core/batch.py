"""Rows of a batch: equal rows share their pages, until their tokens differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from kvtier.core.policy import IntArray
from kvtier.core.ring import WindowSequence
from kvtier.core.sequence import LayerSequence

__all__ = ["AnySequence", "append_rows", "distinct_rows", "fork_rows", "release_rows", "reorder_rows"]

AnySequence: TypeAlias = LayerSequence | WindowSequence
Rows: TypeAlias = list[list[AnySequence]]


def append_rows(
    rows: Rows,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: IntArray,
    spans: Sequence[slice],
) -> None:
    """Append one layer's tokens to every row; a row equal to an earlier one, before and after, becomes its fork.

    This is how beams, which start as copies of one prompt, come to store it once.
    """
    leaders: dict[object, tuple[int, AnySequence]] = {}
    for row, span in enumerate(spans):
        if span.start >= span.stop:
            continue
        sequence = rows[row][layer]
        origin = sequence.version if sequence.length else None
        leader = leaders.get(origin)
        if leader is not None and _same(keys, values, positions, (row, leader[0]), (span, spans[leader[0]])):
            sequence.release()
            rows[row][layer] = leader[1].fork()
            continue
        where = positions[row if positions.shape[0] > 1 else 0, span][None]
        sequence.append(keys[row, :, span], values[row, :, span], where)
        if len(rows) > 1:
            leaders[origin] = (row, sequence)


def distinct_rows(keys: torch.Tensor, values: torch.Tensor) -> int:
    """How many rows look distinct by their last token; for planning memory, where a wrong guess only costs growth."""
    return len({(float(keys[row, 0, -1].double().sum()), float(values[row, 0, -1].double().sum())) for row in range(keys.shape[0])})


def fork_rows(rows: Rows) -> Rows:
    """A second owner of every sequence."""
    return [[sequence.fork() for sequence in row] for row in rows]


def reorder_rows(rows: Rows, order: Sequence[int]) -> Rows:
    """Row i becomes what row ``order[i]`` was: moved the first time, forked again; rows not named are freed."""
    taken: set[int] = set()
    result: Rows = []
    for row in order:
        result.append([sequence.fork() for sequence in rows[row]] if row in taken else rows[row])
        taken.add(row)
    release_rows([sequences for row, sequences in enumerate(rows) if row not in taken])
    return result


def release_rows(rows: Rows) -> None:
    """Let go of every sequence."""
    for sequences in rows:
        for sequence in sequences:
            sequence.release()


def _same(
    keys: torch.Tensor, values: torch.Tensor, positions: IntArray, rows: tuple[int, int], spans: tuple[slice, slice]
) -> bool:
    """Whether two rows bring the same tokens."""
    (row, leader), (span, leader_span) = rows, spans
    if span != leader_span or (positions.shape[0] > 1 and not np.array_equal(positions[row], positions[leader])):
        return False
    return torch.equal(keys[row, :, span], keys[leader, :, span]) and torch.equal(
        values[row, :, span], values[leader, :, span]
    )
