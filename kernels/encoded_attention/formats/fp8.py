"""Fp8: e4m3 without infinities (Micikevicius et al. 2022, arXiv 2209.05433), an fp32 scale per block and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from kvtier.kernels.encoded_attention.formats.base import BlockFormat, CodeKind

__all__ = ["Fp8"]

_MOST: Final = 448.0
_SIGN_AND_LOW_EXPONENT: Final = ~0x4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(BlockFormat):
    """The block's greatest magnitude becomes 448; what is small against it keeps its 3 bits of mantissa."""

    name: ClassVar[str] = "fp8"
    code: ClassVar[CodeKind] = "e4m3"

    @property
    def bits(self) -> int:
        """Always 8."""
        return 8

    @property
    def token_group(self) -> int:
        """All of them."""
        return self.slots

    @property
    def channel_group(self) -> int:
        """All of them."""
        return self.dim

    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grouped.abs().amax((-3, -1), keepdim=True) / _MOST, None

    def _units(self, grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        del minimum
        fitted = (grouped / scale.masked_fill(scale == 0, 1.0)).clamp_(-_MOST, _MOST)
        return fitted.to(torch.float8_e4m3fn)

    def _packed(self, units: torch.Tensor) -> torch.Tensor:
        return units.view(torch.uint8).unsqueeze(-3)

    def _unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        # As fp16, whose exponents are 8 less: torch converts fp8 one element at a time.
        (plane,) = codes.view(torch.int8).unbind(-3)
        words = plane.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_LOW_EXPONENT)
        out.copy_(words.view(torch.float16)).mul_(256)
