"""Attention over a shared prefix and a request's own keys, request by request: the truth for the fast path."""

from __future__ import annotations

import torch

from kvtier.kernels.prefix_attention.plan import PrefixPlan
from kvtier.kernels.prefix_attention.programs import Span
from kvtier.types import Partial

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
    """Lay prefix and own keys of every request end to end, and attend to them with a dense softmax."""
    wide = torch.float64 if torch.float64 in (q.dtype, k_arena.dtype, v_arena.dtype) else torch.float32
    out = q.new_zeros(*q.shape[:3], v_arena.shape[2], dtype=wide)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    for members, prefix in zip(plan.members, plan.prefixes, strict=True):
        for request in members:
            own = plan.owns[request]
            lists = (prefix_frames, prefix), (own_frames, own)
            k, v = (
                torch.cat([_tokens(arena, frames, span) for frames, span in lists], dim=1).to(wide)
                for arena in (k_arena, v_arena)
            )
            grouped = q[request].to(wide).unflatten(0, (k.shape[0], -1))
            logits = torch.einsum("hgtd,hnd->hgtn", grouped, k) * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            last = prefix.length + own.length - plan.queries + torch.arange(plan.queries, device=q.device)
            # A query that comes before the own keys still sees the whole prefix.
            last = last.clamp_min(prefix.length - 1)
            hidden = torch.arange(k.shape[1], device=q.device) > last[:, None]
            logits = logits.masked_fill(hidden, float("-inf"))
            total = torch.logsumexp(logits, dim=-1)
            weights = torch.exp(logits - total.masked_fill(total.isneginf(), 0.0).unsqueeze(-1))
            out[request] = torch.einsum("hgtn,hnd->hgtd", weights, v).flatten(0, 1)
            lse[request] = total.flatten(0, 1)
    return Partial(out, lse)


def _tokens(arena: torch.Tensor, frames: torch.Tensor, span: Span) -> torch.Tensor:
    """Keys or values [Hk, length, D] of a list."""
    pages = -(-span.length // arena.shape[1])
    return arena[frames[:, span.page : span.page + pages]].flatten(1, 2)[:, : span.length]
