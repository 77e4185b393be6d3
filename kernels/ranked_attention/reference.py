"""Attention over the pages that rank best, by the references of its steps: the truth for the other implementations."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention import reference as attention
from kvtier.kernels.merge_partials import reference as merging
from kvtier.kernels.page_scores import reference as scoring
from kvtier.kernels.ranked_attention.ranked import Newest, Ranked
from kvtier.kernels.top_pages import reference as choosing
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
    best = choosing.top_pages(scoring.box_scores(q, kmin, kmax, group_reduce), count)
    chosen = frames.gather(2, best)
    parts = [attention.attend_pages(q, k_arena, v_arena, chosen, scale=scale, softcap=softcap, visible=None)]
    if newest is not None:
        parts.append(attention.attend_run(q, *newest, scale=scale, softcap=softcap, visible=None))
    return Ranked(merging.merge_partials(parts), best)
