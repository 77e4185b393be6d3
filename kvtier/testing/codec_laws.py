"""The laws of codecs: subclass `CodecLaws` in a test file and they run on your codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvtier.core.policy import CodecPolicy, Encoded
from kvtier.errors import KVTierError
from kvtier.testing.draws import DTYPES, draw_values, table
from kvtier.testing.law import PolicyLaws, claimed, law, require

__all__ = ["BlockCase", "CodecLaws", "blocks", "smallest_side"]

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

    def describe(self) -> str:
        """The case in words."""
        heads, tokens, dim = self.block.shape
        return f"{heads} KV heads, {tokens} tokens, {dim} channels, {self.block.dtype}; {table('values', self.block)}"


@st.composite
def blocks(draw: st.DrawFn, *, side: int) -> BlockCase:
    """Blocks of ``side`` or twice as many tokens and channels, some constant, of small or large values."""
    heads, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    tokens, dim = draw(st.sampled_from([side, 2 * side])), draw(st.sampled_from([side, 2 * side]))
    block = draw_values(draw, (heads, tokens, dim))
    same = draw(st.sampled_from(["nothing", "channels", "tokens", "block"]))
    if same == "channels":
        block = block[:, :1].expand_as(block)
    elif same == "tokens":
        block = block[:, :, :1].expand_as(block)
    elif same == "block":
        block = block[:, :1, :1].expand_as(block)
    return BlockCase((block * draw(st.sampled_from([1, 1024]))).to(dtype).contiguous())


def smallest_side(policy: CodecPolicy) -> int:
    """The smallest of 4, 8, ... 128 tokens and channels of a block that a codec accepts."""
    return next((side for side in (4, 8, 16, 32, 64) if _accepts(policy, side)), 128)


def _accepts(policy: CodecPolicy, side: int) -> bool:
    try:
        policy.encode(torch.ones(1, side, side))
    except KVTierError:
        return False
    return True


def _blocks(suite: CodecLaws, policy: CodecPolicy) -> st.SearchStrategy[BlockCase]:
    del suite
    return blocks(side=smallest_side(policy))


class CodecLaws(PolicyLaws):
    """What every codec keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyCodec(CodecLaws):
            @pytest.fixture
            def policy(self) -> CodecPolicy:
                return MyCodec(bits=4)
    """

    @law("C1", "what comes back is finite and within the declared error", case=_blocks)
    def test_errors_are_within_the_bound(self, policy: CodecPolicy, case: BlockCase) -> None:
        encoded, decoded = _through(policy, case.block)
        require(bool(decoded.isfinite().all()), f"{int((~decoded.isfinite()).sum())} elements are not finite")
        bound = policy.error_bound(encoded)
        error = float((decoded.double() - case.block.double()).abs().max())
        require(error <= bound + case.slack, f"an element is off by {error:g}; the codec declares at most {bound:g}")

    @law("C2", "a block without range comes back as it is", case=_blocks)
    def test_zero_range_is_exact(self, policy: CodecPolicy, case: BlockCase) -> None:
        flat = BlockCase(case.block[:, :1, :1].expand_as(case.block).contiguous())
        _, decoded = _through(policy, flat.block)
        require(bool(decoded.isfinite().all()), "all elements of a head are equal, and what comes back is not finite")
        error = float((decoded.double() - flat.block.double()).abs().max())
        require(error <= flat.slack, f"all elements of a head are equal, and one comes back off by {error:g}")

    @law("C3", "b bits have 2**b levels: a block of those levels comes back as it is", seed=st.integers(0, 99))
    def test_all_levels_are_used(self, policy: CodecPolicy, seed: int) -> None:
        bits = policy.uniform_bits or 0
        claimed(bits > 0, f"{policy.name} declares no uniform code")
        block = _levels(bits, smallest_side(policy), seed)
        _, decoded = _through(policy, block)
        used = decoded.unique().numel()
        require(used <= 2**bits, f"{bits} bits came back with {used} different values, at most {2**bits} can be coded")
        error = float((decoded.double() - block.double()).abs().max())
        require(
            error <= 1e-3, f"of the {2**bits} levels 0 to {2**bits - 1} that {bits} bits have one is off by {error:g}"
        )

    @law("C4", "the payload of a block is never larger than its raw bytes", case=_blocks)
    def test_blocks_do_not_grow(self, policy: CodecPolicy, case: BlockCase) -> None:
        encoded = policy.encode(case.block)
        raw, taken = case.block.nbytes, len(encoded.payload)
        require(taken <= raw, f"a block of {raw} bytes takes {taken}; store it raw")

    @law("C5", "shape and type come back", case=_blocks)
    def test_shape_and_type_come_back(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, decoded = _through(policy, case.block)
        got, must = (f"{list(block.shape)} of {block.dtype}" for block in (decoded, case.block))
        require(got == must, f"{must} went in, {got} comes back")

    @law("C6", "coding what was decoded stays within the declared error", case=_blocks)
    def test_coding_again_stays_within_the_bound(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, decoded = _through(policy, case.block)
        encoded, again = _through(policy, decoded)
        error = float((again.double() - decoded.double()).abs().max())
        require(error <= policy.error_bound(encoded) + case.slack, f"the second time an element is off by {error:g}")

    @law(
        "C7",
        "the bytes of a sealed block do not depend on the blocks before or after it",
        case=_blocks,
        others=st.lists(st.integers(-4, 4), min_size=1, max_size=3),
    )
    def test_history_is_not_coded_again(self, policy: CodecPolicy, case: BlockCase, others: list[int]) -> None:
        first = policy.encode(case.block)
        before = policy.decode(first).clone()
        for other in others:
            policy.encode((case.block.float() * other + other).to(case.block.dtype))
        require(
            torch.equal(policy.decode(first), before), f"a sealed block reads otherwise after {len(others)} more blocks"
        )
        require(policy.encode(case.block) == first, f"the same block has other bytes after {len(others)} more blocks")

    @law("C8", "a KV head is coded the same in any company", case=_blocks)
    def test_heads_are_coded_alone(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, together = _through(policy, case.block)
        for head in range(case.block.shape[0]):
            _, alone = _through(policy, case.block[head : head + 1].contiguous())
            error = float((alone[0].double() - together[head].double()).abs().max())
            require(error <= case.slack, f"KV head {head} comes back {error:g} apart alone and in company")


def _through(policy: CodecPolicy, block: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
    before = block.clone()
    encoded = policy.encode(block)
    require(torch.equal(block, before), "encoding changed the block")
    return encoded, policy.decode(Encoded(bytes(encoded.payload), bytes(encoded.header)))


def _levels(bits: int, side: int, seed: int) -> torch.Tensor:
    """Values 0 to 2**bits - 1, with both ends in any four consecutive tokens of a channel or channels of a token."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (1, side, side), generator=random)
    diagonal = torch.arange(side)[:, None] + torch.arange(side)[None]
    values = values.masked_fill(diagonal % 4 == 0, 0)
    return values.masked_fill(diagonal % 4 == 2, 2**bits - 1).float()
