"""Summaries of pages by reductions over the slots, and planes by one code per number."""

from __future__ import annotations

from typing import Final

import torch

from kvtier.kernels.heads import accumulation_dtype

__all__ = ["page_bounds", "page_landmarks", "page_planes"]

_ONES: Final = 0x0101010101010101
_GATHER: Final = sum(1 << 63 - 9 * i for i in range(8)) - (1 << 64)


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
    places = k.to(dtype).sub(low.unsqueeze(-2)).mul_(cells.unsqueeze(-2)).clamp_(0, 2**bits - 1)
    # By way of int32: torch converts from floating point to bytes one number at a time.
    codes = places.to(torch.int32).to(torch.uint8)
    short = -codes.shape[-1] % 8
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    words = codes.view(torch.int64)
    return torch.stack([_packed(words, shift) for shift in range(bits - 1, -1, -1)], dim=-3)


def _packed(words: torch.Tensor, shift: int) -> torch.Tensor:
    """One bit of each of the 8 codes of a little-endian word as a byte, that of the first code the highest."""
    # The sum of copies of the word 9 bits apart holds bit 0 of byte i in bit 63 - i, and nothing else up there.
    bits = (words >> shift).bitwise_and_(_ONES).mul_(_GATHER)
    return bits.bitwise_right_shift_(56).to(torch.uint8)
