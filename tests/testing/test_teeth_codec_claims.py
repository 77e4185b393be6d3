"""Teeth of the laws of what codecs claim, C9 to C16: bugs made on purpose, and the law that catches each."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch

from kvtier.core.policy import CodecPolicy, Encoded, Policy
from kvtier.testing.check import check_policy
from kvtier.testing.plain_bytes import HEAD_BYTES, parts, sizes
from kvtier.testing.plain_codecs import PlainGear, PlainLowRank, PlainSmoothed, PlainUniform

EXAMPLES = 30


class ReadsFromTheGroupOn(PlainUniform):
    """Rows are counted from the beginning of the group that holds the first of them."""

    def decode_rows(self, encoded: Encoded, rows: torch.Tensor) -> torch.Tensor:
        start = int(rows[0]) // self.group * self.group if rows.numel() else 0
        return self.decode(encoded)[:, start : start + rows.numel()]


class OneRankLess(PlainLowRank):
    """``range(1, rank)``."""

    def kept(self, most: int) -> int:
        return min(self.rank, most) - (self.rank > 1)


class KeepsTheSmallest(PlainLowRank):
    """Eigenvalues come in ascending order, singular values in descending order."""

    def factors(self, wide: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = super().factors(wide, min(wide.shape[1:]))
        return left[:, :, -rank:].contiguous(), right[:, -rank:].contiguous()


class Iterates(PlainLowRank):
    """Power iteration from a start that is the same every time; right."""

    excess: ClassVar[float] = 1.0

    def start(self, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def factors(self, wide: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        base = self.start((wide.shape[2], rank))
        for _ in range(4):
            base = torch.linalg.qr(wide.double().mT @ torch.linalg.qr(wide.double() @ base).Q).Q
        return (wide.double() @ base).float(), base.mT.float().contiguous()


class StartsAnywhere(Iterates):
    """GEAR: power iteration from an unseeded start."""

    def start(self, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)


class LosesTheOddOne(PlainGear):
    """GEAR: half of the outliers at each end, of a number that follows the length and may be odd."""

    def outlier_count(self, tokens: int, dim: int) -> int:
        return tokens // 4 * dim

    def places(self, block: torch.Tensor) -> torch.Tensor:
        order, each = block.float().argsort(dim=1, stable=True), block.shape[1] // 4 // 2
        return torch.cat([order[:, :each], order[:, block.shape[1] - each :]], dim=1)


class CountsHeadsAndChannels(PlainGear):
    """GEAR: keys have outliers along their tokens, and their number is a share of heads times channels."""

    def places(self, block: torch.Tensor) -> torch.Tensor:
        order, each = block.float().argsort(dim=1, stable=True), block.shape[0] * block.shape[2] // 16
        return torch.cat([order[:, :each], order[:, block.shape[1] - each :]], dim=1)


class CorrectsOutliersToo(PlainGear):
    """The low rank of the residual is added to outliers, which were exact."""

    def decode(self, encoded: Encoded) -> torch.Tensor:
        left, right, *_ = self._split(encoded)[1]
        apart = self.outliers(encoded)
        exact = super().decode(encoded)
        return torch.where(apart, (exact.float() + left @ right).to(exact.dtype), exact)


class ForgetsTheStep(PlainGear):
    """GEAR: the residual is that of the codes themselves, without step and minimum."""

    def residual(self, rest: torch.Tensor, coded: Encoded) -> torch.Tensor:
        (codes,) = parts(coded.payload, (torch.uint8, sizes(coded)[0]))
        return rest.float() - codes.float()


class PromisesMoreOfLess(PlainUniform):
    """The declared bound grows with the planes that are read."""

    def plane_bound(self, encoded: Encoded, planes: int) -> float:
        return self.error_bound(encoded) * 2**planes


class LeavesZeros(PlainUniform):
    """Bits that are not read are taken for 0, at the edge of what they may be."""

    def middle(self, unread: int) -> float:
        del unread
        return 0.0


class ReadsOneLess(PlainUniform):
    """All planes are one less than there are."""

    def decode_planes(self, encoded: Encoded, planes: int) -> torch.Tensor:
        return super().decode_planes(encoded, max(1, planes - 1))


class SmoothsChannelsAlone(PlainSmoothed):
    """Both channels of a pair that turns together have a factor of their own."""

    def smoothing(self, keys: torch.Tensor) -> torch.Tensor:
        largest = keys.float().abs().amax(1)
        return torch.where(largest > 0, largest, 1.0).sqrt()


class PairsNeighbours(PlainSmoothed):
    """Ties channels (2 i, 2 i + 1), and the model turns (i, i + D/2)."""

    def smoothing(self, keys: torch.Tensor) -> torch.Tensor:
        largest = keys.float().abs().amax(1).unflatten(1, (-1, 2)).amax(2).repeat_interleave(2, 1)
        return torch.where(largest > 0, largest, 1.0).sqrt()


class SmoothsNothingAway(PlainSmoothed):
    """A channel of zeros has the factor 0."""

    def smoothing(self, keys: torch.Tensor) -> torch.Tensor:
        largest = keys.float().abs().amax(1)
        half = largest.shape[1] // 2
        return torch.maximum(largest[:, :half], largest[:, half:]).repeat(1, 2).sqrt()


class RoundsTheZeroPoint(PlainUniform):
    """The least of a group is a whole number of steps."""

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, reach = super().span(wide)
        step = self.step(reach)
        return (low / step).round() * step, reach


class PromisesTheMean(PlainUniform):
    """The declared error is that of the average group."""

    def error_bound(self, encoded: Encoded) -> float:
        (heads, tokens, dim), _ = sizes(encoded)
        shape = (heads, -(-tokens // self.group), dim)
        _, step = parts(encoded.header[HEAD_BYTES:], (torch.float32, shape), (torch.float32, shape))
        return float(step.mean()) / 4


def test_an_iteration_from_a_fixed_start_breaks_no_law() -> None:
    verdicts = list(check_policy(Iterates(), examples=EXAMPLES))

    assert not [verdict for verdict in verdicts if verdict.holds is False]


@pytest.mark.parametrize(
    ("right", "claims"),
    [
        (PlainUniform(), {"C9", "C13", "C15", "C16"}),
        (PlainLowRank(), {"C10", "C16"}),
        (PlainGear(), {"C11", "C12", "C16"}),
        (PlainSmoothed(), {"C14", "C16"}),
    ],
    ids=lambda value: value.name if isinstance(value, CodecPolicy) else "",
)
def test_what_a_codec_does_not_claim_is_skipped_with_the_reason(right: CodecPolicy, claims: set[str]) -> None:
    laws = [f"C{number}" for number in range(9, 17)]
    verdicts = {verdict.code: verdict for verdict in check_policy(right, examples=1, only=laws)}

    assert {code for code, verdict in verdicts.items() if verdict.holds} == claims
    assert all(verdicts[code].found.startswith(right.name + " ") for code in set(laws) - claims)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (ReadsFromTheGroupOn(), "C9", r"tokens \[.*\] come back otherwise than in the whole block"),
        (OneRankLess(), "C10", r"rank 2 of head 0 leaves .* the singular values after it"),
        (KeepsTheSmallest(), "C10", r"rank 1 of head 0 leaves .* the singular values after it"),
        (StartsAnywhere(), "C10", r"(writes the same block in two ways|once broken, once not)"),
        (LosesTheOddOne(), "C11", r"outliers of KV head 0 are kept, \d+ are declared"),
        (CountsHeadsAndChannels(), "C11", r"outliers of KV head 0 are kept, \d+ are declared"),
        (CorrectsOutliersToo(), "C11", r"an outlier comes back off by"),
        (ForgetsTheStep(), "C12", r"KV head 0 is off by .*, its backbone alone by"),
        (PromisesMoreOfLess(), "C13", r"2 planes declare .*, one less"),
        (LeavesZeros(), "C13", r"with \d planes an element is off by"),
        (ReadsOneLess(), "C13", r"all 4 planes are not what the block decodes to"),
        (SmoothsChannelsAlone(), "C14", r"a product of .* at most is off by"),
        (PairsNeighbours(), "C14", r"a product of .* at most is off by"),
        (SmoothsNothingAway(), "C14", r"a factor is 0, not more than 0"),
        (RoundsTheZeroPoint(), "C15", r"comes back off by .* from what x does"),
        (PromisesTheMean(), "C16", r"a logit is off by .* an element allows"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else "",
)
def test_wrong_claims_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
