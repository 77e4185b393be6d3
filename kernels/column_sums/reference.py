"""Attention weights of all pairs from a saved lse, summed over the queries: the truth for the fast path."""

from __future__ import annotations

import torch

from kvtier.types import Visibility

__all__ = ["column_sums"]


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> torch.Tensor:
    """Weights [B, Hk, G, Tq, N] in one piece, then a sum over Tq."""
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    logits = torch.einsum("bhgtd,bhnd->bhgtn", q.to(wide).unflatten(1, groups), k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = lse.to(wide).unflatten(1, groups).unsqueeze(-1)
    counted = ~torch.isneginf(total).expand_as(logits)
    if visible is not None:
        q_pos = visible.q_pos[:, None, None, :, None]
        k_pos = visible.k_pos[:, :, None, None, :]
        counted = counted & (k_pos <= q_pos)
        if visible.window is not None:
            counted = counted & (k_pos > q_pos - visible.window)
    weights = torch.where(counted, torch.exp(logits - total), torch.zeros_like(logits))
    return weights.sum(dim=3).flatten(1, 2)
