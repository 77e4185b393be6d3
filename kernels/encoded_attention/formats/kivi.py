"""KIVI: 2 or 4 bits, keys by channel and values by token (Liu et al. 2024, arXiv 2402.02750, section 3)."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from kvtier.errors import ConfigError
from kvtier.kernels.encoded_attention.formats.base import BlockFormat
from kvtier.kernels.encoded_attention.formats.uniform import UniformFormat

__all__ = ["KiviKeys", "KiviValues"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kivi(UniformFormat, ABC):
    bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ConfigError(f"{self.name}: bits must be 2, 4 or 8, got {self.bits!r}")
        BlockFormat.__post_init__(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviKeys(_Kivi):
    """``group`` consecutive tokens of one channel share a scale.

    Parameters
    ----------
    bits : int
        Of a code: 2, 4 or 8.
    group : int
        Tokens, a divisor of ``slots``; the paper's 32.
    """

    name: ClassVar[str] = "kivi keys"

    @property
    def token_group(self) -> int:
        """As configured."""
        return self.group

    @property
    def channel_group(self) -> int:
        """Each channel by itself."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviValues(_Kivi):
    """``group`` consecutive channels of one token share a scale.

    Parameters
    ----------
    bits : int
        Of a code: 2, 4 or 8.
    group : int
        Channels, a divisor of ``dim``; the paper's 32.
    """

    name: ClassVar[str] = "kivi values"

    @property
    def token_group(self) -> int:
        """Each token by itself."""
        return 1

    @property
    def channel_group(self) -> int:
        """As configured."""
        return self.group
