"""Pages of arenas into rows and back, K then V, and rows between devices: runs of neighbours travel as one copy."""

from __future__ import annotations

from typing import Final, Protocol

import torch

from kvtier.errors import InputError
from kvtier.kernels.dispatch import Candidate, Operator
from kvtier.kernels.pack_pages import blocked, reference
from kvtier.kernels.pack_pages.runs import Run, runs_of
from kvtier.kernels.tiles import triton_obstacle

__all__ = ["Run", "move_rows", "pack_pages", "runs_of", "unpack_pages"]

LEAST_RUN: Final = 8
"""Rows of an average run from which runs are copied one by one between devices; shorter ones are gathered first."""


class PackPages(Protocol):
    """What an implementation of this operator provides, on one device."""

    def pack_pages(
        self, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor, /
    ) -> None:
        """Fill rows [n, P * (Dk + Dv)] with frames [n]."""

    def unpack_pages(
        self, rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, /
    ) -> None:
        """Fill frames [n] with rows [n, P * (Dk + Dv)]."""


def _triton() -> PackPages:
    from kvtier.kernels.pack_pages import triton

    return triton


OPERATOR: Final = Operator[PackPages](
    "pack_pages",
    [
        Candidate("triton", _triton, "keys and values in one launch", triton_obstacle),
        Candidate("blocked", lambda: blocked, "runs as slices, single pages by index"),
        Candidate("reference", lambda: reference, "page by page"),
    ],
)


def pack_pages(
    k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor, *, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy pages out of arenas: each becomes a row, its K [P, Dk] and then its V [P, Dv], as records hold them.

    Any number of threads may call it at the same time, on rows of their own.

    Parameters
    ----------
    k_arena, v_arena : Tensor
        [F, P, Dk] and [F, P, Dv] of one type, each page contiguous.
    frames : Tensor
        int64 of any shape, [Hk, N] say; on the CPU or on the arenas' device.
    into : Tensor, optional
        Contiguous [*frames.shape, P * (Dk + Dv)], on the arenas' device or on the CPU, where all pages arrive in one
        copy; a new tensor on the arenas' device without it.

    Returns
    -------
    Tensor
        ``into``, filled.

    Raises
    ------
    InputError
        When shapes or types do not fit together, or a frame is not in the arena (on GPUs: in debug mode).
    """
    shape = _rows_shape(k_arena, v_arena, frames)
    if into is None:
        into = k_arena.new_empty(shape)
    _check_rows("into", into, shape, k_arena)
    if not frames.numel():
        return into
    rows = into.view(-1, shape[-1])
    near = rows if into.device == k_arena.device else torch.empty_like(rows, device=k_arena.device)
    OPERATOR.on(k_arena.device).pack_pages(k_arena, v_arena, frames.flatten(), near)
    if near is not rows:
        rows.copy_(near)
    return into


def unpack_pages(rows: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor) -> None:
    """Copy rows that `pack_pages` made into frames of arenas, wherever the rows are: all of them in one copy.

    Parameters
    ----------
    rows : Tensor
        Contiguous [*frames.shape, P * (Dk + Dv)], on the arenas' device or on the CPU.
    k_arena, v_arena, frames
        As for :func:`pack_pages`; no frame is named twice.

    Raises
    ------
    InputError
        As there.
    """
    shape = _rows_shape(k_arena, v_arena, frames)
    _check_rows("rows", rows, shape, k_arena)
    if frames.numel():
        near = rows.view(-1, shape[-1]).to(k_arena.device)
        OPERATOR.on(k_arena.device).unpack_pages(near, k_arena, v_arena, frames.flatten())


def move_rows(source: torch.Tensor, source_rows: torch.Tensor, target: torch.Tensor, target_rows: torch.Tensor) -> int:
    """Copy rows between two places, a host and a device arena of encoded blocks say; neighbours travel as one copy.

    Where neighbours are rare, rows are gathered where they are, sent in one copy, and scattered where they go.

    Parameters
    ----------
    source, target : Tensor
        [F, ...] and [E, ...], alike but for F and E, on any devices; no memory shared.
    source_rows, target_rows : Tensor
        int64 [n] on the CPU; no row of the target is named twice.

    Returns
    -------
    int
        Copies made between the two.

    Raises
    ------
    InputError
        When shapes or types differ, or a row is not there.
    """
    if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype or source_rows.shape != target_rows.shape:
        raise InputError(
            "move_rows needs rows of one shape and type, and as many of the source as of the target, got "
            f"{list(source.shape)} {source.dtype} to {list(target.shape)} {target.dtype}, "
            f"{list(source_rows.shape)} to {list(target_rows.shape)}"
        )
    runs = runs_of(source_rows, target_rows, limits=(len(source), len(target)))
    if len(runs) > 1 and len(runs) * LEAST_RUN > source_rows.numel():
        near = source.index_select(0, source_rows.to(source.device)).to(target.device)
        target.index_copy_(0, target_rows.to(target.device), near)
        return 1
    for run in runs:
        target[run.target : run.target + run.length] = source[run.source : run.source + run.length]
    return len(runs)


def _rows_shape(k_arena: torch.Tensor, v_arena: torch.Tensor, frames: torch.Tensor) -> tuple[int, ...]:
    if not (
        k_arena.dim() == v_arena.dim() == 3
        and k_arena.shape[:2] == v_arena.shape[:2]
        and k_arena.dtype == v_arena.dtype
        and k_arena.device == v_arena.device
        and all(len(arena) == 0 or arena[0].is_contiguous() for arena in (k_arena, v_arena))
        and frames.dtype == torch.int64
    ):
        raise InputError(
            "pages need arenas [F, P, Dk] and [F, P, Dv] of one type and device with contiguous pages, and int64 "
            f"frames, got {list(k_arena.shape)} {k_arena.dtype} {k_arena.device} strides {k_arena.stride()}, "
            f"{list(v_arena.shape)} {v_arena.dtype} {v_arena.device} strides {v_arena.stride()}, {frames.dtype}"
        )
    return (*frames.shape, k_arena.shape[1] * (k_arena.shape[2] + v_arena.shape[2]))


def _check_rows(name: str, rows: torch.Tensor, shape: tuple[int, ...], arena: torch.Tensor) -> None:
    if rows.shape != shape or rows.dtype != arena.dtype or not rows.is_contiguous():
        raise InputError(
            f"{name} must be contiguous {list(shape)} of {arena.dtype}, got {list(rows.shape)} of {rows.dtype} "
            f"with strides {rows.stride()}"
        )
