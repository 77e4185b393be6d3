"""Hold a policy to the laws of its roles, outside of a test run: what ``kvtier policies check`` prints."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from kvtier.core.policy import Policy, Role, SelectionPolicy
from kvtier.testing.codec_claim_laws import CodecClaimLaws
from kvtier.testing.codec_laws import CodecLaws
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.law import CALM, PHASES, Law, LawBroken, PolicyLaws, laws_of
from kvtier.testing.merge_laws import MergeLaws
from kvtier.testing.placement_laws import PlacementLaws
from kvtier.testing.prompt_laws import PromptFilterLaws
from kvtier.testing.retrieval_laws import RetrievalLaws
from kvtier.testing.selection_laws import SelectionLaws

__all__ = ["Verdict", "check_policy", "suites_of"]

_SUITES: dict[Role, tuple[type[PolicyLaws], ...]] = {
    Role.PROMPT_FILTER: (PromptFilterLaws,),
    Role.SELECTION: (SelectionLaws, EvictionLaws),
    Role.CODEC: (CodecLaws, CodecClaimLaws),
    Role.RETRIEVAL: (RetrievalLaws,),
    Role.PLACEMENT: (PlacementLaws,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one law.

    Parameters
    ----------
    policy, code, title : str
        The policy, and the law.
    holds : bool, optional
        None when the law does not apply.
    found : str
        The smallest counter-example, in words; the reason when the law does not apply; else empty.
    """

    policy: str
    code: str
    title: str
    holds: bool | None
    found: str = ""


def suites_of(policy: Policy) -> list[type[PolicyLaws]]:
    """The suites for the roles of one policy, that of merging only if it merges."""
    suites = [suite for role in Role if role in policy.roles for suite in _SUITES[role]]
    if isinstance(policy, SelectionPolicy) and type(policy).merge is not SelectionPolicy.merge:
        suites.append(MergeLaws)
    return suites


def check_policy(policy: Policy, *, examples: int = 60, only: Collection[str] = ()) -> Iterator[Verdict]:
    """Hold every part of a policy to the laws of its roles, one law after the other.

    Parameters
    ----------
    policy : Policy
        A composition is held to the laws part by part.
    examples : int
        Cases that are drawn for each law; the same ones every time.
    only : collection of str
        Codes of the laws to check; all when empty.
    """
    for part in policy.parts:
        for suite in suites_of(part):
            for stated in laws_of(suite):
                if not only or stated.code in only:
                    yield _judge(stated, suite(), part, examples)


def _judge(stated: Law, suite: PolicyLaws, policy: Policy, examples: int) -> Verdict:
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        phases=PHASES,
        suppress_health_check=CALM,
    )
    @given(data=st.data())
    def hold(data: st.DataObject) -> None:
        stated.hold(suite, policy, data)

    holds, found = True, ""
    try:
        hold()
    except LawBroken as broken:
        holds, found = False, str(broken)
    except Flaky as unsteady:
        holds, found = False, f"{stated.code}, {stated.title}: once broken, once not, by the same case: {unsteady}"
    except pytest.skip.Exception as skipped:
        return Verdict(policy=policy.name, code=stated.code, title=stated.title, holds=None, found=str(skipped))
    return Verdict(policy=policy.name, code=stated.code, title=stated.title, holds=holds, found=found)
