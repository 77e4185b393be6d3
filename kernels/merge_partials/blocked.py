"""Merge of partials in few tensor operations: it happens in every layer of every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.types import Partial

__all__ = ["merge_partials"]


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Interpolate the first part with each next one: ``out + share * (next.out - out)``, four operations a part."""
    merged = parts[0]
    for index, part in enumerate(parts[1:]):
        lse = torch.logaddexp(merged.lse, part.lse)
        # -inf - -inf would be NaN; with the least finite number in its place an empty part has the share exp(-inf) = 0.
        share = (part.lse - lse.clamp_min(torch.finfo(lse.dtype).min)).exp_().unsqueeze_(-1)
        out = merged.out.lerp_(part.out, share) if index else torch.lerp(merged.out, part.out, share)
        merged = Partial(out, lse)
    return merged
