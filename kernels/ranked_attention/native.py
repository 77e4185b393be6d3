"""Attention over the pages that rank best in C: one call, in which no thread waits for the others between the steps.

What it does not serve (several queries, other types than page_scores and gather_attention) goes to ``blocked``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import native as attention
from kvtier.kernels.native import ELEMENT_TYPES, built, function, threads_for
from kvtier.kernels.page_scores import native as scoring
from kvtier.kernels.ranked_attention import blocked
from kvtier.kernels.ranked_attention.ranked import Newest, Ranked
from kvtier.kernels.scratch import room
from kvtier.types import GroupReduce, Partial

__all__ = ["attend_ranked", "obstacle"]

_PARTS_A_THREAD: Final = 32
_REDUCTIONS: Final[dict[GroupReduce, int]] = {"mean": 0, "max": 1, "sum": 2}
_Strides: Final = ctypes.c_int64 * 16


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    return attention.obstacle(device) or built("ranked_attention").obstacle


def attend_ranked(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    count: int,
    *,
    newest: Newest | None,
    group_reduce: GroupReduce,
    scale: float,
    softcap: float | None,
) -> Ranked:
    """Equal scores: the first pages win."""
    if not _served(q, kmin, kmax, k_arena, v_arena, newest) or count >= frames.shape[2]:
        return blocked.attend_ranked(
            q, kmin, kmax, k_arena, v_arena, frames, count,
            newest=newest, group_reduce=group_reduce, scale=scale, softcap=softcap,
        )  # fmt: skip
    (batch, heads, pages, dim), (arena, slots, value_dim) = kmin.shape, v_arena.shape
    query_heads, size = q.shape[1], kmin.element_size()
    rows, all_heads = query_heads // heads, batch * heads
    threads = threads_for(all_heads * rows * (2 * pages * dim + count * slots * (dim + value_dim)))
    parts = max(1, min(pages // scoring.LEAST_SPLIT, -(-threads * _PARTS_A_THREAD // all_heads)))
    splits = attention.splits_for(count * slots, all_heads, threads)
    # Without newest keys nothing is read there, wherever it is.
    new_k, new_v = newest or (kmin, kmin)
    by_head = [stride for one in (kmin, kmax, new_k, new_v) for stride in one.stride()[:3]]
    strides = _Strides(*(stride * size for stride in (*by_head, *k_arena.stride()[:2], *v_arena.stride()[:2])))
    q, frames = q.contiguous(), frames.contiguous()
    best = frames.new_empty(batch, heads, count)
    out = q.new_empty(batch, query_heads, 1, value_dim, dtype=torch.float32)
    lse = q.new_empty(batch, query_heads, 1, dtype=torch.float32)
    places = room("ranked", all_heads * (count + 1), torch.int64)
    state = rows * (value_dim + 1 + attention.LANES)
    states = room("splits", all_heads * (pages + (splits + 1) * state), torch.float32)
    outside = _function()(
        q.data_ptr(), ELEMENT_TYPES[q.dtype], kmin.data_ptr(), kmax.data_ptr(), k_arena.data_ptr(), v_arena.data_ptr(),
        new_k.data_ptr(), new_v.data_ptr(), ELEMENT_TYPES[kmin.dtype], frames.data_ptr(), arena,
        batch, heads, rows, dim, value_dim, pages, count, slots, 0 if newest is None else new_k.shape[2],
        strides, _REDUCTIONS[group_reduce], scale, softcap or 0.0, parts, splits, threads,
        best.data_ptr(), places.data_ptr(), states.data_ptr(), out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    if outside:
        raise InputError(f"frames must lie in [0, {arena}), and some do not; a page table is stale or damaged")
    return Ranked(Partial(out, lse), best)


def _served(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    newest: Newest | None,
) -> bool:
    """Whether the C code is for these: one query, everything of one type, channels next to each other."""
    held, dim, value_dim = kmin.dtype, kmin.shape[3], v_arena.shape[2]
    rows = q.shape[1] // kmin.shape[1]
    return (
        q.shape[2] == 1
        and q.shape[0] > 0
        and 0 < rows <= attention.MOST_ROWS
        and held in ELEMENT_TYPES
        and q.dtype in ELEMENT_TYPES
        and all(one.dtype == held and one.stride(-1) == 1 for one in (kmin, kmax, k_arena, v_arena, *(newest or ())))
        and not (dim % attention.LANES or value_dim % attention.LANES)
        and max(dim, value_dim) <= attention.MOST_DIM
        and rows * dim <= scoring.MOST_FLOATS
    )


@functools.cache
def _function() -> Callable[..., int]:
    pointer, long, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    arguments = [pointer, small, *[pointer] * 6, small, pointer, *[long] * 10, pointer, small, number, number]
    arguments += [long, long, small, *[pointer] * 5]
    return function("ranked_attention", "kvtier_attend_ranked", arguments, small)
