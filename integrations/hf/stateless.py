"""Exact attention of one forward over its own keys: what a model without a cache asks for."""

from __future__ import annotations

import torch

from kvtier.integrations.hf.columns import Columns
from kvtier.kernels.gather_attention import attend_run
from kvtier.kernels.merge_partials import merge_partials, sink_partial
from kvtier.types import Visibility

__all__ = ["attend_stateless"]


def attend_stateless(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: Columns,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of q [B, Hq, T, Dk] over k, v [B, Hk, T, D] -> [B, Hq, T, Dv], zeros on padding."""
    positions = columns.positions_on(q.device)
    if columns.spans is None:
        return _attend(q, k, v, positions, scale, window, softcap, sink)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b, span in enumerate(columns.spans):
        if span.start < span.stop:
            row = slice(b, b + 1)
            out[row, :, span] = _attend(
                q[row, :, span], k[row, :, span], v[row, :, span], positions[row, span], scale, window, softcap, sink
            )
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """The same for rows without padding, at positions [B, T]."""
    visible = Visibility(positions, positions[:, None, :], window)
    part = attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible)
    if sink is not None:
        part = merge_partials([part, sink_partial(sink, part)])
    return part.out.to(q.dtype)
