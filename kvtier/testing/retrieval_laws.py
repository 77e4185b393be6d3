"""The laws of retrieval policies: subclass `RetrievalLaws` in a test file and they run on your policy."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.core.policy import RetrievalPolicy

__all__ = ["RetrievalCase", "RetrievalLaws", "retrieval_cases"]

_LAW = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
)


@dataclass(frozen=True)
class RetrievalCase:
    """Queries [B, Hq, Tq, D] and sealed pages of keys [B, Hk, N, P, D]."""

    query: torch.Tensor
    keys: torch.Tensor

    def rank(self, policy: RetrievalPolicy) -> torch.Tensor:
        """Scores of pages [B, Hk, N], sketched row by row as a session does."""
        rows = [policy.sketch(keys) for keys in self.keys]
        sketch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return policy.rank(self.query, sketch)


@st.composite
def retrieval_cases(draw: st.DrawFn) -> RetrievalCase:
    """Cases in fp64 of up to 2 rows, 3 KV heads with groups of 1 to 3, 3 queries and 12 pages."""
    rows, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens, pages, slots = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    dim = draw(st.sampled_from([1, 3, 8]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (rows, heads * group, tokens, dim), (rows, heads, pages, slots, dim)
    query, keys = (torch.randn(size, generator=random, dtype=torch.float64) for size in shape)
    return RetrievalCase(query, keys * draw(st.sampled_from([1.0, 50.0])))


class RetrievalLaws:
    """What every retrieval policy keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyRetrieval(RetrievalLaws):
            @pytest.fixture
            def policy(self) -> RetrievalPolicy:
                return MyRetrieval(read=512)
    """

    @pytest.fixture
    def policy(self) -> RetrievalPolicy:
        """Make the policy under test."""
        pytest.fail("override the fixture 'policy': return a RetrievalPolicy")

    @_LAW
    @given(case=retrieval_cases(), count=st.integers(1, 15))
    def test_the_budget_is_exact_and_pages_ascend_in_range(
        self, policy: RetrievalPolicy, case: RetrievalCase, count: int
    ) -> None:
        """R2: min(count, pages) distinct pages, ascending, none better left out."""
        scores = case.rank(policy)
        chosen = policy.choose(scores, count).pages

        pages = case.keys.shape[2]
        assert scores.shape == case.keys.shape[:3]
        assert chosen.shape == (*case.keys.shape[:2], min(count, pages))
        assert chosen.dtype == torch.int64
        assert (chosen.diff(dim=-1) > 0).all()
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < pages
        left = scores.clone().scatter_(-1, chosen, -torch.inf)
        assert (scores.gather(-1, chosen).amin(-1) >= left.amax(-1)).all()

    @_LAW
    @given(case=retrieval_cases(), data=st.data())
    def test_the_order_inside_a_page_does_not_matter(
        self, policy: RetrievalPolicy, case: RetrievalCase, data: st.DataObject
    ) -> None:
        """R4."""
        order = data.draw(st.permutations(range(case.keys.shape[3])))
        shuffled = RetrievalCase(case.query, case.keys[:, :, :, order])

        torch.testing.assert_close(shuffled.rank(policy), case.rank(policy))

    @_LAW
    @given(case=retrieval_cases(), data=st.data())
    def test_pages_are_sketched_alone(self, policy: RetrievalPolicy, case: RetrievalCase, data: st.DataObject) -> None:
        """R11: a sketch made page by page, as blocks are sealed, is the sketch made at once."""
        cut = data.draw(st.integers(0, case.keys.shape[2]))
        for keys in case.keys:
            whole = policy.sketch(keys)
            parts = [policy.sketch(part) for part in (keys[:, :cut], keys[:, cut:]) if part.shape[1]]
            for name, summary in whole.items():
                assert torch.equal(torch.cat([part[name] for part in parts], dim=1), summary)

    @_LAW
    @given(case=retrieval_cases())
    def test_rows_and_heads_are_ranked_alone(self, policy: RetrievalPolicy, case: RetrievalCase) -> None:
        """A row and KV head with its query heads has the same scores in any company."""
        together = case.rank(policy)
        group = case.query.shape[1] // case.keys.shape[1]

        for row in range(case.keys.shape[0]):
            for head in range(case.keys.shape[1]):
                query = case.query[row : row + 1, head * group : (head + 1) * group]
                alone = RetrievalCase(query, case.keys[row : row + 1, head : head + 1])
                torch.testing.assert_close(alone.rank(policy)[0, 0], together[row, head])

    @_LAW
    @given(case=retrieval_cases())
    def test_sketch_bytes_are_those_of_a_page(self, policy: RetrievalPolicy, case: RetrievalCase) -> None:
        """The device budget plans with the bytes that a sketch takes."""
        sketch = policy.sketch(case.keys[0])

        pages = case.keys.shape[1] * case.keys.shape[2]
        assert sum(summary.nbytes for summary in sketch.values()) == pages * policy.sketch_bytes(case.keys.shape[4], 8)
