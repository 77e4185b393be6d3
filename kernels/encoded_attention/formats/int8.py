"""Int8: one byte an element, an fp32 scale per token and head, symmetric around 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.kernels.encoded_attention.formats.base import BlockFormat, CodeKind

__all__ = ["Int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8(BlockFormat):
    """Codes -127 to 127 times ``max |x| / 127`` of the token."""

    name: ClassVar[str] = "int8"
    code: ClassVar[CodeKind] = "signed"

    @property
    def bits(self) -> int:
        """Always 8."""
        return 8

    @property
    def token_group(self) -> int:
        """Each token by itself."""
        return 1

    @property
    def channel_group(self) -> int:
        """All of them."""
        return self.dim

    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grouped.abs().amax((-3, -1), keepdim=True) / 127, None

    def _units(self, grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        del minimum
        return (grouped / scale.masked_fill(scale == 0, 1.0)).round_().clamp_(-127, 127).to(torch.int8)

    def _packed(self, units: torch.Tensor) -> torch.Tensor:
        return units.view(torch.uint8).unsqueeze(-3)

    def _unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        (plane,) = codes.view(torch.int8).unbind(-3)
        out.copy_(plane)
