"""Attention over the pages that rank best, one operator after the other, each in its fastest form: for any device."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention import attend_pages, attend_run
from kvtier.kernels.merge_partials import merge_partials
from kvtier.kernels.page_scores import box_scores
from kvtier.kernels.ranked_attention.ranked import Newest, Ranked
from kvtier.kernels.top_pages import top_pages
from kvtier.types import GroupReduce

__all__ = ["attend_ranked"]


def attend_ranked(
    q: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    count: int,
    *,
    newest: Newest | None,
    group_reduce: GroupReduce,
    scale: float,
    softcap: float | None,
) -> Ranked:
    """Score, choose, attend, merge."""
    best = top_pages(box_scores(q, kmin, kmax, group_reduce), count)
    partial = attend_pages(q, k_arena, v_arena, frames.gather(2, best), scale=scale, softcap=softcap)
    if newest is not None:
        partial = merge_partials([partial, attend_run(q, *newest, scale=scale, softcap=softcap)])
    return Ranked(partial, best)
