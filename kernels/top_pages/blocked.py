"""The best pages by a partial selection, then a sort of those alone."""

from __future__ import annotations

import torch

__all__ = ["top_pages"]


def top_pages(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Selection in any order is twice as quick as in order of score, which nobody asks for."""
    best = torch.topk(scores, min(count, scores.shape[-1]), sorted=False).indices
    return best.sort().values
