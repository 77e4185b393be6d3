"""Scores of pages, channel by channel: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

from kvtier.types import GroupReduce

__all__ = ["box_scores"]


def box_scores(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Sum over channels of the greater of q * low and q * high, for every query head, query and page."""
    wide = torch.float64 if torch.float64 in (q.dtype, low.dtype) else torch.float32
    kv_heads = low.shape[1]
    grouped = q.to(wide).unflatten(1, (kv_heads, -1))[:, :, :, :, None, :]
    below, above = (bound.to(wide)[:, :, None, None] for bound in (low, high))
    bounds = torch.maximum(grouped * below, grouped * above).sum(dim=-1).amax(dim=3)
    return {"mean": bounds.mean, "max": bounds.amax, "sum": bounds.sum}[group_reduce](dim=2)
