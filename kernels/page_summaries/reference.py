"""Bounds of pages, channel by channel: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

__all__ = ["page_bounds"]


def page_bounds(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A running minimum and maximum over the slots."""
    low = high = keys[..., 0, :]
    for slot in range(1, keys.shape[-2]):
        low, high = torch.minimum(low, keys[..., slot, :]), torch.maximum(high, keys[..., slot, :])
    return low, high
