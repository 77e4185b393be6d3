"""Attention over a span in two passes, keys then values, each read once in blocks that stay in the cache."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention.loaders import Loader
from kvtier.types import Partial

__all__ = ["DIRECT_ROWS", "streamed_part"]

DIRECT_ROWS = 4
"""Up to this many queries per KV head, K times q^T streams keys from memory; above, a block is copied to the cache first."""


def streamed_part(
    q: torch.Tensor,
    keys: Loader,
    values: Loader,
    start: int,
    stop: int,
    *,
    block: int,
    softcap: float | None,
    hidden: torch.Tensor | None,
) -> Partial:
    """Attention over keys ``start`` to ``stop``.

    Parameters
    ----------
    q : Tensor
        [H, G, Tq, Dk], multiplied by the scale, of the accumulation type.
    block : int
        Keys per block where blocks are copied.
    hidden : Tensor, optional
        [H or 1, Tq, stop - start]: pairs that do not see each other.

    Returns
    -------
    Partial
        out [H, G, Tq, Dv], lse [H, G, Tq].
    """
    shape = q.shape[:3]
    logits = _logits(q.reshape(shape[0], -1, q.shape[3]), keys, start, stop, block)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        logits.view(*shape, -1).masked_fill_(hidden.unsqueeze(1), float("-inf"))
    greatest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(greatest.clamp_min(torch.finfo(logits.dtype).min)).exp_()
    total = weights.sum(-1, keepdim=True)
    # The greatest logit contributes exp(0): total is at least 1 unless every key is hidden, and then it is 0.
    out = _weighted(weights, values, start, stop, block).div_(total.clamp_min(1))
    return Partial(out.view(*shape, -1), total.log_().add_(greatest).view(shape))


def _logits(q: torch.Tensor, keys: Loader, start: int, stop: int, block: int) -> torch.Tensor:
    """q [H, R, Dk] times the keys, contiguous [H, R, n]."""
    if not keys.copies:
        run = keys(start, stop)
        # BLAS packs the left operand: with K there it is read as a stream, over twice as fast from memory as q K^T.
        return torch.bmm(run, q.mT).mT.contiguous() if q.shape[1] <= DIRECT_ROWS else torch.bmm(q, run.mT)
    if stop - start <= block:
        return torch.bmm(q, keys(start, stop).mT)
    logits = q.new_empty(*q.shape[:2], stop - start)
    for at in range(start, stop, block):
        to = min(at + block, stop)
        logits[:, :, at - start : to - start] = torch.bmm(q, keys(at, to).mT)
    return logits


def _weighted(weights: torch.Tensor, values: Loader, start: int, stop: int, block: int) -> torch.Tensor:
    """Weights [H, R, n] times the values, [H, R, Dv]."""
    if not values.copies or stop - start <= block:
        return torch.bmm(weights, values(start, stop))
    out = torch.bmm(weights[:, :, :block], values(start, start + block))
    for at in range(start + block, stop, block):
        to = min(at + block, stop)
        out.baddbmm_(weights[:, :, at - start : to - start], values(at, to))
    return out
