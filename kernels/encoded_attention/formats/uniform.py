"""Uniform codes: 2**bits levels from the least element of a group to its greatest, rounded to nearest even."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from kvtier.kernels.encoded_attention.formats.base import BlockFormat, CodeKind

__all__ = ["UniformFormat"]

_HALF_MAX: Final = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformFormat(BlockFormat, ABC):
    """Codes 0 to ``2**bits - 1`` with an fp16 scale and an fp16 minimum a group.

    The minimum is rounded down and the scale up, so that no element is clamped: each comes back within half a scale.
    A group without range has scale 0 where its element is an fp16 number. Elements beyond fp16's range saturate.
    """

    code: ClassVar[CodeKind] = "unsigned"
    scale_dtype: ClassVar[torch.dtype] = torch.float16
    has_minima: ClassVar[bool] = True

    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside = grouped.clamp(-_HALF_MAX, _HALF_MAX)
        minimum = _half_below(inside.amin((-3, -1), keepdim=True))
        reach = inside.amax((-3, -1), keepdim=True) - minimum.float()
        return -_half_below(-reach / (2**self.bits - 1)), minimum

    def _units(self, grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        offset = grouped if minimum is None else grouped - minimum.float()
        step = scale.float().masked_fill(scale == 0, 1.0)
        return (offset / step).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def _packed(self, units: torch.Tensor) -> torch.Tensor:
        shares = units.unflatten(-1, (8 // self.bits, self.columns))
        packed: torch.Tensor = shares[..., 0, :].clone()
        for share in range(1, 8 // self.bits):
            packed |= shares[..., share, :] << (share * self.bits)
        return packed.unsqueeze(-3)

    def _unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        (plane,) = codes.unbind(-3)
        last = 8 // self.bits - 1
        for share in range(last + 1):
            unit = plane >> (share * self.bits) if share else plane
            out[..., share * self.columns : (share + 1) * self.columns] = (
                unit if share == last else unit & (2**self.bits - 1)
            )


def _half_below(x: torch.Tensor) -> torch.Tensor:
    """The greatest fp16 number that is not above x, for x within fp16's range."""
    near = x.to(torch.float16)
    return torch.where(near.float() > x, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)
