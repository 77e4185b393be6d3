"""Attention and its weights in two passes, each by whatever implementation serves the device."""

from __future__ import annotations

import torch

from kvtier.kernels.column_sums import column_sums
from kvtier.kernels.gather_attention import attend_run
from kvtier.types import Partial

__all__ = ["attend_weighing"]


def attend_weighing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, softcap: float | None
) -> tuple[Partial, torch.Tensor]:
    """The partial, and weights [B, Hq, N] by its lse."""
    partial = attend_run(q, k, v, scale=scale, softcap=softcap)
    return partial, column_sums(q, partial.lse, k, scale=scale, softcap=softcap)
