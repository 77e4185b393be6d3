"""Pages into rows and back in plain torch: long runs of frames as slices, others by index."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.pack_pages.runs import Run, runs_of

__all__ = ["pack_pages", "unpack_pages"]

LEAST_RUN: Final = 4
"""Pages of an average run from which slices are quicker than an index."""


def pack_pages(k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor) -> None:
    """Fill rows [n, P * (Dk + Dv)] with frames [n]."""
    keys, values = _sides(rows, k_arena, v_arena)
    runs = _long_runs(frames, k_arena)
    if runs is None:
        index = frames.to(k_arena.device)
        keys.copy_(k_arena.index_select(0, index))
        values.copy_(v_arena.index_select(0, index))
        return
    for run in runs:
        packed, stored = slice(run.target, run.target + run.length), slice(run.source, run.source + run.length)
        keys[packed], values[packed] = k_arena[stored], v_arena[stored]


def unpack_pages(rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor) -> None:
    """Fill frames [n] with rows [n, P * (Dk + Dv)]."""
    keys, values = _sides(rows, k_arena, v_arena)
    runs = _long_runs(frames, k_arena)
    if runs is None:
        index = frames.to(k_arena.device)
        k_arena.index_copy_(0, index, keys)
        v_arena.index_copy_(0, index, values)
        return
    for run in runs:
        packed, stored = slice(run.target, run.target + run.length), slice(run.source, run.source + run.length)
        k_arena[stored], v_arena[stored] = keys[packed], values[packed]


def _sides(rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of rows: keys [n, P, Dk] and values [n, P, Dv]."""
    split = k_arena.shape[1] * k_arena.shape[2]
    return rows[:, :split].unflatten(1, k_arena.shape[1:]), rows[:, split:].unflatten(1, v_arena.shape[1:])


def _long_runs(frames: torch.Tensor, arena: torch.Tensor) -> list[Run] | None:
    """The runs of frames, or None where most are too short or a GPU knows them alone."""
    if frames.device.type != "cpu":
        return None
    runs = runs_of(frames, torch.arange(len(frames)), limits=(len(arena), len(frames)))
    return runs if len(runs) * LEAST_RUN <= len(frames) or len(runs) == 1 else None
