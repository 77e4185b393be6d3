"""Runs of rows that are neighbours where they come from and where they go."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvtier.errors import InputError

__all__ = ["Run", "runs_of"]


class Run(NamedTuple):
    """``length`` consecutive rows from ``source`` on that become consecutive rows from ``target`` on."""

    source: int
    target: int
    length: int


def runs_of(source_rows: torch.Tensor, target_rows: torch.Tensor, *, limits: tuple[int, int]) -> list[Run]:
    """The longest runs of rows int64 [n] on the CPU, in their order.

    Raises
    ------
    InputError
        For a row outside of ``limits``, the counts of rows that the source and the target have.
    """
    count = source_rows.numel()
    if not count:
        return []
    for rows, limit in zip((source_rows, target_rows), limits, strict=True):
        low, high = (int(bound) for bound in rows.aminmax())
        if low < 0 or high >= limit:
            raise InputError(f"frames must lie in [0, {limit}), got {low} to {high}; a page table is stale or damaged")
    parted = (source_rows.diff() != 1) | (target_rows.diff() != 1)
    starts = torch.cat([parted.new_ones(1), parted]).nonzero().flatten()
    lengths = torch.cat([starts, starts.new_tensor([count])]).diff()
    return [
        Run(source, target, length)
        for source, target, length in zip(
            source_rows[starts].tolist(), target_rows[starts].tolist(), lengths.tolist(), strict=True
        )
    ]
