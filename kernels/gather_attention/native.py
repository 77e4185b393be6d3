"""Attention of few queries in C: one pass over keys and values where they lie, 16 bit widened in registers.

What it does not serve (many queries, hidden keys, fp16, fp64, odd head dimensions) goes to ``blocked``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from kvtier.errors import InputError
from kvtier.kernels.gather_attention import blocked, reference
from kvtier.kernels.gather_attention.extras import PLAIN, Extras
from kvtier.kernels.gather_attention.table import NATIVE_ROWS
from kvtier.kernels.native import ELEMENT_TYPES, built, function, threads_for
from kvtier.kernels.scratch import room
from kvtier.kernels.spans import all_seen
from kvtier.types import Partial, Visibility

__all__ = ["MOST_DIM", "MOST_ROWS", "attend_pages", "attend_run", "attend_weighing", "obstacle", "splits_for"]

LANES: Final = 16
"""Channels that are multiplied at once; head dimensions must be multiples of it."""
MOST_ROWS: Final = NATIVE_ROWS
"""Queries of a KV head, as in ``native.c``; for more the fused kernel of torch is the quicker one."""
MOST_DIM: Final = 256
"""Channels, as in ``native.c``."""
LEAST_SPLIT: Final = 512
"""Keys below which a split costs more in the merge than it gains."""
EASY_SPLIT: Final = 1024
"""Keys below which it does where there is a task for every thread without it."""
_TASKS_A_THREAD: Final = 32
"""So many splits that a thread that was held up does not hold up the others."""

_FRAME, _LENGTH = 1, 2
"""What the C code returns for what is out of range."""
_TRIAL_LIMIT: Final = 1e-4


class _Keys(NamedTuple):
    """Keys and values of a run, or of the pages [B, Hk, N] that ``frames`` names; strides of (outer, head, slot)."""

    k: torch.Tensor
    v: torch.Tensor
    frames: torch.Tensor | None
    heads: int
    length: int
    slots: int
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    if device.type != "cpu":
        return "is for CPUs"
    return built("gather_attention").obstacle or (None if _trusted() else "its answers to a trial are wrong")


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over views k [B, Hk, N, Dk], v [B, Hk, N, Dv]."""
    if not _served(q, k, v, k.shape[1], k.shape[2], visible, extras):
        return blocked.attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible, extras=extras)
    return _attend(q, _run(k, v), extras.lengths, scale, softcap)


def attend_weighing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None
) -> tuple[Partial, torch.Tensor] | None:
    """Attention of single queries [B, Hq, 1, Dk] over views, and the weights [B, Hq, N]; None for what C is not for."""
    if q.shape[2] != 1 or not _served(q, k, v, k.shape[1], k.shape[2], None, PLAIN):
        return None
    weights = q.new_empty(*q.shape[:2], k.shape[2], dtype=torch.float32)
    return _attend(q, _run(k, v), None, scale, softcap, weights), weights


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Attention over the pages [B, Hk, N] of arenas [F, P, Dk] and [F, P, Dv]."""
    slots, heads = k_arena.shape[1], frames.shape[1]
    length = frames.shape[2] * slots
    if frames.dtype != torch.int64 or not _served(q, k_arena, v_arena, heads, length, visible, extras):
        return blocked.attend_pages(
            q, k_arena, v_arena, frames, scale=scale, softcap=softcap, visible=visible, extras=extras
        )
    k_strides = (k_arena.stride(0), 0, k_arena.stride(1))
    v_strides = (v_arena.stride(0), 0, v_arena.stride(1))
    keys = _Keys(k_arena, v_arena, frames.contiguous(), heads, length, slots, k_strides, v_strides)
    return _attend(q, keys, extras.lengths, scale, softcap)


def splits_for(keys: int, heads: int, threads: int) -> int:
    """How many parts to make of the keys of each head."""
    needed = min(keys // LEAST_SPLIT, -(-2 * threads // heads))
    return max(1, needed, min(keys // EASY_SPLIT, -(-threads * _TASKS_A_THREAD // heads)))


def _served(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    length: int,
    visible: Visibility | None,
    extras: Extras,
) -> bool:
    """Whether the C code is for these: few queries that see every key, of which heads may have different numbers."""
    q_shape, dim, value_dim = q.shape, k.shape[-1], v.shape[-1]
    return (
        0 < q_shape[1] // heads * q_shape[2] <= MOST_ROWS
        and bool(length and q_shape[0])
        and k.dtype == v.dtype
        and k.dtype in ELEMENT_TYPES
        and q.dtype in ELEMENT_TYPES
        and not (dim % LANES or value_dim % LANES)
        and max(dim, value_dim) <= MOST_DIM
        and k.stride(-1) == v.stride(-1) == 1
        and extras.only_lengths
        and (visible is None or all_seen(visible))
    )


def _run(k: torch.Tensor, v: torch.Tensor) -> _Keys:
    return _Keys(k, v, None, k.shape[1], k.shape[2], 1, k.stride()[:3], v.stride()[:3])


def _attend(
    q: torch.Tensor,
    keys: _Keys,
    lengths: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    weights: torch.Tensor | None = None,
) -> Partial:
    batch, query_heads, queries, dim = q.shape
    value_dim, size = keys.v.shape[-1], keys.k.element_size()
    rows, all_heads = query_heads // keys.heads * queries, batch * keys.heads
    threads = threads_for(all_heads * keys.length * rows * (dim + value_dim))
    splits = splits_for(keys.length, all_heads, threads)
    q, lengths = q.contiguous(), None if lengths is None else lengths.contiguous()
    out = q.new_empty(batch, query_heads, queries, value_dim, dtype=torch.float32)
    lse = q.new_empty(batch, query_heads, queries, dtype=torch.float32)
    states = room("splits", all_heads * splits * rows * (value_dim + 1 + LANES), torch.float32)
    outside = _function()(
        q.data_ptr(), ELEMENT_TYPES[q.dtype], keys.k.data_ptr(), keys.v.data_ptr(), ELEMENT_TYPES[keys.k.dtype],
        None if keys.frames is None else keys.frames.data_ptr(), None if lengths is None else lengths.data_ptr(),
        keys.k.shape[0],
        batch, keys.heads, keys.length, keys.slots, rows, dim, value_dim,
        *(stride * size for stride in (*keys.k_strides, *keys.v_strides)),
        scale, softcap or 0.0, splits, threads, states.data_ptr(), out.data_ptr(), lse.data_ptr(),
        None if weights is None else weights.data_ptr(),
    )  # fmt: skip
    if outside == _LENGTH:
        raise InputError(f"lengths must lie in [0, {keys.length}], and some do not")
    if outside == _FRAME:
        raise InputError(
            f"frames must lie in [0, {keys.k.shape[0]}), and some do not; a page table is stale or damaged"
        )
    return Partial(out, lse)


@functools.cache
def _function() -> Callable[..., int]:
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    arguments = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, pointer, pointer, *[long] * 14]
    arguments += [number, number, long, ctypes.c_int, pointer, pointer, pointer, pointer]
    return function("gather_attention", "kvtier_attend", arguments, ctypes.c_int)


@functools.cache
def _trusted() -> bool:
    """Whether the compiled code agrees with the reference on a small problem of both types."""
    ramp = torch.arange(2 * 70 * 32, dtype=torch.float64, device="cpu")
    q, k = (ramp[: 2 * 3 * 32] * 0.73).cos().view(1, 6, 1, 32), (ramp * 0.37).sin().view(1, 2, 70, 32)
    v = (ramp * 0.11).cos().view(1, 2, 70, 32)
    return all(_agrees(q.to(dtype), k.to(dtype), v.to(dtype)) for dtype in ELEMENT_TYPES)


def _agrees(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    got = attend_run(q, k, v, scale=0.5, softcap=None, visible=None)
    right = reference.attend_run(q.double(), k.double(), v.double(), scale=0.5, softcap=None, visible=None)
    return all(bool(((a - b).abs() < _TRIAL_LIMIT).all()) for a, b in zip(got, right, strict=True))
