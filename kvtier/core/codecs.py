"""What a codec may claim beyond `CodecPolicy`: a class for each claim, to subclass; laws C9 to C14 hold it to them."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from kvtier.core.policy import CodecPolicy, Encoded

__all__ = ["LowRankCodec", "OutlierCodec", "PlaneCodec", "RowCodec", "SmoothingCodec"]


class RowCodec(CodecPolicy):
    """Single tokens of a block can be read."""

    __slots__ = ()

    @abstractmethod
    def decode_rows(self, encoded: Encoded, rows: torch.Tensor) -> torch.Tensor:
        """Tokens ``rows`` [n] int64 of the block, in that order, as ``decode`` gives them: [Hk, n, D]."""


class LowRankCodec(CodecPolicy):
    """A head's block is written as two factors, or raw where those take more bytes.

    Attributes
    ----------
    excess : float
        Frobenius error beyond the least that a rank allows, as a share of it; 0 for an exact decomposition.
    """

    __slots__ = ()
    excess: ClassVar[float] = 0.0

    @abstractmethod
    def at_rank(self, rank: int) -> CodecPolicy:
        """The same codec with another rank, of at least 1."""


class OutlierCodec(CodecPolicy):
    """A few elements of each head are written apart and come back exactly; another codec writes the rest.

    Attributes
    ----------
    backbone : CodecPolicy
        What writes the block once its outliers are taken out.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def backbone(self) -> CodecPolicy:
        """What writes the remainder."""

    @abstractmethod
    def outlier_count(self, tokens: int, dim: int) -> int:
        """Outliers of one KV head in a block of ``tokens`` tokens of ``dim`` channels, whatever is in it."""

    @abstractmethod
    def outliers(self, encoded: Encoded) -> torch.Tensor:
        """Which elements were written apart [Hk, T, D] bool."""

    @abstractmethod
    def remainder(self, block: torch.Tensor) -> torch.Tensor:
        """What the backbone is given of a block [Hk, T, D]: the same shape, something milder in place of outliers."""


class PlaneCodec(CodecPolicy):
    """Codes lie in planes from the highest bit to the lowest; the first ones are a coarser block."""

    __slots__ = ()

    @property
    @abstractmethod
    def planes(self) -> int:
        """Planes that ``decode`` reads: all that are written."""

    @abstractmethod
    def decode_planes(self, encoded: Encoded, planes: int) -> torch.Tensor:
        """The block [Hk, T, D] by its first ``planes`` planes, of at least 1."""

    @abstractmethod
    def plane_bound(self, encoded: Encoded, planes: int) -> float:
        """Largest absolute error of one element of ``decode_planes``."""


class SmoothingCodec(CodecPolicy):
    """Keys are divided by a factor a channel before they are coded, and queries multiplied by it.

    The factors can be folded into the projections, before the rotation of channels (i, i + D/2) by position, only if
    both channels of a pair have the same.
    """

    __slots__ = ()

    @abstractmethod
    def smoothing(self, keys: torch.Tensor) -> torch.Tensor:
        """Factors [Hk, D], more than 0, for keys [Hk, T, D] as they are before rotation."""
