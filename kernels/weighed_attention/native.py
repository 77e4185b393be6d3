"""Attention that hands out its weights, in C; what is not for that (several queries, fp16) takes two passes."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention import native as attention
from kvtier.kernels.weighed_attention import blocked
from kvtier.types import Partial

__all__ = ["attend_weighing", "obstacle"]

obstacle = attention.obstacle


def attend_weighing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None
) -> tuple[Partial, torch.Tensor]:
    """The partial, and weights [B, Hq, N]."""
    found = attention.attend_weighing(q, k, v, scale=scale, softcap=softcap)
    return blocked.attend_weighing(q, k, v, scale=scale, softcap=softcap) if found is None else found
