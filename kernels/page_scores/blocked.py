"""Scores of pages as two matrix products: positive channels meet the upper bounds, negative ones the lower."""

from __future__ import annotations

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_queries
from kvtier.types import GroupReduce

__all__ = ["box_scores"]


def box_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """``relu(q) . high - relu(-q) . low``, which is the sum of the greater products."""
    batch, kv_heads, pages, _ = low.shape
    wide = accumulation_dtype(q, low)
    grouped = fold_queries(q, kv_heads, wide)
    group, queries = grouped.shape[1:3]
    flat = grouped.flatten(1, 2)
    upper = high.to(wide).reshape(batch * kv_heads, pages, -1).transpose(1, 2)
    lower = low.to(wide).reshape(batch * kv_heads, pages, -1).transpose(1, 2)
    scores = torch.baddbmm(torch.bmm(flat.clamp(min=0), upper), flat.clamp(max=0), lower)
    by_head = scores.view(batch, kv_heads, group, queries, pages).amax(dim=3)
    if group_reduce == "max":
        return by_head.amax(dim=2)
    return by_head.mean(dim=2) if group_reduce == "mean" else by_head.sum(dim=2)
