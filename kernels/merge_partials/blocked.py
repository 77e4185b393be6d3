"""Merge of partials in as few tensor operations as there are: a merge happens in every layer of every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.types import Partial

__all__ = ["merge_partials"]


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Two parts are interpolated, more are summed with weights ``exp(lse_i - lse)``."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return _merge_two(*parts)
    shares = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(shares, dim=0)
    weights = shares.sub_(_finite(lse)).exp_().unsqueeze_(-1).unbind()
    out = parts[0].out * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        out.addcmul_(part.out, weight)
    return Partial(out, lse)


def _merge_two(first: Partial, second: Partial) -> Partial:
    lse = torch.logaddexp(first.lse, second.lse)
    share = (second.lse - _finite(lse)).exp_().unsqueeze_(-1)
    return Partial(torch.lerp(first.out, second.out, share), lse)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    # -inf - -inf would be NaN; with the least finite number in its place the share of an empty part is exp(-inf) = 0.
    return lse.clamp_min(torch.finfo(lse.dtype).min)
