"""The formats of encoded blocks keep the laws of codecs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from kvtier.core.codecs import PlaneCodec
from kvtier.core.policy import CodecPolicy, Encoded
from kvtier.kernels.encoded_attention.formats import BitPlanes, BlockFormat, Fp8, Int8, KiviKeys, KiviValues, Kv4
from kvtier.testing.codec_claim_laws import CodecClaimLaws
from kvtier.testing.codec_laws import CodecLaws
from kvtier.testing.plain_bytes import head, sizes


@dataclass(frozen=True, kw_only=True)
class Format(CodecPolicy):
    """A format of blocks as a codec: each head is a block, and its bytes are the payload.

    Parameters
    ----------
    half_step : callable
        The largest error of an element, from the largest scale.
    """

    name: ClassVar[str] = "format"
    paper: ClassVar[str] = "none"
    layout: BlockFormat
    uniform: int | None = None
    half_step: Callable[[float], float] = lambda scale: scale / 2

    @property
    def uniform_bits(self) -> int | None:
        return self.uniform

    def sized(self, tokens: int, dim: int) -> BlockFormat:
        return replace(self.layout, slots=tokens, dim=dim)

    def encode(self, block: torch.Tensor) -> Encoded:
        written = self.sized(*block.shape[1:]).encode(block)
        return Encoded(written.numpy().tobytes(), head(block))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        (_, tokens, dim), dtype = sizes(encoded)
        return self.sized(tokens, dim).decode(self.written(encoded)).to(dtype)

    def written(self, encoded: Encoded) -> torch.Tensor:
        (heads, *_), _ = sizes(encoded)
        return torch.frombuffer(bytearray(encoded.payload), dtype=torch.uint8).view(heads, -1)

    def error_bound(self, encoded: Encoded) -> float:
        (_, tokens, dim), _ = sizes(encoded)
        layout = self.sized(tokens, dim)
        count = layout.groups[0] * layout.groups[1] * layout.scale_dtype.itemsize
        scales = self.written(encoded)[:, :count].contiguous().view(layout.scale_dtype)
        return self.half_step(float(scales.max()))


@dataclass(frozen=True, kw_only=True)
class Planes(Format, PlaneCodec):
    """Bit planes, of which the first are decoded from the beginning of a block, the rest being noise."""

    layout: BitPlanes

    @property
    def planes(self) -> int:
        return self.layout.stored

    def decode_planes(self, encoded: Encoded, planes: int) -> torch.Tensor:
        (_, tokens, dim), dtype = sizes(encoded)
        layout = replace(self.layout, slots=tokens, dim=dim, planes=planes)
        written = self.written(encoded).clone()
        written[:, layout.read_bytes :] = 0xA5
        return layout.decode(written).to(dtype)

    def plane_bound(self, encoded: Encoded, planes: int) -> float:
        return self.error_bound(encoded) * 2 ** (self.planes - planes)


SIZES = {"slots": 16, "dim": 16}
CODECS = [
    Format(layout=KiviKeys(**SIZES, bits=2, group=4), uniform=2),
    Format(layout=KiviValues(**SIZES, bits=4, group=8), uniform=4),
    Format(layout=Kv4(**SIZES), uniform=4),
    Format(layout=Int8(**SIZES)),
    # Beyond half of the largest, e4m3 is 32 units apart.
    Format(layout=Fp8(**SIZES), half_step=lambda scale: 16 * scale),
    Planes(layout=BitPlanes(**SIZES, stored=6)),
]


@pytest.fixture(params=CODECS, ids=lambda codec: repr(codec.layout).replace("slots=16, dim=16, ", ""))
def policy(request: pytest.FixtureRequest) -> CodecPolicy:
    codec: CodecPolicy = request.param
    return codec


class TestFormats(CodecLaws, CodecClaimLaws):
    @pytest.fixture
    def policy(self, policy: CodecPolicy) -> CodecPolicy:
        return policy
