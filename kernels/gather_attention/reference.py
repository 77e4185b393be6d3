"""Attention over a run or over pages, dense and in one piece: the truth that the fast path is compared with.

``unified_max`` changes no answer, so nothing is done about it here.
"""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention.extras import PLAIN, Extras
from kvtier.types import Partial, Visibility

__all__ = ["attend_pages", "attend_run"]


def attend_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Logits [B, Hk, G, Tq, N] of all pairs, a softmax over N, one product with the values."""
    place = torch.arange(k.shape[2], device=k.device)
    if extras.lengths is not None:
        missing = (place >= extras.lengths.unsqueeze(-1)).unsqueeze(-1)
        k, v = k.masked_fill(missing, 0), v.masked_fill(missing, 0)
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    kv_heads = k.shape[1]
    grouped = q.to(wide).unflatten(1, (kv_heads, q.shape[1] // kv_heads))
    logits = torch.einsum("bhgtd,bhnd->bhgtn", grouped, k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        q_pos = visible.q_pos[:, None, None, :, None]
        k_pos = visible.k_pos[:, :, None, None, :]
        seen = k_pos <= q_pos
        if visible.window is not None:
            seen = seen & (k_pos > q_pos - visible.window)
        logits = torch.where(seen, logits, torch.full_like(logits, float("-inf")))
    if extras.bias is not None:
        per_head = extras.bias.to(wide).unflatten(1, (kv_heads, -1))
        logits = logits + per_head.unsqueeze(3)
    if extras.lengths is not None:
        logits = logits.masked_fill(missing.squeeze(-1)[:, :, None, None], float("-inf"))
    if extras.tree is not None:
        bit = (place - extras.tree.first).clamp_min(0)
        descends = (extras.tree.ancestors.unsqueeze(-1) >> bit) & 1 == 1
        allowed = descends | (place < extras.tree.first)
        logits = logits.masked_fill(~allowed[:, None, None], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse).unsqueeze(-1))
    out = torch.einsum("bhgtn,bhnd->bhgtd", weights, v.to(wide))
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))


def attend_pages(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    extras: Extras = PLAIN,
) -> Partial:
    """Gather every page of every head [B, Hk, N, P, D], lay the pages end to end, and attend to the run."""
    if extras.lengths is not None:
        first = torch.arange(frames.shape[2], device=frames.device) * k_arena.shape[1]
        frames = torch.where(first < extras.lengths.unsqueeze(-1), frames, 0)
    k, v = k_arena[frames].flatten(2, 3), v_arena[frames].flatten(2, 3)
    return attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible, extras=extras)
