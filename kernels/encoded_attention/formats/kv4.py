"""KV4: 4 bits, a scale per token and head (QServe, Lin et al. 2024, arXiv 2405.04532, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtier.kernels.encoded_attention.formats.uniform import UniformFormat

__all__ = ["Kv4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kv4(UniformFormat):
    """All channels of a token share a scale.

    Published code stores the zero point ``-minimum / scale``, which overflows fp16 where a token's range is small
    against its offset; the minimum itself takes the same two bytes and does not. Smoothing of the keys is left to
    whoever encodes.
    """

    name: ClassVar[str] = "kv4"

    @property
    def bits(self) -> int:
        """Always 4."""
        return 4

    @property
    def token_group(self) -> int:
        """Each token by itself."""
        return 1

    @property
    def channel_group(self) -> int:
        """All of them."""
        return self.dim
