"""Attention and its weights from one dense softmax: the truth for the fast path."""

from __future__ import annotations

import torch

from kvtier.types import Partial

__all__ = ["attend_weighing"]


def attend_weighing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None
) -> tuple[Partial, torch.Tensor]:
    """Weights [B, Hk, G, Tq, N] in one piece."""
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    logits = torch.einsum("bhgtd,bhnd->bhgtn", q.to(wide).unflatten(1, (k.shape[1], -1)), k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits, dim=-1)
    out = torch.einsum("bhgtn,bhnd->bhgtd", weights, v.to(wide))
    return Partial(out.flatten(1, 2), torch.logsumexp(logits, dim=-1).flatten(1, 2)), weights.sum(3).flatten(1, 2)
