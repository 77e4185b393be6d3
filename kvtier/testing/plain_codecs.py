"""Codecs as plain as can be that keep every law: uniform planes, low rank, outliers and residual, smoothed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtier.core.codecs import LowRankCodec, OutlierCodec, PlaneCodec, RowCodec, SmoothingCodec
from kvtier.core.policy import CodecPolicy, Encoded
from kvtier.errors import InputError
from kvtier.testing.plain_bytes import HEAD_BYTES, as_bytes, head, parts, sizes

__all__ = ["PlainGear", "PlainLowRank", "PlainSmoothed", "PlainUniform"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainUniform(RowCodec, PlaneCodec):
    """``2**bits`` levels from the least to the greatest of ``group`` tokens of a channel, one byte a code.

    Parameters
    ----------
    bits : int
        1 to 8.
    group : int
        Consecutive tokens that share least and step; the last group may be shorter.
    """

    name: ClassVar[str] = "plain uniform"
    paper: ClassVar[str] = "none"
    bits: int = 4
    group: int = 8

    @property
    def uniform_bits(self) -> int | None:
        """As configured."""
        return self.bits

    @property
    def planes(self) -> int:
        """One a bit."""
        return self.bits

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least of a group, and its distance to the greatest [Hk, groups, D]."""
        groups = wide.split(self.group, dim=1)
        low = torch.stack([group.amin(1) for group in groups], 1)
        return low, torch.stack([group.amax(1) for group in groups], 1) - low

    def step(self, reach: torch.Tensor) -> torch.Tensor:
        """Distance of two levels of groups that reach so far."""
        return torch.where(reach > 0, reach / self.top, 1.0)

    def group_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The groups of tokens [n]."""
        return rows // self.group

    def encode(self, block: torch.Tensor) -> Encoded:
        """Codes as payload; sizes, least and step in the header."""
        wide = block.float()
        low, reach = self.span(wide)
        step = self.step(reach)
        groups = self.group_of(torch.arange(block.shape[1]))
        codes = ((wide - low[:, groups]) / step[:, groups]).round().clamp(0, self.top)
        return Encoded(as_bytes(codes.to(torch.uint8)), head(block) + as_bytes(low, step))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """All rows by all planes."""
        return self._decoded(encoded, None, self.bits)

    def decode_rows(self, encoded: Encoded, rows: torch.Tensor) -> torch.Tensor:
        """Rows by all planes."""
        return self._decoded(encoded, rows, self.bits)

    def decode_planes(self, encoded: Encoded, planes: int) -> torch.Tensor:
        """All rows; what is left open comes back as its middle."""
        return self._decoded(encoded, None, planes)

    def middle(self, unread: int) -> float:
        """What stands for bits that are not read."""
        return ((1 << unread) - 1) / 2

    def _decoded(self, encoded: Encoded, rows: torch.Tensor | None, planes: int) -> torch.Tensor:
        shape, dtype = sizes(encoded)
        low, step = self._scales(encoded)
        rows = torch.arange(shape[1]) if rows is None else rows
        groups, unread = self.group_of(rows), self.bits - planes
        (codes,) = parts(encoded.payload, (torch.uint8, shape))
        kept = (codes[:, rows] >> unread << unread).float() + self.middle(unread)
        return (kept * step[:, groups] + low[:, groups]).to(dtype)

    def _scales(self, encoded: Encoded) -> Iterator[torch.Tensor]:
        (heads, tokens, dim), _ = sizes(encoded)
        shape = (heads, -(-tokens // self.group), dim)
        return parts(encoded.header[HEAD_BYTES:], (torch.float32, shape), (torch.float32, shape))

    def error_bound(self, encoded: Encoded) -> float:
        """Half of the largest step."""
        _, step = self._scales(encoded)
        return float(step.max()) / 2

    def plane_bound(self, encoded: Encoded, planes: int) -> float:
        """Twice as much for each plane that is left out."""
        return self.error_bound(encoded) * (1 << self.bits - planes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLowRank(LowRankCodec):
    """The first ``rank`` singular values and vectors of each head in fp32, or the block where that is less."""

    name: ClassVar[str] = "plain low rank"
    paper: ClassVar[str] = "none"
    rank: int = 2

    def at_rank(self, rank: int) -> CodecPolicy:
        """Of the same class."""
        return type(self)(rank=rank)

    def kept(self, most: int) -> int:
        """Singular values that are kept of ``most``."""
        return min(self.rank, most)

    def factors(self, wide: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors [Hk, T, rank] and [Hk, rank, D]: the best ones."""
        return low_rank_factors(wide, rank)

    def encode(self, block: torch.Tensor) -> Encoded:
        """Factors, or the block; the largest error in the header."""
        left, right = self.factors(block.float(), self.kept(min(block.shape[1:])))
        payload, raw = as_bytes(left, right), as_bytes(block)
        if len(payload) >= len(raw):
            return Encoded(raw, head(block) + as_bytes(torch.tensor([0, 0.0])))
        error = (left @ right - block.float()).abs().max()
        return Encoded(payload, head(block) + as_bytes(torch.tensor([left.shape[2], float(error)])))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The product of the factors, or the block."""
        (heads, tokens, dim), dtype = sizes(encoded)
        rank = int(self._told(encoded)[0])
        if not rank:
            return next(parts(encoded.payload, (dtype, (heads, tokens, dim))))
        shapes = (heads, tokens, rank), (heads, rank, dim)
        left, right = parts(encoded.payload, *((torch.float32, shape) for shape in shapes))
        return (left @ right).to(dtype)

    def error_bound(self, encoded: Encoded) -> float:
        """The error itself."""
        return float(self._told(encoded)[1])

    def _told(self, encoded: Encoded) -> torch.Tensor:
        return next(parts(encoded.header[HEAD_BYTES:], (torch.float32, (2,))))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainGear(OutlierCodec):
    """Outliers apart, uniform codes of the rest, a low rank of what those miss (GEAR, Kang et al. 2024, 2403.05527).

    Parameters
    ----------
    pairs : int
        Outliers of a channel: so many of the largest and as many of the smallest.
    rank : int
        Of the residual.
    """

    name: ClassVar[str] = "plain gear"
    paper: ClassVar[str] = "GEAR, Kang et al. 2024, arXiv 2403.05527, section 3"
    bits: int = 2
    pairs: int = 1
    rank: int = 1

    @property
    def backbone(self) -> CodecPolicy:
        """One group a channel."""
        return PlainUniform(bits=self.bits, group=1 << 16)

    def outlier_count(self, tokens: int, dim: int) -> int:
        """As many whatever the length."""
        del tokens
        return 2 * self.pairs * dim

    def places(self, block: torch.Tensor) -> torch.Tensor:
        """Tokens of the outliers of each channel [Hk, 2 * pairs, D]."""
        order = block.float().argsort(dim=1, stable=True)
        return torch.cat([order[:, : self.pairs], order[:, block.shape[1] - self.pairs :]], dim=1)

    def remainder(self, block: torch.Tensor) -> torch.Tensor:
        """Outliers replaced by the mean of their channel."""
        mean = block.float().mean(1, keepdim=True).to(block.dtype)
        places = self.places(block)
        return block.scatter(1, places, mean.expand(-1, places.shape[1], -1))

    def residual(self, rest: torch.Tensor, coded: Encoded) -> torch.Tensor:
        """What the backbone misses of the remainder."""
        return rest.float() - self.backbone.decode(coded).float()

    def encode(self, block: torch.Tensor) -> Encoded:
        """Codes, factors, then places and values of outliers."""
        if min(block.shape[1:]) < 16:
            raise InputError(f"{self.name}: factors need at least 16 tokens and channels, got {list(block.shape[1:])}")
        rest = self.remainder(block)
        coded = self.backbone.encode(rest)
        factors = low_rank_factors(self.residual(rest, coded), self.rank)
        places = self.places(block)
        payload = coded.payload + as_bytes(*factors, places.to(torch.uint8), block.gather(1, places))
        draft = Encoded(payload, head(block) + as_bytes(torch.zeros(1)) + coded.header)
        error = (self.decode(draft).float() - block.float()).abs().max()
        return Encoded(payload, head(block) + as_bytes(error[None]) + coded.header)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The sum of all three, and the outliers as they were."""
        coded, rest = self._split(encoded)
        left, right, places, values = rest
        wide = self.backbone.decode(coded).float() + left @ right
        return wide.to(values.dtype).scatter(1, places.long(), values)

    def outliers(self, encoded: Encoded) -> torch.Tensor:
        """Where they are."""
        shape, _ = sizes(encoded)
        places = self._split(encoded)[1][2].long()
        return torch.zeros(shape, dtype=torch.bool).scatter(1, places, value=True)

    def error_bound(self, encoded: Encoded) -> float:
        """The error itself."""
        return float(next(parts(encoded.header[HEAD_BYTES:], (torch.float32, (1,)))))

    def _split(self, encoded: Encoded) -> tuple[Encoded, list[torch.Tensor]]:
        (heads, tokens, dim), dtype = sizes(encoded)
        codes = heads * tokens * dim
        coded = Encoded(encoded.payload[:codes], encoded.header[HEAD_BYTES + 4 :])
        left, right = (heads, tokens, self.rank), (heads, self.rank, dim)
        factors = 4 * heads * (tokens + dim) * self.rank
        each = (len(encoded.payload) - codes - factors) // (heads * dim * (1 + dtype.itemsize))
        apart = (heads, each, dim)
        likes = ((torch.float32, left), (torch.float32, right), (torch.uint8, apart), (dtype, apart))
        return coded, list(parts(encoded.payload[codes:], *likes))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSmoothed(SmoothingCodec):
    """Uniform codes of keys divided by the root of their channel's largest (QServe, 2405.04532, section 4.2)."""

    name: ClassVar[str] = "plain smoothed"
    paper: ClassVar[str] = "QServe, Lin et al. 2024, arXiv 2405.04532, section 4.2"
    bits: int = 4

    @property
    def coder(self) -> PlainUniform:
        """What writes the smooth keys."""
        return PlainUniform(bits=self.bits)

    def smoothing(self, keys: torch.Tensor) -> torch.Tensor:
        """The same for both channels of a pair."""
        largest = keys.float().abs().amax(1)
        half = largest.shape[1] // 2
        tied = torch.maximum(largest[:, :half], largest[:, half:]).repeat(1, 2)
        return torch.where(tied > 0, tied, 1.0).sqrt()

    def encode(self, block: torch.Tensor) -> Encoded:
        """The codes of smooth keys; the factors in the header."""
        factors = self.smoothing(block)
        coded = self.coder.encode(block.float() / factors[:, None])
        return Encoded(coded.payload, head(block) + as_bytes(factors) + coded.header)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """The keys themselves again."""
        factors, coded = self._split(encoded)
        return (self.coder.decode(coded) * factors[:, None]).to(sizes(encoded)[1])

    def error_bound(self, encoded: Encoded) -> float:
        """That of the smooth keys times the largest factor."""
        factors, coded = self._split(encoded)
        return self.coder.error_bound(coded) * float(factors.max())

    def _split(self, encoded: Encoded) -> tuple[torch.Tensor, Encoded]:
        (heads, _, dim), _ = sizes(encoded)
        start = HEAD_BYTES + 4 * heads * dim
        factors = next(parts(encoded.header[HEAD_BYTES:], (torch.float32, (heads, dim))))
        return factors, Encoded(encoded.payload, encoded.header[start:])


def low_rank_factors(wide: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors [Hk, T, rank] and [Hk, rank, D] of each head."""
    left, values, right = torch.linalg.svd(wide.double(), full_matrices=False)
    return (left[:, :, :rank] * values[:, None, :rank]).float(), right[:, :rank].float()
