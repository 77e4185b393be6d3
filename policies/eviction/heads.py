"""One budget for all KV heads of a layer: the best of all of them stay, and each keeps a least number of its own."""

from __future__ import annotations

import torch

from kvtier.core.policy import KeepPlan
from kvtier.core.stats import SlotView

__all__ = ["share_heads"]


def share_heads(scores: torch.Tensor, view: SlotView, keep: int, least: int) -> KeepPlan:
    """Keep ``Hk * keep`` slots of a layer by scores [B, Hk, T] that are ranked over its KV heads.

    Protected slots stay, the newest first where a head has more than ``keep``; then the ``least`` best of each head,
    the protected ones among them; then the best of all heads. Of equal scores the earlier slot wins, then the lower
    head. Rows do not look at each other.
    """
    valid = torch.ones_like(view.protected) if view.valid is None else view.valid
    slots = scores.shape[-1]
    newest = torch.arange(slots, device=scores.device, dtype=torch.float64).expand(scores.shape)
    # A protected slot is before all others of its head, a slot without a token behind them.
    own = torch.where(view.protected, newest, scores.to(torch.float64))
    rank = _place(own, view.protected.long() - (~valid).long())
    protected = view.protected.sum(dim=-1, keepdim=True).clamp(max=keep)
    sure = valid & (rank < protected.clamp(min=least))
    over_heads = scores.to(torch.float64).mT.flatten(1)
    standing = (sure.long() - (~valid).long()).mT.flatten(1)
    total = valid.flatten(1).sum(dim=-1, keepdim=True).clamp(max=scores.shape[1] * keep)
    stays = _place(over_heads, standing) < total
    return KeepPlan.of(stays.unflatten(1, (slots, scores.shape[1])).mT)


def _place(scores: torch.Tensor, standing: torch.Tensor) -> torch.Tensor:
    """Place of each in its row [..., n], from 0: by ``standing``, then by score, higher first, then in order."""
    best = torch.argsort(scores, dim=-1, descending=True, stable=True)
    order = best.gather(-1, torch.argsort(standing.gather(-1, best), dim=-1, descending=True, stable=True))
    numbers = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, numbers)
