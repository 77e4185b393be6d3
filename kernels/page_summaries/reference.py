"""Bounds of pages, slot by slot: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

__all__ = ["page_bounds"]


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first slot, then whatever a later slot lowers or raises."""
    slots = k.unbind(dim=-2)
    low, high = slots[0], slots[0]
    for slot in slots[1:]:
        low = torch.where(slot < low, slot, low)
        high = torch.where(slot > high, slot, high)
    return low.clone(), high.clone()
