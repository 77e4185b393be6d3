"""The best pages in C: counts instead of a sort, and pages come out in order of place.

What it does not serve (other types than fp32, all pages or none) goes to ``blocked``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.kernels.native import built, function, threads_for
from kvtier.kernels.top_pages import blocked

__all__ = ["obstacle", "top_pages"]

_OPERATIONS: Final = 64
"""Of one score, in units of a multiplication: it is compared some 15 to 32 times."""


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    return built("top_pages").obstacle if device.type == "cpu" else "is for CPUs"


def top_pages(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Equal scores: the first pages win."""
    batch, heads, pages = scores.shape
    if scores.dtype != torch.float32 or not 0 < count < pages or not batch * heads:
        return blocked.top_pages(scores, count)
    scores = scores.contiguous()
    best = scores.new_empty(batch, heads, count, dtype=torch.int64)
    threads = threads_for(_OPERATIONS * batch * heads * pages)
    _function()(scores.data_ptr(), batch * heads, pages, count, threads, best.data_ptr())
    return best


@functools.cache
def _function() -> Callable[..., None]:
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    return function("top_pages", "kvtier_top_pages", [pointer, long, long, long, ctypes.c_int, pointer], None)
