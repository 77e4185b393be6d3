"""Summaries of pages, slot by slot and cell by cell: the truth that the fast path is compared with."""

from __future__ import annotations

import torch

__all__ = ["page_bounds", "page_landmarks", "page_planes"]


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first slot, then whatever a later slot lowers or raises."""
    slots = k.unbind(dim=-2)
    low, high = slots[0], slots[0]
    for slot in slots[1:]:
        low = torch.where(slot < low, slot, low)
        high = torch.where(slot > high, slot, high)
    return low.clone(), high.clone()


def page_landmarks(k: torch.Tensor) -> torch.Tensor:
    """The slots one by one, added in fp64."""
    total = torch.zeros(k.shape[:-2] + k.shape[-1:], dtype=torch.float64, device=k.device)
    for slot in k.unbind(dim=-2):
        total = total + slot
    return (total / k.shape[-2]).to(k.dtype)


def page_planes(k: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, bits: int) -> torch.Tensor:
    """Halve the cell of every number ``bits`` times: the plane says in which half it lies."""
    wide = k.to(torch.float64)
    low, high = (bound.to(torch.float64).unsqueeze(-2).expand_as(wide) for bound in (kmin, kmax))
    planes = []
    for _ in range(bits):
        middle = (low + high) / 2
        upper = (wide >= middle) & (low < high)
        low, high = torch.where(upper, middle, low), torch.where(upper, high, middle)
        planes.append(upper)
    upper = torch.stack(planes, dim=-3)
    short = -upper.shape[-1] % 8
    padded = torch.cat([upper, upper.new_zeros(*upper.shape[:-1], short)], dim=-1).unflatten(-1, (-1, 8))
    packed = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=k.device)
    for place in range(8):
        packed = packed | (padded[..., place].to(torch.uint8) << (7 - place))
    return packed
