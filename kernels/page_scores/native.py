"""Box bounds in C: kmin and kmax are read once where they lie, 16 bit widened in registers.

What it does not serve (several queries, fp16, fp64, odd head dimensions) goes to ``blocked``. Landmarks and bit planes
are in ``products.py``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Final

import torch

from kvtier.kernels.native import ELEMENT_TYPES, built, function, threads_for
from kvtier.kernels.page_scores import blocked
from kvtier.kernels.page_scores.blocked import best_of_clusters
from kvtier.kernels.page_scores.products import landmark_scores, plane_scores
from kvtier.types import GroupReduce

__all__ = ["box_scores", "centroid_scores", "landmark_scores", "obstacle", "plane_scores"]

LANES: Final = 16
"""Channels that are multiplied at once; head dimensions must be multiples of it."""
MOST_FLOATS: Final = 4096
"""Queries of a KV head times channels, as in ``native.c``."""
_REDUCTIONS: Final[dict[GroupReduce, int]] = {"mean": 0, "max": 1, "sum": 2}
LEAST_SPLIT: Final = 256
_TASKS_A_THREAD: Final = 32


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run on a device; None when it can."""
    return built("page_scores").obstacle if device.type == "cpu" else "is for CPUs"


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, N] of the bounds [B, Hk, N, Dk]."""
    if not _served(q, kmin, kmax):
        return blocked.box_scores(q, kmin, kmax, group_reduce)
    batch, heads, pages, dim = kmin.shape
    rows, all_heads, size = q.shape[1] // heads, batch * heads, kmin.element_size()
    threads = threads_for(2 * all_heads * pages * rows * dim)
    splits = max(1, min(pages // LEAST_SPLIT, -(-threads * _TASKS_A_THREAD // all_heads)))
    q = q.contiguous()
    scores = q.new_empty(batch, heads, pages, dtype=torch.float32)
    _function()(
        q.data_ptr(), ELEMENT_TYPES[q.dtype], kmin.data_ptr(), kmax.data_ptr(), ELEMENT_TYPES[kmin.dtype],
        batch, heads, pages, rows, dim,
        *(stride * size for stride in (*kmin.stride()[:3], *kmax.stride()[:3])),
        _REDUCTIONS[group_reduce], splits, threads, scores.data_ptr(),
    )  # fmt: skip
    return scores


def centroid_scores(
    q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Scores [B, Hk, N] of the best of the centroids [B, Hk, C, Dk] that a slot of a page belongs to."""
    return best_of_clusters(landmark_scores(q, centroids, group_reduce), clusters)


def _served(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor) -> bool:
    """Whether the C code is for these: one query, bounds of one type, channels next to each other."""
    dim = kmin.shape[3]
    return (
        q.shape[2] == 1
        and kmin.numel() > 0
        and kmin.dtype == kmax.dtype
        and kmin.dtype in ELEMENT_TYPES
        and q.dtype in ELEMENT_TYPES
        and not dim % LANES
        and q.shape[1] // kmin.shape[1] * dim <= MOST_FLOATS
        and kmin.stride(3) == kmax.stride(3) == 1
    )


@functools.cache
def _function() -> Callable[..., None]:
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    arguments = [pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, *[long] * 11]
    arguments += [ctypes.c_int, long, ctypes.c_int, pointer]
    return function("page_scores", "kvtier_box_scores", arguments, None)
