"""The laws of all codecs, C1 to C8: subclass `CodecLaws` in a test file and they run on your codec."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from kvtier.core.policy import CodecPolicy
from kvtier.testing.codec_cases import BlockCase, any_blocks, level_block, smallest_side, through
from kvtier.testing.law import PolicyLaws, claimed, law, require

__all__ = ["CodecLaws"]


class CodecLaws(PolicyLaws):
    """What every codec keeps; override the fixture ``policy``. `CodecClaimLaws` hold it to what it claims beyond that.

    Examples
    --------
    ::

        class TestMyCodec(CodecLaws, CodecClaimLaws):
            @pytest.fixture
            def policy(self) -> CodecPolicy:
                return MyCodec(bits=4)
    """

    @law("C1", "what comes back is finite and within the declared error", case=any_blocks)
    def test_errors_are_within_the_bound(self, policy: CodecPolicy, case: BlockCase) -> None:
        encoded, decoded = through(policy, case.block)
        require(bool(decoded.isfinite().all()), f"{int((~decoded.isfinite()).sum())} elements are not finite")
        bound = policy.error_bound(encoded)
        error = float((decoded.double() - case.block.double()).abs().max())
        require(error <= bound + case.slack, f"an element is off by {error:g}; the codec declares at most {bound:g}")

    @law("C2", "a block without range comes back as it is", case=any_blocks)
    def test_zero_range_is_exact(self, policy: CodecPolicy, case: BlockCase) -> None:
        flat = BlockCase(case.block[:, :1, :1].expand_as(case.block).contiguous())
        _, decoded = through(policy, flat.block)
        require(bool(decoded.isfinite().all()), "all elements of a head are equal, and what comes back is not finite")
        error = float((decoded.double() - flat.block.double()).abs().max())
        require(error <= flat.slack, f"all elements of a head are equal, and one comes back off by {error:g}")

    @law("C3", "b bits have 2**b levels: a block of those levels comes back as it is", seed=st.integers(0, 99))
    def test_all_levels_are_used(self, policy: CodecPolicy, seed: int) -> None:
        bits = policy.uniform_bits or 0
        claimed(bits > 0, f"{policy.name} declares no uniform code")
        block = level_block(bits, smallest_side(policy), seed)
        _, decoded = through(policy, block)
        used = decoded.unique().numel()
        require(used <= 2**bits, f"{bits} bits came back with {used} different values, at most {2**bits} can be coded")
        error = float((decoded.double() - block.double()).abs().max())
        require(
            error <= 1e-3, f"of the {2**bits} levels 0 to {2**bits - 1} that {bits} bits have one is off by {error:g}"
        )

    @law("C4", "the payload of a block is never larger than its raw bytes", case=any_blocks)
    def test_blocks_do_not_grow(self, policy: CodecPolicy, case: BlockCase) -> None:
        encoded = policy.encode(case.block)
        raw, taken = case.block.nbytes, len(encoded.payload)
        require(taken <= raw, f"a block of {raw} bytes takes {taken}; store it raw")

    @law("C5", "shape and type come back", case=any_blocks)
    def test_shape_and_type_come_back(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, decoded = through(policy, case.block)
        got, must = (f"{list(block.shape)} of {block.dtype}" for block in (decoded, case.block))
        require(got == must, f"{must} went in, {got} comes back")

    @law("C6", "coding what was decoded stays within the declared error", case=any_blocks)
    def test_coding_again_stays_within_the_bound(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, decoded = through(policy, case.block)
        encoded, again = through(policy, decoded)
        error = float((again.double() - decoded.double()).abs().max())
        require(error <= policy.error_bound(encoded) + case.slack, f"the second time an element is off by {error:g}")

    @law(
        "C7",
        "the bytes of a sealed block do not depend on the blocks before or after it",
        case=any_blocks,
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

    @law("C8", "a KV head is coded the same in any company", case=any_blocks)
    def test_heads_are_coded_alone(self, policy: CodecPolicy, case: BlockCase) -> None:
        _, together = through(policy, case.block)
        for head in range(case.block.shape[0]):
            _, alone = through(policy, case.block[head : head + 1].contiguous())
            error = float((alone[0].double() - together[head].double()).abs().max())
            require(error <= case.slack, f"KV head {head} comes back {error:g} apart alone and in company")
