"""Column sums of attention, dense and in one piece: the truth that the fast path is compared with."""

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
    """The matrix of probabilities [B, Hk, G, Tq, N], summed over Tq."""
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32
    kv_heads = k.shape[1]
    grouped = q.to(wide).unflatten(1, (kv_heads, q.shape[1] // kv_heads))
    logits = torch.einsum("bhgtd,bhnd->bhgtn", grouped, k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = lse.to(wide).unflatten(1, (kv_heads, q.shape[1] // kv_heads)).unsqueeze(-1)
    weights = torch.where(torch.isneginf(total), torch.zeros_like(logits), torch.exp(logits - total))
    if visible is not None:
        q_pos = visible.q_pos[:, None, None, :, None]
        k_pos = visible.k_pos[:, :, None, None, :]
        seen = k_pos <= q_pos
        if visible.window is not None:
            seen = seen & (k_pos > q_pos - visible.window)
        weights = torch.where(seen, weights, torch.zeros_like(weights))
    return weights.sum(dim=-2).flatten(1, 2)
