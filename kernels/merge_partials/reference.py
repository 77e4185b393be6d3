"""Merge of partials as one dense sum over the parts: the truth that the fast path is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.types import Partial

__all__ = ["merge_partials"]


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Weigh every part by ``exp(lse_i - m)``, ``m = max lse``, and divide by the sum of the weights."""
    lse = torch.stack([part.lse for part in parts])
    out = torch.stack([part.out for part in parts])
    greatest = lse.max(dim=0).values
    base = torch.where(torch.isneginf(greatest), torch.zeros_like(greatest), greatest)
    weights = torch.exp(lse - base)
    total = weights.sum(dim=0)
    shares = weights / torch.where(total == 0, torch.ones_like(total), total)
    return Partial((shares.unsqueeze(-1) * out).sum(dim=0), base + torch.log(total))
