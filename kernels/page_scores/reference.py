"""Scores of pages by their bounds, channel by channel: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

from kvtier.types import GroupReduce

__all__ = ["box_scores"]


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Of each channel the better corner of the box, summed over the channels."""
    wide = torch.float64 if torch.float64 in (q.dtype, kmin.dtype, kmax.dtype) else torch.float32
    queries = q.to(wide).unflatten(1, (kmin.shape[1], -1)).unsqueeze(-2)
    low, high = (bound.to(wide)[:, :, None, None] for bound in (kmin, kmax))
    scores = torch.maximum(queries * low, queries * high).sum(dim=-1)
    reduced = {"mean": scores.mean(dim=2), "max": scores.amax(dim=2), "sum": scores.sum(dim=2)}[group_reduce]
    return reduced.amax(dim=2)
