"""TOVA: the laws of selections, and what the last token looks at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from kvtier.core.policy import Need, SelectionPolicy
from kvtier.errors import PolicyError
from kvtier.policies.eviction.tova import TOVA
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionCase, SelectionLaws, selection_cases
from kvtier.types import GroupReduce


@pytest.mark.parametrize("how", ["mean", "max"])
class TestTOVA(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self, how: GroupReduce) -> SelectionPolicy:
        return TOVA(group_reduce=how)


@given(selection_cases())
def test_the_last_token_and_the_most_attended_stay(case: SelectionCase) -> None:
    policy = TOVA()
    kept, votes = case.plan(policy), case.votes(policy)

    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            best = sorted(range(case.slots - 1), key=lambda slot: (-votes[row, head, slot].item(), slot))
            assert kept[row, head].tolist() == sorted([*best[: case.keep - 1], case.slots - 1])


def test_one_query_votes() -> None:
    assert TOVA().window_queries == 1
    assert TOVA().needs == {Need.WINDOW_ATTENTION}
    assert TOVA().protected(torch.arange(3)[None, None]).tolist() == [[[False, False, True]]]


@pytest.mark.parametrize("parameters", [{"keep": 0}, {"keep": 2.5}, {"group_reduce": "median"}])
def test_parameters_out_of_range_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match="tova: "):
        TOVA(**parameters)  # type: ignore[arg-type]
