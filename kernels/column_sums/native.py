"""Column sums in C: products of queries and keys stay in registers until they are weights and summed.

What it does not serve (fp16, fp64, odd head dimensions) goes to ``blocked``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.kernels.column_sums import blocked, reference
from kvtier.kernels.native import ELEMENT_TYPES, built, function, threads_for
from kvtier.kernels.scratch import scratch
from kvtier.types import Visibility

__all__ = ["column_sums", "obstacle"]

LANES: Final = 16
"""Channels that are loaded at once; head dimensions must be multiples of it."""
MOST_DIM: Final = 256
"""Channels, as in ``native.c``."""
MOST_QUERIES: Final = 1024
"""Queries that are laid out for one pass over the keys; bounds the memory for it, and more gain nothing."""
_FAR: Final = 2**31 - 1
"""Positions are compared in 32 bit."""
_TRIAL_LIMIT: Final = 1e-4


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    if device.type != "cpu":
        return "is for CPUs"
    return built("column_sums").obstacle or (None if _trusted() else "its answers to a trial are wrong")


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> torch.Tensor:
    """Sums [B, Hq, N] of ``exp(logit - lse)`` over the queries that see a key."""
    if not _served(q, k):
        return blocked.column_sums(q, lse, k, scale=scale, softcap=softcap, visible=visible)
    sums = q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    lse = lse.to(torch.float32).contiguous()
    if visible is not None:
        q_pos, k_pos = (places.to(torch.int64).contiguous() for places in visible[:2])
        visible = Visibility(q_pos, k_pos, visible.window and min(visible.window, _FAR))
    for at in range(0, q.shape[2], MOST_QUERIES):
        _add(sums, q[:, :, at : at + MOST_QUERIES], lse[:, :, at:], k, scale, softcap, visible, at)
    return sums


def _served(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the C code is for these: channels next to each other, of types that it knows."""
    dim = q.shape[3]
    return (
        bool(q.numel() and k.numel())
        and q.dtype in ELEMENT_TYPES
        and k.dtype in ELEMENT_TYPES
        and not dim % LANES
        and dim <= MOST_DIM
        and q.stride(3) == k.stride(3) == 1
    )


def _add(
    sums: torch.Tensor,
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    first: int,
) -> None:
    """Add to sums [B, Hq, N] the weights of queries that are those from ``first`` on of the positions and the lse."""
    batch, query_heads, queries, dim = q.shape
    heads, keys = k.shape[1:3]
    panel = _panel_floats()(queries, dim)
    panels = scratch("panels", (batch * query_heads * panel,), torch.float32, q.device)
    q_pos, k_pos = (None, None) if visible is None else visible[:2]
    _function()(
        q.data_ptr(), ELEMENT_TYPES[q.dtype], lse.data_ptr(), k.data_ptr(), ELEMENT_TYPES[k.dtype],
        None if q_pos is None else q_pos[:, first:].data_ptr(), None if k_pos is None else k_pos.data_ptr(),
        1 if k_pos is None else k_pos.shape[1], 0 if visible is None else visible.window or 0,
        batch, heads, query_heads // heads, queries, keys, dim,
        *(stride * tensor.element_size() for tensor in (q, k) for stride in tensor.stride()[:3]),
        lse.stride(1), 0 if q_pos is None else q_pos.stride(0), scale, softcap or 0.0,
        threads_for(batch * query_heads * queries * keys * dim), panels.data_ptr(), sums.data_ptr(),
    )  # fmt: skip


@functools.cache
def _function() -> Callable[..., None]:
    pointer, long, number, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    arguments = [pointer, short, pointer, pointer, short, pointer, pointer, *[long] * 16]
    return function("column_sums", "kvtier_column_sums", [*arguments, number, number, short, pointer, pointer], None)


@functools.cache
def _panel_floats() -> Callable[..., int]:
    return function("column_sums", "kvtier_panel_floats", [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64)


@functools.cache
def _trusted() -> bool:
    """Whether the compiled code agrees with the reference on a small problem: both types, few queries and many."""
    ramp = torch.arange(2 * 110 * 32, dtype=torch.float64, device="cpu")
    q, k = (ramp[: 4 * 40 * 32] * 0.73).cos().view(1, 4, 40, 32), (ramp * 0.37).sin().view(1, 2, 110, 32)
    return all(_agrees(q[:, :, :queries].to(dtype), k.to(dtype)) for dtype in ELEMENT_TYPES for queries in (3, 40))


def _agrees(q: torch.Tensor, k: torch.Tensor) -> bool:
    lse, places = torch.full(q.shape[:3], 3.0, device="cpu"), torch.arange(k.shape[2], device="cpu")
    visible = Visibility(places[None, 60 : 60 + q.shape[2]], places[None, None], 50)
    got = column_sums(q, lse, k, scale=0.5, softcap=None, visible=visible)
    right = reference.column_sums(q.double(), lse.double(), k.double(), scale=0.5, softcap=None, visible=visible)
    return bool(((got - right).abs() < _TRIAL_LIMIT).all())
