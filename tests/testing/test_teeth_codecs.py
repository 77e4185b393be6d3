"""Teeth of the laws of all codecs: each bug of published code, made on purpose, and the law that catches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch

from kvtier.core.policy import CodecPolicy, Encoded, Policy
from kvtier.testing.check import check_policy
from kvtier.testing.plain_codecs import PlainGear, PlainLowRank, PlainSmoothed, PlainUniform

EXAMPLES = 30


class SquaredLevels(PlainUniform):
    """GEAR: ``bits ** 2 - 1`` levels; 3 bits need a code of 8, and 8 bits use only 64 of 256."""

    @property
    def top(self) -> int:
        return self.bits**2 - 1


class DividesByTheRange(PlainUniform):
    """KIVI, GEAR, QServe: a group without range is divided by it."""

    def step(self, reach: torch.Tensor) -> torch.Tensor:
        return torch.where(reach > 0, reach / self.top, torch.nan)


@dataclass(frozen=True, kw_only=True)
class CodesHistoryAgain(PlainUniform):
    """HF's quantised cache: the span of all that was ever coded sets the levels of every block."""

    seen: list[float] = field(default_factory=lambda: [0.0])

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[0] = max(self.seen[0], float(wide.abs().max()))
        low, _ = super().span(wide)
        return torch.full_like(low, -self.seen[0]), torch.full_like(low, 2 * self.seen[0])


class LeaksRowZero(PlainUniform):
    """GEAR's CUDA path: the factors of row 0 are used for every row."""

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, reach = super().span(wide)
        return low[:1].expand_as(low).contiguous(), reach[:1].expand_as(reach).contiguous()


class Grows(PlainUniform):
    """Factors of tiny blocks cost more than the block."""

    def encode(self, block: torch.Tensor) -> Encoded:
        encoded = super().encode(block)
        return Encoded(encoded.payload + bytes(2 * block.nbytes), encoded.header)


@pytest.mark.parametrize(
    "right",
    [PlainUniform(bits=1), PlainUniform(bits=3), PlainUniform(bits=8), PlainLowRank(), PlainGear(), PlainSmoothed()],
    ids=repr,
)
def test_a_right_codec_breaks_no_law(right: CodecPolicy) -> None:
    verdicts = list(check_policy(right, examples=EXAMPLES))

    assert not [verdict for verdict in verdicts if verdict.holds is False]


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        (SquaredLevels(bits=3), "C3", r"(3 bits came back with 9 different values, at most 8|is off by)"),
        (SquaredLevels(bits=8), "C3", r"of the 256 levels 0 to 255 that 8 bits have one is off by"),
        (DividesByTheRange(), "C2", r"all elements of a head are equal, and what comes back is not finite"),
        (CodesHistoryAgain(), "C7", r"the same block has other bytes after 1 more blocks"),
        (LeaksRowZero(), "C8", r"KV head 1 comes back .* apart alone and in company"),
        (Grows(), "C4", r"a block of \d+ bytes takes \d+; store it raw"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Policy) else "",
)
def test_wrong_codecs_are_caught(wrong: Policy, code: str, words: str) -> None:
    (verdict,) = check_policy(wrong, examples=EXAMPLES, only=[code])

    assert verdict.holds is False
    assert re.search(words, verdict.found), verdict.found
