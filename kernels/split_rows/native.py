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
    _, heads, tokens, key_dim = keys.shape
    value_dim, size = values.shape[3], keys.element_size()
    key_layer, key_head, key_token, key_element = keys.stride()
    value_layer, value_head, value_token, value_element = values.stride()
    # A head's tokens must lie in host memory one after the other.
    dense = (key_token, key_element, value_token, value_element) == (key_dim, 1, value_dim, 1)
    if not (dense and rows.is_cpu and keys.is_cpu and values.is_cpu):
        return blocked.plan(rows, keys, values, page_tokens)
    split, page = _function(), page_tokens * size
    shape = heads, tokens // page_tokens, page * key_dim, page * value_dim
    strides = key_layer * size, key_head * size, value_layer * size, value_head * size
    rest = (*shape, *strides, int(rows.numel() >= LEAST_STREAMED))

    def copy(first: int, stop: int) -> None:
        split(rows.data_ptr(), keys.data_ptr(), values.data_ptr(), first, stop, *rest)

    return copy


@functools.cache
def _function() -> Callable[..., None]:
    arguments = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 10, ctypes.c_int]
    return function("split_rows", "kvtier_split_rows", arguments, None)
