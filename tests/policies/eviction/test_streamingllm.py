"""StreamingLLM: the laws of selections, and which tokens a session is left with."""

from __future__ import annotations

import pytest

from kvtier.core.policy import SelectionPolicy
from kvtier.errors import PolicyError
from kvtier.policies.eviction.streamingllm import StreamingLLM
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws


@pytest.mark.parametrize("sinks", [0, 1, 4])
class TestStreamingLLM(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self, sinks: int) -> SelectionPolicy:
        return StreamingLLM(sinks=sinks)


@pytest.mark.parametrize("parameters", [{"sinks": -1}, {"sinks": 1.5}, {"sinks": 4, "keep": 4}])
def test_parameters_out_of_range(parameters: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match=r"streamingllm: (sinks|keep) must be an integer of at least"):
        StreamingLLM(**parameters)
