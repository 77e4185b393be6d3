"""What the laws of codecs draw: sealed blocks, of sizes that a codec accepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvtier.core.policy import CodecPolicy, Encoded
from kvtier.errors import KVTierError
from kvtier.testing.draws import DTYPES, draw_values, table
from kvtier.testing.law import require

__all__ = ["BlockCase", "any_blocks", "blocks", "level_block", "smallest_side", "through"]

_SLACK = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # relative, of the block's largest element


@dataclass(frozen=True)
class BlockCase:
    """K or V of one sealed block [Hk, block_tokens, D]."""

    block: torch.Tensor

    @property
    def slack(self) -> float:
        """Rounding of the elements' own type."""
        largest = float(self.block.abs().max()) if self.block.numel() else 0.0
        return _SLACK[self.block.dtype] * largest + 1e-6

    @property
    def wide(self) -> BlockCase:
        """The same elements in fp32, for laws that ask for more than the rounding of bf16 leaves."""
        return BlockCase(self.block.float())

    def describe(self) -> str:
        """The case in words."""
        heads, tokens, dim = self.block.shape
        return f"{heads} KV heads, {tokens} tokens, {dim} channels, {self.block.dtype}; {table('values', self.block)}"


@st.composite
def blocks(draw: st.DrawFn, *, side: int, lengths: tuple[int, ...] = ()) -> BlockCase:
    """Blocks of ``side`` or twice as many tokens (or of one of ``lengths``) and channels.

    Some are constant in one direction or both; values are small or large.
    """
    heads, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    tokens, dim = draw(st.sampled_from(lengths or (side, 2 * side))), draw(st.sampled_from([side, 2 * side]))
    block = draw_values(draw, (heads, tokens, dim))
    same = draw(st.sampled_from(["nothing", "channels", "tokens", "block"]))
    if same == "channels":
        block = block[:, :1].expand_as(block)
    elif same == "tokens":
        block = block[:, :, :1].expand_as(block)
    elif same == "block":
        block = block[:, :1, :1].expand_as(block)
    return BlockCase((block * draw(st.sampled_from([1, 1024]))).to(dtype).contiguous())


def any_blocks(suite: object, policy: CodecPolicy) -> st.SearchStrategy[BlockCase]:
    """Blocks of the smallest size that a codec accepts, and of twice that."""
    del suite
    return blocks(side=smallest_side(policy))


def smallest_side(policy: CodecPolicy) -> int:
    """The smallest of 4, 8, ... 128 tokens and channels of a block that a codec accepts."""
    return next((side for side in (4, 8, 16, 32, 64) if accepts(policy, side, side)), 128)


def accepts(policy: CodecPolicy, tokens: int, dim: int) -> bool:
    """Whether a codec takes blocks of this size."""
    try:
        policy.encode(torch.ones(1, tokens, dim))
    except KVTierError:
        return False
    return True


def through(policy: CodecPolicy, block: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
    """A block encoded, and decoded from a copy of its bytes.

    Raises
    ------
    LawBroken
        When encoding changed the block.
    """
    before = block.clone()
    encoded = policy.encode(block)
    require(torch.equal(block, before), "encoding changed the block")
    return encoded, policy.decode(Encoded(bytes(encoded.payload), bytes(encoded.header)))


def level_block(bits: int, side: int, seed: int) -> torch.Tensor:
    """Values 0 to 2**bits - 1, with both ends in any four consecutive tokens of a channel or channels of a token."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (1, side, side), generator=random)
    diagonal = torch.arange(side)[:, None] + torch.arange(side)[None]
    values = values.masked_fill(diagonal % 4 == 0, 0)
    return values.masked_fill(diagonal % 4 == 2, 2**bits - 1).float()
