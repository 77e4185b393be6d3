"""Folding dropped slots into kept ones, as a merge plan says: weighted sums, computed wide and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.core.policy import MergePlan

__all__ = ["fold_slots", "merge_into"]


def merge_into(
    keys: torch.Tensor,
    values: torch.Tensor,
    keep: torch.Tensor,
    plan: MergePlan,
    source_keys: torch.Tensor,
    source_values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [Hk, K, Dk] and V [Hk, K, Dv] of the kept slots after a merge.

    Parameters
    ----------
    keys, values : Tensor
        Of the slots ``keep`` [Hk, K], ascending.
    plan : MergePlan
        Of one row: each tensor [1, Hk, M].
    source_keys, source_values : Tensor
        Of the slots ``plan.src``: [Hk, M, Dk] and [Hk, M, Dv].
    """
    weight = plan.weight[0].to(torch.float32)
    place = torch.searchsorted(keep.contiguous(), plan.dst[0].contiguous()).clamp_max(keep.shape[1] - 1)
    share = torch.zeros(keep.shape, dtype=torch.float32, device=keys.device).scatter_add_(1, place, weight)
    taken = (share > 0).unsqueeze(-1)
    return (
        torch.where(taken, _folded(keys, place, weight, source_keys), keys),
        torch.where(taken, _folded(values, place, weight, source_values), values),
    )


def fold_slots(
    parts: Sequence[torch.Tensor],
    head: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Overwrite slots of K and V [Hk, C, D] by weighted sums: of ``source`` into ``target``, entry by entry [M]."""
    first = head * parts[0].shape[1]
    into, place = torch.unique(first + target, return_inverse=True)
    for slots in parts:
        wide = torch.float64 if slots.dtype == torch.float64 else torch.float32
        flat = slots.flatten(0, 1)
        weighted = weight.to(wide).unsqueeze(-1) * flat[first + source].to(wide)
        total = torch.zeros(into.shape[0], flat.shape[1], dtype=wide, device=flat.device).index_add_(0, place, weighted)
        flat[into] = total.to(flat.dtype)


def _folded(like: torch.Tensor, place: torch.Tensor, weight: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Weighted sums of ``source`` [Hk, M, D] by their place [Hk, M] among the kept slots, in the type of ``like``."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    total = torch.zeros(like.shape, dtype=wide, device=like.device)
    index = place.unsqueeze(-1).expand(-1, -1, like.shape[2])
    return total.scatter_add_(1, index, weight.to(wide).unsqueeze(-1) * source.to(wide)).to(like.dtype)
