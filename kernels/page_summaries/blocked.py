"""Bounds of pages by two reductions over the slots."""

from __future__ import annotations

import torch

__all__ = ["page_bounds"]


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest over the slots: over an inner dimension two reductions are quicker than ``torch.aminmax``."""
    return k.amin(-2), k.amax(-2)
