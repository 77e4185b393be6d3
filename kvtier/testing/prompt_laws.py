"""The laws of prompt filters: subclass `PromptFilterLaws` in a test file and they run on your filter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from kvtier.core.policy import PromptFilterPolicy
from kvtier.testing.draws import DTYPES, draw_levels, table
from kvtier.testing.law import PolicyLaws, law, require

__all__ = ["PromptCase", "PromptFilterLaws", "prompt_cases"]


@dataclass(frozen=True)
class PromptCase:
    """Token ids [T], their votes [T] and how many tokens to run."""

    ids: torch.Tensor
    votes: torch.Tensor
    keep: int

    @property
    def tokens(self) -> int:
        """Tokens T of the prompt."""
        return self.ids.shape[0]

    def plan(self, policy: PromptFilterPolicy) -> list[int]:
        """Tokens that are run."""
        kept: list[int] = policy.keep_tokens(self.ids.clone(), self.votes.clone(), self.keep).tolist()
        return kept

    def describe(self) -> str:
        """The case in words."""
        return f"a prompt of {self.tokens} tokens, keep {self.keep}; {table('votes', self.votes.float())}"


@st.composite
def prompt_cases(draw: st.DrawFn) -> PromptCase:
    """Prompts of up to 40 tokens with many equal votes, and budgets beyond their length."""
    tokens, levels = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 4, 250]))
    votes = (draw_levels(draw, (tokens,), levels) / levels).to(draw(st.sampled_from(DTYPES))).float()
    return PromptCase(draw_levels(draw, (tokens,), 100), votes, draw(st.integers(1, tokens + 5)))


class PromptFilterLaws(PolicyLaws):
    """What every prompt filter keeps; override the fixture ``policy``.

    Examples
    --------
    ::

        class TestMyFilter(PromptFilterLaws):
            @pytest.fixture
            def policy(self) -> PromptFilterPolicy:
                return MyFilter(first=4)
    """

    @law("E1", "exactly the budget of tokens is run, distinct and in order", case=prompt_cases())
    def test_the_budget_is_exact(self, policy: PromptFilterPolicy, case: PromptCase) -> None:
        kept, must = case.plan(policy), min(case.keep, case.tokens)
        require(kept == sorted(set(kept)), f"tokens {kept} are run")
        require(all(0 <= index < case.tokens for index in kept), f"tokens {kept} of {case.tokens} are run")
        require(len(kept) == must, f"{must} tokens are due, {len(kept)} are run: {kept}")

    @law("E2", "protected tokens are run when the budget has room for them", case=prompt_cases())
    def test_protected_tokens_are_run(self, policy: PromptFilterPolicy, case: PromptCase) -> None:
        must = policy.protected(case.tokens).nonzero()[:, 0].tolist()
        lost = sorted(set(must) - set(case.plan(policy)))
        require(len(must) > case.keep or not lost, f"tokens {lost} are protected and not run")

    @law("E3", "a budget of the whole prompt runs the whole prompt", case=prompt_cases())
    def test_a_full_budget_runs_everything(self, policy: PromptFilterPolicy, case: PromptCase) -> None:
        whole = PromptCase(case.ids, case.votes, case.tokens + case.keep - 1)
        kept = whole.plan(policy)
        require(
            kept == list(range(case.tokens)), f"{whole.keep} of {case.tokens} tokens may run, {len(kept)} do: {kept}"
        )

    @law("E4", "a larger budget runs what a smaller one runs", case=prompt_cases(), more=st.integers(1, 9))
    def test_budgets_are_nested(self, policy: PromptFilterPolicy, case: PromptCase, more: int) -> None:
        lost = set(case.plan(policy)) - set(PromptCase(case.ids, case.votes, case.keep + more).plan(policy))
        require(not lost, f"tokens {sorted(lost)} are run with {case.keep} and not with {case.keep + more}")

    @law("E12", "votes belong to the runtime: filtering changes none", case=prompt_cases())
    def test_filtering_changes_no_vote(self, policy: PromptFilterPolicy, case: PromptCase) -> None:
        ids, votes = case.ids.clone(), case.votes.clone()
        policy.keep_tokens(ids, votes, case.keep)
        require(torch.equal(votes, case.votes) and torch.equal(ids, case.ids), "votes or ids are not what they were")

    @law("E13", "a prompt is filtered the same whatever was filtered before", case=prompt_cases(), other=prompt_cases())
    def test_no_state_survives(self, policy: PromptFilterPolicy, case: PromptCase, other: PromptCase) -> None:
        first = case.plan(policy)
        other.plan(policy)
        again = case.plan(policy)
        require(first == again, f"tokens {first} are run, then {again}")
