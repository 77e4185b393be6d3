"""Bounds of pages in one pass over the keys."""

from __future__ import annotations

import torch

__all__ = ["page_bounds"]


def page_bounds(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum in one reduction."""
    low, high = torch.aminmax(keys, dim=-2)
    return low, high
