"""Column sums in tiles of queries by keys that stay in the cache; tiles that hold no visible pair are skipped."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_heads, fold_queries
from kvtier.kernels.spans import Span, batch_row, hidden_pairs, plan_blocks, whole_plan
from kvtier.types import Visibility

__all__ = ["column_sums"]

TILE_ROWS: Final = 512
"""Queries of one KV head, over its whole group, in a tile."""
TILE_KEYS: Final = {"cpu": 512}
DEVICE_TILE_KEYS: Final = 8192


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> torch.Tensor:
    """Sums [B, Hq, N] of ``exp(logit - lse)`` over the queries that see a key."""
    folded_k = fold_heads(k)
    if folded_k is None:
        rows = [slice(b, b + 1) for b in range(q.shape[0])]
        return torch.cat(
            [column_sums(q[b], lse[b], k[b], scale=scale, softcap=softcap, visible=batch_row(visible, b)) for b in rows]
        )
    dtype = accumulation_dtype(q, k)
    scaled = fold_queries(q, k.shape[1], dtype) * scale
    # exp(logit - inf) = 0: a query that sees no key counts nowhere.
    totals = lse.to(dtype).reshape(scaled.shape[:3])
    totals = totals.masked_fill(torch.isneginf(totals), float("inf"))
    sums = scaled.new_zeros(*scaled.shape[:2], k.shape[2])
    if scaled.numel() and sums.numel():
        _add(sums, scaled, totals, folded_k, softcap, visible)
    return sums.view(q.shape[0], q.shape[1], k.shape[2])


def _add(
    sums: torch.Tensor,
    q: torch.Tensor,
    totals: torch.Tensor,
    k: torch.Tensor,
    softcap: float | None,
    visible: Visibility | None,
) -> None:
    """Add to sums [H, G, N] the weights of q [H, G, Tq, Dk], already scaled, with totals [H, G, Tq]."""
    heads, group, queries, _ = q.shape
    rows = max(TILE_ROWS // group, 1)
    keys = TILE_KEYS.get(q.device.type, DEVICE_TILE_KEYS)
    plan = whole_plan(queries, k.shape[1], rows) if visible is None else plan_blocks(visible, rows, keys)
    for block in plan:
        at = slice(block.start, block.stop)
        tile_q = q[:, :, at].reshape(heads, -1, q.shape[3])
        tile_totals = totals[:, :, at].reshape(heads, -1, 1)
        for span in block.spans:
            for piece in span.pieces(keys):
                weights = _weights(tile_q, tile_totals, k[:, piece.start : piece.stop], softcap)
                weights = weights.view(heads, group, block.stop - block.start, -1)
                sums[:, :, piece.start : piece.stop] += _counted(weights, piece, visible, at).sum(2)


def _weights(q: torch.Tensor, totals: torch.Tensor, k: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits minus totals, [H, R, n], not yet exponentiated."""
    k = k.to(q.dtype)
    if softcap is None:
        return torch.baddbmm(totals, q, k.mT, beta=-1)
    return torch.bmm(q, k.mT).div_(softcap).tanh_().mul_(softcap).sub_(totals)


def _counted(logits: torch.Tensor, piece: Span, visible: Visibility | None, rows: slice) -> torch.Tensor:
    if visible is not None and piece.kind == "masked":
        hidden = hidden_pairs(visible, rows, slice(piece.start, piece.stop), logits.shape[0])
        logits.masked_fill_(hidden.unsqueeze(1), float("-inf"))
    return logits.exp_()
