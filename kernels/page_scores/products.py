"""Landmarks and bit planes in C: read once where they lie, 16 bit widened and bits unpacked in registers.

What it does not serve (several queries, fp16, fp64, odd head dimensions) goes to ``blocked``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from kvtier.kernels.native import ELEMENT_TYPES, function, threads_for
from kvtier.kernels.page_scores import blocked
from kvtier.types import GroupReduce

__all__ = ["landmark_scores", "plane_scores"]

LANES: Final = 16
"""Channels that are multiplied at once; head dimensions must be multiples of it."""
MOST_FLOATS: Final = 4096
"""Queries of a KV head times channels, as in ``products.c``."""
LEAST_SPLIT: Final = 64
_REDUCTIONS: Final[dict[GroupReduce, int]] = {"mean": 0, "max": 1, "sum": 2}
_TASKS_A_THREAD: Final = 32


def landmark_scores(q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] of the landmarks [B, Hk, N, Dk]."""
    if not _served(q, landmarks):
        return blocked.landmark_scores(q, landmarks, group_reduce)
    work = _Work.of(q, landmarks, 1)
    _landmarks()(
        work.q.data_ptr(), ELEMENT_TYPES[q.dtype], landmarks.data_ptr(), ELEMENT_TYPES[landmarks.dtype], *work.sizes,
        *_strides(landmarks, 3), _REDUCTIONS[group_reduce], work.splits, work.threads, work.scores.data_ptr(),
    )  # fmt: skip
    return work.scores


def plane_scores(
    q: torch.Tensor, planes: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Scores [B, Hk, N] of the planes [B, Hk, N, b, P, Dk / 8] between the bounds [B, Hk, N, Dk]."""
    bits, slots = planes.shape[3:5]
    if not (_served(q, kmin, kmax) and planes.numel() and planes.stride(5) == 1):
        return blocked.plane_scores(q, planes, kmin, kmax, group_reduce)
    work = _Work.of(q, kmin, slots)
    _planes()(
        work.q.data_ptr(), ELEMENT_TYPES[q.dtype], kmin.data_ptr(), kmax.data_ptr(), ELEMENT_TYPES[kmin.dtype],
        planes.data_ptr(), bits, slots, *work.sizes, *_strides(kmin, 3), *_strides(kmax, 3), *_strides(planes, 5),
        _REDUCTIONS[group_reduce], work.splits, work.threads, work.scores.data_ptr(),
    )  # fmt: skip
    return work.scores


class _Work(NamedTuple):
    """Queries [B, Hq, 1, Dk], pages in ``splits``, threads for them and their scores [B, Hk, N].

    ``sizes`` are B, Hk, N, the queries of a KV head and Dk.
    """

    q: torch.Tensor
    sizes: tuple[int, ...]
    splits: int
    threads: int
    scores: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, summaries: torch.Tensor, products: int) -> _Work:
        """For so many ``products`` with each of the summaries [B, Hk, N, Dk]."""
        batch, heads, pages, dim = summaries.shape
        rows = q.shape[1] // heads
        threads = threads_for(summaries.numel() * rows * products)
        splits = max(1, min(pages // LEAST_SPLIT, -(-threads * _TASKS_A_THREAD // (batch * heads))))
        scores = q.new_empty(batch, heads, pages, dtype=torch.float32)
        return cls(q.contiguous(), (batch, heads, pages, rows, dim), splits, threads, scores)


def _served(q: torch.Tensor, *summaries: torch.Tensor) -> bool:
    """Whether the C code is for these: one query, summaries of one type, channels next to each other."""
    first, dim = summaries[0], q.shape[3]
    return (
        q.shape[2] == 1
        and first.numel() > 0
        and first.dtype in ELEMENT_TYPES
        and q.dtype in ELEMENT_TYPES
        and not dim % LANES
        and q.shape[1] // first.shape[1] * dim <= MOST_FLOATS
        and all(summary.dtype == first.dtype and summary.stride(3) == 1 for summary in summaries)
    )


def _strides(tensor: torch.Tensor, count: int) -> tuple[int, ...]:
    return tuple(stride * tensor.element_size() for stride in tensor.stride()[:count])


_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_END: Final = [_INT, _LONG, _INT, _POINTER]


@functools.cache
def _landmarks() -> Callable[..., None]:
    arguments = [_POINTER, _INT, _POINTER, _INT, *[_LONG] * 8, *_END]
    return function("page_scores", "kvtier_landmark_scores", arguments, None)


@functools.cache
def _planes() -> Callable[..., None]:
    arguments = [_POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, *[_LONG] * 17, *_END]
    return function("page_scores", "kvtier_plane_scores", arguments, None)
