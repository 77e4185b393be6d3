"""What attention over the pages that rank best takes and returns."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from kvtier.types import Partial

__all__ = ["Newest", "Ranked"]

Newest: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Keys [B, Hk, n, Dk] and values [B, Hk, n, Dv] that are attended whatever ranks best."""


class Ranked(NamedTuple):
    """Attention over the pages [B, Hk, count] that ranked best, in order of place, and over the newest keys."""

    partial: Partial
    pages: torch.Tensor
