"""Rows of pages into keys and values in C, past the caches; odd strides and other devices are for ``blocked``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.kernels.native import built, function
from kvtier.kernels.split_rows import blocked
from kvtier.kernels.split_rows.blocked import CopyHeads

__all__ = ["obstacle", "plan"]

LEAST_STREAMED: Final = 256 << 10
"""Bytes of rows from which they go past the caches: fewer are still in them when somebody reads them."""


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    return built("split_rows").obstacle if device.type == "cpu" else "is for CPUs"


def plan(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_tokens: int) -> CopyHeads:
    """How to copy heads of rows [bytes] to keys [L, Hk, C, Dk] and values [L, Hk, C, Dv]."""
    if not (rows.is_cpu and _served(keys) and _served(values)):
        return blocked.plan(rows, keys, values, page_tokens)
    _, heads, tokens, key_dim = keys.shape
    pages, size = tokens // page_tokens, keys.element_size()
    split = _function()
    shape = (heads, pages, page_tokens * key_dim * size, page_tokens * values.shape[3] * size)
    strides = [stride * size for stride in (*keys.stride()[:2], *values.stride()[:2])]
    rest = (*shape, *strides, int(rows.numel() >= LEAST_STREAMED))

    def copy(first: int, stop: int) -> None:
        split(rows.data_ptr(), keys.data_ptr(), values.data_ptr(), first, stop, *rest)

    return copy


def _served(tensor: torch.Tensor) -> bool:
    """Whether a head's tokens lie in host memory one after the other."""
    return tensor.is_cpu and tensor.stride(3) == 1 and tensor.stride(2) == tensor.shape[3]


@functools.cache
def _function() -> Callable[..., None]:
    arguments = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 10, ctypes.c_int]
    return function("split_rows", "kvtier_split_rows", arguments, None)
