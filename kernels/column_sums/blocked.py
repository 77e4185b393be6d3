"""Column sums block by block: a bounded piece of the matrix of probabilities exists at a time."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_queries
from kvtier.kernels.spans import hidden_pairs, plan_blocks, whole_plan
from kvtier.types import Visibility

__all__ = ["column_sums"]

_ROWS: Final = 128
_KEYS: Final = 2048


def column_sums(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
) -> torch.Tensor:
    """One product, one exponential and one sum for each block of queries and keys that see each other at all."""
    batch, kv_heads, keys, dim = k.shape
    queries = q.shape[2]
    wide = accumulation_dtype(q, k)
    grouped = fold_queries(q, kv_heads, wide) * scale
    # A query that saw nothing has lse -inf: with +inf in its place every probability is exp(-inf) = 0.
    total = lse.to(wide).masked_fill(torch.isneginf(lse), float("inf"))
    total = total.reshape(batch * kv_heads, -1, queries, 1)
    sums = q.new_zeros(batch * kv_heads, grouped.shape[1], keys, dtype=wide)
    plan = whole_plan(queries, keys, _ROWS) if visible is None else plan_blocks(visible, _ROWS, _KEYS)
    for rows in plan:
        part = slice(rows.start, rows.stop)
        block = grouped[:, :, part].flatten(1, 2)
        for span in (piece for whole in rows.spans for piece in whole.pieces(_KEYS)):
            columns = slice(span.start, span.stop)
            folded = k[:, :, columns].to(wide).reshape(batch * kv_heads, -1, dim)
            logits = torch.bmm(block, folded.transpose(1, 2)).unflatten(1, (-1, rows.stop - rows.start))
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            weights = logits.sub_(total[:, :, part]).exp_()
            if span.kind == "masked" and visible is not None:
                weights.masked_fill_(hidden_pairs(visible, part, columns, batch * kv_heads).unsqueeze(1), 0.0)
            sums[:, :, columns] += weights.sum(dim=2)
    return sums.view(batch, -1, keys)
