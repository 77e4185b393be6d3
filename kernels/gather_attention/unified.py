"""Attention over a span in one pass, relative to one number instead of the greatest logit (FlashDecoding++, section 3).

With any number ``m``, ``sum exp(s_j - m) v_j / sum exp(s_j - m)`` is the answer, so a block of keys is done when the
next one comes: no logits are held and no maximum is waited for. It fails only where the exponentials leave the range of
fp32, which their sum tells.
"""

from __future__ import annotations

import torch

from kvtier.kernels.gather_attention.extras import UNIFIED_TOTALS
from kvtier.kernels.gather_attention.loaders import Loader
from kvtier.types import Partial

__all__ = ["unified_part"]


def unified_part(
    q: torch.Tensor,
    keys: Loader,
    values: Loader,
    start: int,
    stop: int,
    *,
    block: int,
    base: float,
    scale: float,
    softcap: float | None,
    hidden: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> Partial | None:
    """Attention over keys ``start`` to ``stop``, or None when ``base`` is too far from the greatest logit of a query.

    Parameters and result as of ``streamed_part``. A query without keys is as far as can be.
    """
    heads, group, queries, _ = shape = q.shape
    scaled = (q * (scale if softcap is None else scale / softcap)).reshape(heads, group * queries, -1)
    total, out = q.new_zeros(heads, group * queries), q.new_zeros(heads, group * queries, values.dim)
    for at in range(start, stop, block):
        to = min(at + block, stop)
        logits = torch.bmm(scaled, keys.load(at, to, "block").mT)
        if softcap is not None:
            logits.tanh_().mul_(softcap)
        if bias is not None:
            logits.view(heads, group, queries, -1).add_(bias[..., at - start : to - start].unsqueeze(2))
        if hidden is not None:
            pairs = hidden[..., at - start : to - start].unsqueeze(1)
            logits.view(heads, group, queries, -1).masked_fill_(pairs, float("-inf"))
        weights = logits.sub_(base).exp_()
        total += weights.sum(-1)
        out.baddbmm_(weights, values.load(at, to, "block"))
    least, most = UNIFIED_TOTALS
    if not bool(((total >= least) & (total <= most)).all()):
        return None
    out /= total.unsqueeze(-1)
    return Partial(out.view(*shape[:3], -1), total.log_().add_(base).view(shape[:3]))
