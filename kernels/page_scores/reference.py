"""Scores of pages by their summaries, channel by channel: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

from kvtier.types import GroupReduce

__all__ = ["box_scores", "centroid_scores", "landmark_scores", "plane_scores"]


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Of each channel the better corner of the box, summed over the channels."""
    wide = _wide(q, kmin, kmax)
    queries = q.to(wide).unflatten(1, (kmin.shape[1], -1)).unsqueeze(-2)
    low, high = (bound.to(wide)[:, :, None, None] for bound in (kmin, kmax))
    return _reduced(torch.maximum(queries * low, queries * high).sum(dim=-1), group_reduce)


def plane_scores(
    q: torch.Tensor, planes: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Of each channel of each slot the better edge of its cell, summed over the channels; of the slots the best."""
    wide = _wide(q, kmin, kmax)
    low, high = (bound.to(wide).unsqueeze(-2).repeat_interleave(planes.shape[4], -2) for bound in (kmin, kmax))
    for plane in planes.unbind(dim=3):
        bits = torch.stack([(plane >> (7 - place)) & 1 for place in range(8)], dim=-1)
        upper = bits.flatten(-2)[..., : low.shape[-1]] == 1
        middle = (low + high) / 2
        low, high = torch.where(upper, middle, low), torch.where(upper, high, middle)
    queries = q.to(wide).unflatten(1, (kmin.shape[1], -1))[:, :, :, :, None, None]
    low, high = low[:, :, None, None], high[:, :, None, None]
    return _reduced(torch.maximum(queries * low, queries * high).sum(dim=-1).amax(dim=-1), group_reduce)


def landmark_scores(q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """One product per query head and landmark."""
    wide = _wide(q, landmarks)
    queries = q.to(wide).unflatten(1, (landmarks.shape[1], -1)).unsqueeze(-2)
    return _reduced((queries * landmarks.to(wide)[:, :, None, None]).sum(dim=-1), group_reduce)


def centroid_scores(
    q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Every slot has the score of its cluster, and every page that of its best slot."""
    scores = landmark_scores(q, centroids, group_reduce)
    pages = [[scores[b, h][slots] for h, slots in enumerate(row)] for b, row in enumerate(clusters)]
    return torch.stack([torch.stack(row) for row in pages]).amax(dim=-1)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else torch.float32


def _reduced(scores: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Scores [B, Hk, G, Tq, N] to [B, Hk, N]."""
    reduced = {"mean": scores.mean(dim=2), "max": scores.amax(dim=2), "sum": scores.sum(dim=2)}[group_reduce]
    return reduced.amax(dim=2)
