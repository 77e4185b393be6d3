"""The laws of retrieval policies: subclass `RetrievalLaws` in a test file and they run on your policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvtier.core.policy import RetrievalPolicy, Sketch
from kvtier.testing.draws import DTYPES, draw_values, table
from kvtier.testing.law import PolicyLaws, claimed, law, require

__all__ = ["RetrievalCase", "RetrievalLaws", "retrieval_cases"]

_SLACK = 1e-4  # relative; sums of up to 8 exact products in fp32, in another order


@dataclass(frozen=True)
class RetrievalCase:
    """Queries [B, Hq, Tq, D] and sealed pages of keys [B, Hk, N, P, D]."""

    query: torch.Tensor
    keys: torch.Tensor

    @property
    def pages(self) -> int:
        """Pages N of each row and KV head."""
        return self.keys.shape[2]

    def sketch(self, policy: RetrievalPolicy) -> Sketch:
        """Summaries [B, Hk, N, ...], made row by row as a session does."""
        rows = [policy.sketch(keys) for keys in self.keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def rank(self, policy: RetrievalPolicy) -> torch.Tensor:
        """Scores of pages [B, Hk, N]."""
        return policy.rank(self.query, self.sketch(policy))

    def only(self, row: int, head: int) -> RetrievalCase:
        """One row and KV head with its query heads."""
        group = self.query.shape[1] // self.keys.shape[1]
        query = self.query[row : row + 1, head * group : (head + 1) * group]
        return RetrievalCase(query, self.keys[row : row + 1, head : head + 1])

    def describe(self) -> str:
        """The case in words."""
        rows, heads, pages, slots = self.keys.shape[:4]
        return (
            f"{rows} rows, {heads} KV heads of {self.query.shape[1] // heads} query heads, {pages} pages of {slots}, "
            f"{self.query.shape[2]} queries, {self.keys.dtype}; {table('keys', self.keys)}; "
            f"{table('queries', self.query)}"
        )


@st.composite
def retrieval_cases(draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES) -> RetrievalCase:
    """Cases of up to 3 rows, 3 KV heads of 1, 2 or 4 query heads, 3 queries and 9 pages."""
    rows, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    tokens, pages, slots = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dim, dtype = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from(dtypes))
    query = draw_values(draw, (rows, heads * group, tokens, dim)).to(dtype)
    keys = draw_values(draw, (rows, heads, pages, slots, dim)).to(dtype)
    return RetrievalCase(query, keys * draw(st.sampled_from([1, 64])))


class RetrievalLaws(PolicyLaws):
    """What every retrieval policy keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyRetrieval(RetrievalLaws):
            @pytest.fixture
            def policy(self) -> RetrievalPolicy:
                return MyRetrieval(read=512)
    """

    @law("R1", "a score is at least every logit in its page, if the policy says so", case=retrieval_cases())
    def test_bounds_are_upper_bounds(self, policy: RetrievalPolicy, case: RetrievalCase) -> None:
        claimed(policy.upper_bound, f"{policy.name} does not claim that its scores are bounds")
        query = case.query.double().unflatten(1, (case.keys.shape[1], -1))
        logits = torch.einsum("bhgtd,bhnpd->bhgtnp", query, case.keys.double()).amax((2, 3, 5))
        scores = case.rank(policy).double()
        below = scores < logits - _SLACK * (1 + logits.abs())
        if below.any():
            row, head, page = below.nonzero()[0].tolist()
            require(
                False,
                f"row {row}, KV head {head}: page {page} scores {scores[row, head, page]:g} and holds a logit of "
                f"{logits[row, head, page]:g}",
            )

    @law(
        "R2",
        "exactly the budget of pages is read, and none better is left out",
        case=retrieval_cases(),
        count=st.integers(1, 12),
    )
    def test_the_budget_is_exact(self, policy: RetrievalPolicy, case: RetrievalCase, count: int) -> None:
        scores = case.rank(policy)
        require(scores.shape == case.keys.shape[:3], f"scores are [B, Hk, N], got {list(scores.shape)}")
        chosen = policy.choose(scores, count).pages
        must = min(count, case.pages)
        require(chosen.shape == (*scores.shape[:2], must), f"{must} pages are due, got {list(chosen.shape)}")
        left = scores.clone().scatter_(-1, chosen, -torch.inf)
        require(
            bool((scores.gather(-1, chosen).amin(-1) >= left.amax(-1)).all()), "a page with a better score is left out"
        )

    @law("R3", "chosen pages are distinct, in range and ascend", case=retrieval_cases(), count=st.integers(1, 12))
    def test_pages_ascend_in_range(self, policy: RetrievalPolicy, case: RetrievalCase, count: int) -> None:
        chosen = policy.choose(case.rank(policy), count).pages
        require(chosen.dtype == torch.int64, f"pages are int64, got {chosen.dtype}")
        for pages in chosen.flatten(0, 1).tolist():
            require(pages == sorted(set(pages)), f"{pages} are chosen")
            require(all(0 <= page < case.pages for page in pages), f"{pages} are chosen of {case.pages}")

    @law("R4", "the order of tokens inside a page does not matter", case=retrieval_cases(), turn=st.integers(1, 3))
    def test_the_order_inside_a_page_does_not_matter(
        self, policy: RetrievalPolicy, case: RetrievalCase, turn: int
    ) -> None:
        turned = RetrievalCase(case.query, case.keys.roll(turn, 3)).rank(policy)
        require(_close(turned, case.rank(policy)), f"pages turned by {turn} tokens have other scores")

    @law("R6", "a row and KV head is ranked the same in any company", case=retrieval_cases())
    def test_rows_and_heads_are_ranked_alone(self, policy: RetrievalPolicy, case: RetrievalCase) -> None:
        together = case.rank(policy)
        for row in range(case.keys.shape[0]):
            for head in range(case.keys.shape[1]):
                alone, mine = case.only(row, head).rank(policy)[0, 0], together[row, head]
                require(
                    _close(alone, mine),
                    f"row {row}, KV head {head} scores {alone.tolist()} alone, {mine.tolist()} in company",
                )

    @law("R7", "pinned pages are read and counted, whatever the query", case=retrieval_cases(), count=st.integers(1, 9))
    def test_pinned_pages_are_never_forgotten(self, policy: RetrievalPolicy, case: RetrievalCase, count: int) -> None:
        sketch = case.sketch(policy)
        pinned, chosen = policy.pinned(sketch), policy.choose(policy.rank(case.query, sketch), count).pages
        require(pinned.shape == case.keys.shape[:3], f"pinned pages are [B, Hk, N], got {list(pinned.shape)}")
        for row in range(pinned.shape[0]):
            for head in range(pinned.shape[1]):
                must, got = pinned[row, head].nonzero()[:, 0].tolist(), chosen[row, head].tolist()
                forgotten = [page for page in must if page not in got]
                require(
                    len(must) > count or not forgotten,
                    f"row {row}, KV head {head}: pages {must} are pinned, {got} are read with {count} pages",
                )

    @law("R8", "the bytes of a sketch are those that the policy declares", case=retrieval_cases())
    def test_sketch_bytes_are_those_of_a_page(self, policy: RetrievalPolicy, case: RetrievalCase) -> None:
        held = sum(summary.nbytes for summary in policy.sketch(case.keys[0]).values())
        pages = case.keys.shape[1] * case.pages
        declared = pages * policy.sketch_bytes(case.keys.shape[4], case.keys.element_size())
        require(held == declared, f"the sketches of {pages} pages take {held} bytes, {declared} are declared")

    @law(
        "R11", "a sketch made block by block is the sketch made at once", case=retrieval_cases(), cut=st.integers(0, 9)
    )
    def test_pages_are_sketched_alone(self, policy: RetrievalPolicy, case: RetrievalCase, cut: int) -> None:
        for keys in case.keys:
            parts = [policy.sketch(part) for part in (keys[:, :cut], keys[:, cut:]) if part.shape[1]]
            for name, summary in policy.sketch(keys).items():
                joined = torch.cat([part[name] for part in parts], dim=1)
                require(torch.equal(joined, summary), f"{name} of pages sketched in two parts, cut at {cut}, differs")

    @law("R13", "scores are the same whatever was ranked before", case=retrieval_cases(), other=retrieval_cases())
    def test_no_state_survives(self, policy: RetrievalPolicy, case: RetrievalCase, other: RetrievalCase) -> None:
        first = case.rank(policy)
        other.rank(policy)
        require(torch.equal(case.rank(policy), first), "the same queries and pages score otherwise the second time")


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=_SLACK, atol=_SLACK)
