"""Attention over shared prefixes by the operator for pages: a prefix for all members at once, then their own keys."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention import attend_pages
from kvtier.kernels.heads import accumulation_dtype
from kvtier.kernels.merge_partials import empty_partial, merge_partials
from kvtier.kernels.prefix_attention.plan import PrefixPlan
from kvtier.types import Partial, Visibility

__all__ = ["prefix_attention"]


def prefix_attention(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    prefix_frames: torch.Tensor,
    own_frames: torch.Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Partials over the prefixes and over the own keys, merged once."""
    shared = empty_partial(q.to(accumulation_dtype(q, k_arena, v_arena)), v_arena.shape[2])
    for members, prefix in zip(plan.members, plan.prefixes, strict=True):
        if not members or not prefix.length:
            continue
        rows = list(members)
        # [M, Hq, Tq, D] to [1, Hq, M * Tq, D]: the queries of all members are those of one request.
        packed = q[rows].transpose(0, 1).flatten(1, 2)[None]
        frames = prefix_frames[None, :, prefix.page : prefix.page + plan.pages(prefix)]
        lengths = torch.full(frames.shape[:2], prefix.length, device=q.device)
        part = attend_pages(packed, k_arena, v_arena, frames, scale=scale, softcap=softcap, lengths=lengths)
        for whole, piece in zip(shared, part, strict=True):
            whole[rows] = piece[0].unflatten(1, (len(rows), -1)).transpose(0, 1)
    if not plan.own_pages:
        return shared
    frames, lengths, visible = _own_lists(own_frames, plan)
    alone = attend_pages(q, k_arena, v_arena, frames, scale=scale, softcap=softcap, lengths=lengths, visible=visible)
    return merge_partials([shared, alone])


def _own_lists(own_frames: torch.Tensor, plan: PrefixPlan) -> tuple[torch.Tensor, torch.Tensor, Visibility | None]:
    """Own keys of all requests: frames [B, Hk, N], lengths [B, Hk], and who sees what if there are several queries."""
    heads, device = own_frames.shape[0], own_frames.device
    most = max(plan.pages(span) for span in plan.owns)
    first = torch.tensor([span.page for span in plan.owns], device=device)
    lengths = torch.tensor([span.length for span in plan.owns], device=device)
    pages = torch.arange(most, device=device)
    # Behind the end of a list its last frame is named again, and never read.
    listed = (first.unsqueeze(1) + pages).clamp_max(plan.own_pages - 1)
    frames = own_frames[:, listed].transpose(0, 1)
    visible = None
    if plan.queries > 1:
        q_pos = lengths.unsqueeze(1) - plan.queries + torch.arange(plan.queries, device=device)
        k_pos = torch.arange(most * plan.page_tokens, device=device).expand(len(plan.owns), 1, -1)
        visible = Visibility(q_pos, k_pos)
    return frames, lengths.unsqueeze(1).expand(-1, heads), visible
