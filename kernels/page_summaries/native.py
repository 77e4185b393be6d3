"""Bounds and means of pages in C: keys are read once where they lie, 16 bit widened in registers.

What it does not serve (fp16, fp64, odd head dimensions) goes to ``blocked``; so do bit planes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.kernels.native import ELEMENT_TYPES, built, function, threads_for
from kvtier.kernels.page_summaries import blocked, reference
from kvtier.kernels.page_summaries.blocked import page_planes

__all__ = ["obstacle", "page_bounds", "page_landmarks", "page_planes"]

LANES: Final = 16
"""Channels that are taken at once; head dimensions must be multiples of it."""
_DIMENSIONS: Final = 5
_TRIAL_LIMITS: Final = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    if device.type != "cpu":
        return "is for CPUs"
    return built("page_summaries").obstacle or (None if _trusted() else "its answers to a trial are wrong")


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest over the slots of k [..., P, D]."""
    if not _served(k):
        return blocked.page_bounds(k)
    low, high = (k.new_empty(*k.shape[:-2], k.shape[-1]) for _ in range(2))
    _bounds()(*_pages(k), low.data_ptr(), high.data_ptr())
    return low, high


def page_landmarks(k: torch.Tensor) -> torch.Tensor:
    """Means over the slots of k [..., P, D], added up in fp32 and rounded once."""
    if not _served(k):
        return blocked.page_landmarks(k)
    means = k.new_empty(*k.shape[:-2], k.shape[-1])
    _means()(*_pages(k), means.data_ptr())
    return means


def _served(k: torch.Tensor) -> bool:
    """Whether the C code is for these: channels next to each other, of a type that it knows."""
    return (
        k.dim() <= _DIMENSIONS
        and k.numel() > 0
        and k.dtype in ELEMENT_TYPES
        and not k.shape[-1] % LANES
        and k.stride(-1) == 1
    )


def _pages(k: torch.Tensor) -> tuple[int, ...]:
    """Address, type, shape, strides in bytes and threads: k as [B, Hk, N, P, D]."""
    whole = k[(None,) * (_DIMENSIONS - k.dim())]
    strides = (stride * k.element_size() for stride in whole.stride()[:4])
    return k.data_ptr(), ELEMENT_TYPES[k.dtype], *whole.shape, *strides, threads_for(k.numel())


@functools.cache
def _bounds() -> Callable[..., None]:
    return function("page_summaries", "kvtier_page_bounds", [*_ARGUMENTS, ctypes.c_void_p, ctypes.c_void_p], None)


@functools.cache
def _means() -> Callable[..., None]:
    return function("page_summaries", "kvtier_page_means", [*_ARGUMENTS, ctypes.c_void_p], None)


_ARGUMENTS: Final = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 9, ctypes.c_int]


@functools.cache
def _trusted() -> bool:
    """Whether the compiled code agrees with the reference on a small problem of both types."""
    k = (torch.arange(3 * 5 * 208, dtype=torch.float64, device="cpu") * 0.37).sin().view(3, 5, 208)
    return all(_agrees(k.to(dtype)) for dtype in ELEMENT_TYPES)


def _agrees(k: torch.Tensor) -> bool:
    exact = all(got.equal(right) for got, right in zip(page_bounds(k), reference.page_bounds(k), strict=True))
    means = (page_landmarks(k).double() - reference.page_landmarks(k.double())).abs()
    return exact and bool((means < _TRIAL_LIMITS[k.dtype]).all())
