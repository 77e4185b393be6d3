"""Attention over a span in two passes, keys then values, each read once in blocks that stay in the cache."""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention.loaders import Loader
from kvtier.kernels.scratch import scratch
from kvtier.types import Partial

__all__ = ["DIRECT_ROWS", "streamed_part"]

DIRECT_ROWS = 8
"""Up to this many queries per KV head, K q^T streams many keys from memory faster than q K^T."""


def streamed_part(
    q: torch.Tensor,
    keys: Loader,
    values: Loader,
    start: int,
    stop: int,
    *,
    block: int,
    scale: float,
    softcap: float | None,
    hidden: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Attention over keys ``start`` to ``stop``.

    Parameters
    ----------
    q : Tensor
        [H, G, Tq, Dk] of the accumulation type.
    block : int
        Keys of a block that stays in the cache.
    hidden : Tensor, optional
        [H or 1, Tq, stop - start]: pairs that do not see each other.
    bias : Tensor, optional
        [H, 1 or G, stop - start] of the accumulation type, added to the logits.

    Returns
    -------
    Partial
        out [H, G, Tq, Dv], lse [H, G, Tq].
    """
    shape = q.shape[:3]
    scaled = (q * (scale if softcap is None else scale / softcap)).reshape(shape[0], -1, q.shape[3])
    logits = _logits(scaled, keys, start, stop, block)
    if softcap is not None:
        logits.tanh_().mul_(softcap)
    if bias is not None:
        logits.view(*shape, -1).add_(bias.unsqueeze(2))
    if hidden is not None:
        logits.view(*shape, -1).masked_fill_(hidden.unsqueeze(1), float("-inf"))
    all_seen = hidden is None and bias is None
    greatest = logits.amax(-1, keepdim=True)
    base = greatest if all_seen else greatest.clamp_min(torch.finfo(logits.dtype).min)
    weights = logits.sub_(base).exp_()
    total = weights.sum(-1, keepdim=True)
    # The greatest logit contributes exp(0): total is at least 1, or 0 when every key is hidden.
    out = _weighted(weights, values, start, stop, block).div_(total if all_seen else total.clamp_min(1))
    return Partial(out.view(*shape, -1), total.log_().add_(greatest).view(shape))


def _logits(q: torch.Tensor, keys: Loader, start: int, stop: int, block: int) -> torch.Tensor:
    """Products of q [H, R, Dk] with the keys, contiguous [H, R, n], in scratch memory."""
    heads, rows, _ = q.shape
    logits = scratch("logits", (heads, rows, stop - start), q.dtype, q.device)
    if not keys.copies:
        run = keys.load(start, stop, "block")
        if rows > DIRECT_ROWS or stop - start <= block:
            return torch.bmm(q, run.mT, out=logits)
        # Measured: from memory BLAS reads K as the left operand over twice as fast as the transposed right one.
        turned = scratch("products", (heads, stop - start, rows), q.dtype, q.device)
        return logits.copy_(torch.bmm(run, q.mT, out=turned).mT)
    if stop - start <= block:
        return torch.bmm(q, keys.load(start, stop, "block").mT, out=logits)
    for at in range(start, stop, block):
        to = min(at + block, stop)
        logits[:, :, at - start : to - start] = torch.bmm(q, keys.load(at, to, "block").mT)
    return logits


def _weighted(weights: torch.Tensor, values: Loader, start: int, stop: int, block: int) -> torch.Tensor:
    """Products of weights [H, R, n] with the values, [H, R, Dv]."""
    if not values.copies or stop - start <= block:
        return torch.bmm(weights, values.load(start, stop, "block"))
    out = torch.bmm(weights[:, :, :block], values.load(start, start + block, "block"))
    for at in range(start + block, stop, block):
        to = min(at + block, stop)
        out.baddbmm_(weights[:, :, at - start : to - start], values.load(at, to, "block"))
    return out
