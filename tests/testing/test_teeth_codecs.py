"""Teeth of the codec laws: each bug of published code, made on purpose, and the law that catches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch

from kvtier.core.policy import (
    CodecPolicy,
    Encoded,
    Policy,
)
from kvtier.testing.check import check_policy

EXAMPLES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(CodecPolicy):
    """Asymmetric min-max codes of each channel of a block; right."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "none"
    bits: int = 3

    @property
    def uniform_bits(self) -> int | None:
        return self.bits

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def step(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Distance of two levels."""
        return torch.where(high > low, (high - low) / self.top, 1.0)

    def encode(self, block: torch.Tensor) -> Encoded:
        wide = block.float()
        low, high = self.span(wide)
        step = self.step(low, high)
        codes = ((wide - low) / step).round().clamp(0, self.top).nan_to_num().to(torch.uint8)
        name = {torch.float32: b"f", torch.bfloat16: b"b"}[block.dtype]
        scales = torch.cat([low, step], dim=1).numpy().tobytes()
        shape = np.array(block.shape, dtype=np.int64).tobytes()
        return Encoded(codes.numpy().tobytes(), name + shape + scales)

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and largest of each channel [Hk, 1, D]."""
        return wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        heads, tokens, dim = np.frombuffer(encoded.header[1:25], dtype=np.int64).tolist()
        scales = torch.frombuffer(bytearray(encoded.header[25:]), dtype=torch.float32).view(heads, 2, dim)
        codes = torch.frombuffer(bytearray(encoded.payload), dtype=torch.uint8).view(heads, tokens, dim)
        wide = codes * scales[:, 1:] + scales[:, :1]
        return wide.to(torch.bfloat16 if encoded.header[:1] == b"b" else torch.float32)

    def error_bound(self, encoded: Encoded) -> float:
        heads, _, dim = np.frombuffer(encoded.header[1:25], dtype=np.int64).tolist()
        scales = np.frombuffer(encoded.header[25:], dtype=np.float32).reshape(heads, 2, dim)
        return float(scales[:, 1].max()) / 2


class SquaredLevels(Uniform):
    """GEAR: ``bits ** 2 - 1`` levels; 3 bits need a code of 8, and 8 bits use only 64 of 256."""

    @property
    def top(self) -> int:
        return self.bits**2 - 1


class DividesByTheRange(Uniform):
    """KIVI, GEAR, QServe: a group without range is divided by it."""

    def step(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low) / self.top

    def encode(self, block: torch.Tensor) -> Encoded:
        encoded = super().encode(block)
        low, high = self.span(block.float())
        scales = torch.cat([low, torch.where(high > low, self.step(low, high), torch.nan)], dim=1)
        return Encoded(encoded.payload, encoded.header[:25] + scales.numpy().tobytes())


@dataclass(frozen=True, kw_only=True)
class CodesHistoryAgain(Uniform):
    """HF's quantised cache: the span of all that was ever coded sets the levels of every block."""

    seen: list[float] = field(default_factory=lambda: [0.0])

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen[0] = max(self.seen[0], float(wide.abs().max()))
        high = torch.full_like(wide[:, :1], self.seen[0])
        return -high, high


class LeaksRowZero(Uniform):
    """GEAR's CUDA path: the factors of row 0 are used for every row."""

    def span(self, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().span(wide)
        return low[:1].expand_as(low).contiguous(), high[:1].expand_as(high).contiguous()


class Grows(Uniform):
    """Factors of tiny blocks cost more than the block."""

    def encode(self, block: torch.Tensor) -> Encoded:
        encoded = super().encode(block)
        return Encoded(encoded.payload + bytes(2 * block.nbytes), encoded.header)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        shape = np.frombuffer(encoded.header[1:25], dtype=np.int64)
        return super().decode(Encoded(encoded.payload[: int(shape.prod())], encoded.header))


def test_a_right_codec_breaks_no_law() -> None:
    for bits in (1, 3, 8):
        verdicts = list(check_policy(Uniform(bits=bits), examples=EXAMPLES))

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
