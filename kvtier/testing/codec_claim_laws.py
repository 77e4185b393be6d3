"""The laws of what a codec may claim, C9 to C16; those about what it does not claim are skipped."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from kvtier.core.codecs import LowRankCodec, OutlierCodec, PlaneCodec, RowCodec, SmoothingCodec
from kvtier.core.policy import CodecPolicy
from kvtier.testing.codec_cases import (
    BlockCase,
    accepts,
    any_blocks,
    blocks,
    level_block,
    smallest_side,
    through,
)
from kvtier.testing.law import PolicyLaws, claimed, law, require, unclaimed
from kvtier.testing.plain_slots import rotate
from kvtier.types import Rope

__all__ = ["CodecClaimLaws"]


def _any_length(suite: object, policy: CodecPolicy) -> st.SearchStrategy[BlockCase]:
    """Blocks of every number of tokens that a codec with outliers accepts."""
    if not isinstance(policy, OutlierCodec):
        return any_blocks(suite, policy)
    side = smallest_side(policy)
    lengths = (*range(side, side + 5), 2 * side)
    return blocks(side=side, lengths=tuple(length for length in lengths if accepts(policy, length, side)))


class CodecClaimLaws(PolicyLaws):
    """What a codec keeps of what it claims; override the fixture ``policy``. Claims are classes of `core.codecs`."""

    @law("C9", "decoded rows are those of the decoded block", case=any_blocks, picks=st.lists(st.integers(0, 999)))
    def test_rows_are_those_of_the_block(self, policy: CodecPolicy, case: BlockCase, picks: list[int]) -> None:
        if not isinstance(policy, RowCodec):
            unclaimed(f"{policy.name} does not decode rows")
        encoded, decoded = through(policy, case.block)
        rows = torch.tensor([pick % case.block.shape[1] for pick in picks], dtype=torch.int64)
        some = policy.decode_rows(encoded, rows)
        must = decoded[:, rows]
        same = some.shape == must.shape and some.dtype == must.dtype and torch.equal(some, must)
        require(same, f"tokens {rows.tolist()} come back otherwise than in the whole block")

    @law(
        "C10",
        "a rank r leaves the error of the singular values after the r-th, and no more than a smaller rank",
        case=any_blocks,
        rank=st.integers(1, 999),
    )
    def test_low_rank_is_the_best_of_its_rank(self, policy: CodecPolicy, case: BlockCase, rank: int) -> None:
        if not isinstance(policy, LowRankCodec):
            unclaimed(f"{policy.name} declares no rank")
        block = case.block.float()
        full = min(block.shape[1:])
        rank = (rank - 1) % full + 1
        slack = 4 * case.wide.slack * block[0].numel() ** 0.5
        errors = [_frobenius(policy.at_rank(one), block) for one in (rank, min(rank + 1, full), full)]
        best = torch.linalg.svdvals(block.double()).square()[:, rank:].sum(1).sqrt()
        for head, (least, left, next_left, rest) in enumerate(zip(best, *errors, strict=True)):
            most = (1 + policy.excess) * float(least)
            require(
                float(left) <= most + slack,
                f"rank {rank} of head {head} leaves {left:g} (Frobenius), the singular values after it {most:g}",
            )
            require(
                float(next_left) <= (1 + policy.excess) * float(left) + slack,
                f"rank {rank + 1} of head {head} leaves {next_left:g}, more than rank {rank} with {left:g}",
            )
            require(float(rest) <= slack, f"the full rank {full} of head {head} is off by {rest:g}")
        ranked = policy.at_rank(rank)
        require(ranked.encode(block) == ranked.encode(block), f"rank {rank} writes the same block in two ways")

    @law("C11", "outliers come back exactly, as many as declared for every length", case=_any_length)
    def test_outliers_are_exact(self, policy: CodecPolicy, case: BlockCase) -> None:
        if not isinstance(policy, OutlierCodec):
            unclaimed(f"{policy.name} keeps no outliers")
        encoded, decoded = through(policy, case.block)
        apart = policy.outliers(encoded)
        must = policy.outlier_count(*case.block.shape[1:])
        for head, mask in enumerate(apart):
            found = int(mask.sum())
            require(found == must, f"{found} outliers of KV head {head} are kept, {must} are declared")
        error = (decoded.double() - case.block.double()).abs().masked_fill(~apart, 0).max()
        require(float(error) == 0, f"an outlier comes back off by {float(error):g}")

    @law("C12", "with outliers and residual the error is at most that of the backbone alone", case=_any_length)
    def test_residuals_do_not_hurt(self, policy: CodecPolicy, case: BlockCase) -> None:
        if not isinstance(policy, OutlierCodec):
            unclaimed(f"{policy.name} keeps no outliers")
        block = case.block.float()
        left, most = _frobenius(policy, block), _frobenius(policy.backbone, policy.remainder(block))
        slack = case.wide.slack * block[0].numel() ** 0.5
        for head, (with_all, alone) in enumerate(zip(left.tolist(), most.tolist(), strict=True)):
            require(
                with_all <= alone + slack,
                f"KV head {head} is off by {with_all:g} (Frobenius), its backbone alone by {alone:g}",
            )

    @law(
        "C13",
        "fewer planes are off by at most half of what they leave open; all of them are the block",
        case=any_blocks,
    )
    def test_planes_refine(self, policy: CodecPolicy, case: BlockCase) -> None:
        if not isinstance(policy, PlaneCodec):
            unclaimed(f"{policy.name} has no planes")
        encoded, decoded = through(policy, case.block)
        whole = policy.decode_planes(encoded, policy.planes)
        require(torch.equal(whole, decoded), f"all {policy.planes} planes are not what the block decodes to")
        half, coarser = policy.error_bound(encoded), float("inf")
        bounds = [policy.plane_bound(encoded, planes) for planes in range(1, policy.planes + 1)]
        for planes, bound in enumerate(bounds, start=1):
            most = half * 2 ** (policy.planes - planes)
            require(bound <= coarser, f"{planes} planes declare {bound:g}, one less {coarser:g}")
            require(
                bound <= most * (1 + 1e-6), f"{planes} planes declare {bound:g}, half of what they leave is {most:g}"
            )
            coarser = bound
        for planes, bound in enumerate(bounds, start=1):
            error = float((policy.decode_planes(encoded, planes).double() - case.block.double()).abs().max())
            require(error <= bound + case.slack, f"with {planes} planes an element is off by {error:g}, not {bound:g}")

    @law(
        "C14",
        "smoothing changes no product of a query and a key, also before they are rotated",
        case=any_blocks,
        positions=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    )
    def test_smoothing_cancels(self, policy: CodecPolicy, case: BlockCase, positions: tuple[int, int]) -> None:
        if not isinstance(policy, SmoothingCodec):
            unclaimed(f"{policy.name} smooths no keys")
        keys = case.block.double()
        factors = policy.smoothing(case.block).double()[:, None]
        sound = bool(factors.isfinite().all()) and bool((factors > 0).all())
        require(sound, f"a factor is {float(factors.min()):g}, not more than 0")
        rope = Rope(frequencies=tuple(0.7 / (pair + 1) for pair in range(keys.shape[2] // 2)))
        at, query_at = (torch.full(keys.shape[:2], position) for position in positions)
        query = keys.flip(2) + 1
        plain = rotate(rope, query, query_at) @ rotate(rope, keys, at).mT
        smooth = rotate(rope, query * factors, query_at) @ rotate(rope, keys / factors, at).mT
        error = float((smooth - plain).abs().max())
        size = float(plain.abs().max() + query.norm(dim=2).max() * keys.norm(dim=2).max())
        require(error <= 1e-5 * size + 1e-6, f"a product of {float(plain.abs().max()):g} at most is off by {error:g}")

    @law(
        "C15",
        "a uniform code follows scale and shift: a x + c is coded as a times what x is, plus c",
        seed=st.integers(0, 99),
        scale=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
        quarters=st.integers(-64, 64),
    )
    def test_codes_follow_scale_and_shift(self, policy: CodecPolicy, seed: int, scale: float, quarters: int) -> None:
        bits = policy.uniform_bits or 0
        claimed(bits > 0, f"{policy.name} declares no uniform code")
        block, shift = _near_levels(bits, smallest_side(policy), seed), quarters / 4
        _, decoded = through(policy, block)
        _, moved = through(policy, scale * block + shift)
        error = float((moved - (scale * decoded + shift)).abs().max())
        require(error <= 2e-3 * scale, f"{scale:g} x + {shift:g} comes back off by {error:g} from what x does")

    @law(
        "C16",
        "no logit and no probability is off by more than the declared error allows",
        case=any_blocks,
        sixteenths=st.lists(st.integers(-32, 32), min_size=1, max_size=8),
    )
    def test_probabilities_are_within_the_bound(
        self, policy: CodecPolicy, case: BlockCase, sixteenths: list[int]
    ) -> None:
        encoded, decoded = through(policy, case.block)
        dim = case.block.shape[2]
        query = torch.tensor(sixteenths, dtype=torch.float64).repeat(dim)[:dim] / 16 / dim**0.5
        most = float(query.abs().sum()) * (policy.error_bound(encoded) + case.slack) + 1e-9
        logits, seen = (keys.double() @ query for keys in (case.block, decoded))
        error = float((seen - logits).abs().max())
        require(
            error <= most, f"a logit is off by {error:g}; {policy.error_bound(encoded):g} an element allows {most:g}"
        )
        ratio = float((seen.log_softmax(1) - logits.log_softmax(1)).abs().max())
        require(
            ratio <= 2 * most, f"a probability changes by a factor of e^{ratio:g}, at most e^{2 * most:g} is allowed"
        )


def _near_levels(bits: int, side: int, seed: int) -> torch.Tensor:
    """Values up to a quarter from the levels 0 to 2**bits - 1, so that none is near the middle between two."""
    levels = level_block(bits, side, seed)
    ends = (levels == 0) | (levels == 2**bits - 1)
    random = torch.Generator().manual_seed(seed)
    quarters = torch.randint(-1, 2, levels.shape, generator=random) / 4
    return levels + quarters.masked_fill(ends, 0)


def _frobenius(policy: CodecPolicy, block: torch.Tensor) -> torch.Tensor:
    """What a codec leaves of each head of a block [Hk]."""
    _, decoded = through(policy, block)
    norms: torch.Tensor = (decoded.double() - block.double()).flatten(1).norm(dim=1)
    return norms
