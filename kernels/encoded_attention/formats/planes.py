"""Bit planes: a sign and magnitudes from the highest bit to the lowest, of which the first planes may be enough.

The planes of arbitrary-bit products (ABQ-LLM, Zeng et al. 2024, arXiv 2408.08554), for keys instead of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.errors import ConfigError
from kvtier.kernels.encoded_attention.formats.base import BlockFormat, CodeKind

__all__ = ["BitPlanes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitPlanes(BlockFormat):
    """Sign and magnitude in ``stored`` planes with an fp32 step per token; attention reads the first ``planes``.

    A magnitude is ``round(|x| / step)``, step = ``max |x| / (2**(stored - 1) - 1)`` of the token. With r planes unread
    it comes back as the middle of what it may be, within ``2**r * step / 2``. The planes that are read are the
    beginning of a block, so a tier may fetch only ``read_bytes`` of it. A mask of 8 channels fits each byte.

    Parameters
    ----------
    stored : int
        Planes written, the sign's included: 2 to 8.
    planes : int, optional
        Planes read, 1 to ``stored``; None reads all. Has no say in the bytes that are written.
    """

    name: ClassVar[str] = "bit planes"
    code: ClassVar[CodeKind] = "planes"

    stored: int = 8
    planes: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.stored <= 8:
            raise ConfigError(f"{self.name}: stored must be 2 to 8 planes, got {self.stored}")
        if not 1 <= self.read_planes <= self.stored:
            raise ConfigError(f"{self.name}: planes must be 1 to the {self.stored} stored ones, got {self.planes}")
        BlockFormat.__post_init__(self)

    @property
    def bits(self) -> int:
        """One, in each plane."""
        return 1

    @property
    def token_group(self) -> int:
        """Each token by itself."""
        return 1

    @property
    def channel_group(self) -> int:
        """All of them."""
        return self.dim

    @property
    def stored_planes(self) -> int:
        """As configured."""
        return self.stored

    @property
    def read_planes(self) -> int:
        """As configured."""
        return self.stored if self.planes is None else self.planes

    @property
    def read_bytes(self) -> int:
        """Steps and the first planes."""
        return self.codes_at + self.read_planes * self.slots * self.columns

    def _fit(self, grouped: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grouped.abs().amax((-3, -1), keepdim=True) / (2 ** (self.stored - 1) - 1), None

    def _units(self, grouped: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None) -> torch.Tensor:
        """The magnitude with the sign above it."""
        del minimum
        top = 2 ** (self.stored - 1)
        magnitude = (grouped / scale.masked_fill(scale == 0, 1.0)).abs_().round_().clamp_(0, top - 1)
        return magnitude.add_(grouped < 0, alpha=top).to(torch.uint8)

    def _packed(self, units: torch.Tensor) -> torch.Tensor:
        planes = torch.stack([units >> bit & 1 for bit in range(self.stored - 1, -1, -1)], -3)
        shares = planes.unflatten(-1, (8, self.columns))
        packed: torch.Tensor = shares[..., 0, :].clone()
        for share in range(1, 8):
            packed |= shares[..., share, :] << share
        return packed

    def _unpack(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        unread = self.stored - self.read_planes
        for share in range(8):
            # What the planes that are not read leave open, by half.
            part = out[..., share * self.columns : (share + 1) * self.columns].fill_((2**unread - 1) / 2)
            for plane in range(1, self.read_planes):
                part.add_(codes[..., plane, :, :] >> share & 1, alpha=2 ** (self.stored - 1 - plane))
            part.mul_(1 - 2 * (codes[..., 0, :, :] >> share & 1).to(torch.int8))
