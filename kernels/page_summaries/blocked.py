"""Summaries of pages by reductions over the slots, and planes by one code per number."""

from __future__ import annotations

import torch

from kvtier.kernels.heads import accumulation_dtype

__all__ = ["page_bounds", "page_landmarks", "page_planes"]


def page_bounds(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest over the slots: over an inner dimension two reductions are quicker than ``torch.aminmax``."""
    return k.amin(-2), k.amax(-2)


def page_landmarks(k: torch.Tensor) -> torch.Tensor:
    """Means are added up in fp32 or better, and rounded once."""
    return k.mean(-2, dtype=accumulation_dtype(k)).to(k.dtype)


def page_planes(k: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``floor(2**bits (k - kmin) / (kmax - kmin))``, then one bit of eight channels a byte."""
    dtype = accumulation_dtype(k, kmin, kmax)
    low = kmin.to(dtype)
    span = kmax.to(dtype) - low
    # A channel that is the same in every slot has no cells: its codes are 0.
    cells = torch.where(span > 0, 2**bits / span, 0.0).clamp_max_(torch.finfo(dtype).max)
    codes = k.to(dtype).sub(low.unsqueeze(-2)).mul_(cells.unsqueeze(-2)).clamp_(0, 2**bits - 1).to(torch.uint8)
    short = -codes.shape[-1] % 8
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    codes = codes.unflatten(-1, (-1, 8))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=k.device)
    planes = [((codes >> shift) & 1).bitwise_left_shift_(places).sum(-1, dtype=torch.uint8) for shift in _down(bits)]
    return torch.stack(planes, dim=-3)


def _down(bits: int) -> range:
    """Shifts of the planes, the most significant bit first."""
    return range(bits - 1, -1, -1)
