"""Scores of pages by two matrix products with the bounds as left operand, a cache-sized block of pages at a time."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_heads, fold_queries
from kvtier.types import GroupReduce

__all__ = ["box_scores"]

CACHE_BYTES: Final = 4 * 2**20
DEVICE_BYTES: Final = 256 * 2**20


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Bounds stream from memory once; only 16-bit ones are copied, to fp32, block by block."""
    low, high = fold_heads(kmin), fold_heads(kmax)
    if low is None or high is None:
        rows = [box_scores(q[b : b + 1], kmin[b : b + 1], kmax[b : b + 1], group_reduce) for b in range(q.shape[0])]
        return torch.cat(rows)
    queries = fold_queries(q, kmin.shape[1], accumulation_dtype(q, kmin, kmax))
    heads, group, count, dim = queries.shape
    flat = queries.reshape(heads, -1, dim)
    # relu(q) . kmax - relu(-q) . kmin, and -relu(-q) = min(q, 0).
    above, below = flat.clamp_min(0).mT, flat.clamp_max(0).mT
    pages = kmin.shape[2]
    budget = CACHE_BYTES if q.device.type == "cpu" else DEVICE_BYTES
    block = max(64, budget // (heads * (dim + group * count) * queries.element_size()))
    scores = queries.new_empty(heads, pages)
    for at in range(0, pages, block):
        part = slice(at, at + block)
        bounds = torch.bmm(high[:, part].to(flat.dtype), above).baddbmm_(low[:, part].to(flat.dtype), below)
        scores[:, part] = _reduced(bounds.unflatten(2, (group, count)), group_reduce).amax(-1)
    return scores.view(*kmin.shape[:3])


def _reduced(bounds: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Bounds [H, n, G, Tq] to [H, n, Tq]."""
    if group_reduce == "max":
        return bounds.amax(2)
    return bounds.mean(2) if group_reduce == "mean" else bounds.sum(2)
