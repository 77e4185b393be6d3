"""StreamingLLM: the laws of selections, and the first and last tokens."""

from __future__ import annotations

import pytest
import torch

from kvtier.core.policy import SelectionPolicy
from kvtier.core.stats import SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.streamingllm import StreamingLLM
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws
from kvtier.types import KVLayout


@pytest.mark.parametrize("sinks", [0, 4])
class TestStreamingLLM(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self, sinks: int) -> SelectionPolicy:
        return StreamingLLM(sinks=sinks)


@pytest.mark.parametrize("sinks", [0, 2])
class TestCompactStreamingLLM(EvictionLaws):
    @pytest.fixture
    def policy(self, sinks: int) -> SelectionPolicy:
        return StreamingLLM(sinks=sinks, positions="compact")


def plan(policy: StreamingLLM, positions: torch.Tensor, keep: int) -> list[int]:
    view = SlotView(positions=positions[None, None], protected=policy.protected(positions[None, None]))
    kept: list[int] = policy.select(policy.score(view, Stats()), view, keep).keep[0, 0].tolist()
    return kept


def test_sinks_and_the_newest_stay() -> None:
    assert plan(StreamingLLM(sinks=3), torch.arange(20), 8) == [0, 1, 2, 15, 16, 17, 18, 19]


def test_a_later_prompt_spares_the_sinks_by_their_position() -> None:
    kept_before = torch.tensor([0, 1, 15, 16, 17, 18, 19, 20])

    assert plan(StreamingLLM(sinks=3), kept_before, 4) == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sinks": -1}, "sinks must be an integer of at least 0, got -1"),
        ({"sinks": 1.0}, r"sinks must be an integer of at least 0, got 1\.0"),
        ({"positions": "dense"}, "positions must be 'original' or 'compact', got 'dense'"),
        ({"keep": 4}, r"keep must be more than sinks \(4\) tokens, got 4"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=f"streamingllm: {message}"):
        StreamingLLM(**parameters)  # type: ignore[arg-type]


def test_a_budget_within_the_sinks_is_refused_when_it_is_allocated() -> None:
    layout = KVLayout.uniform(num_layers=2, num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")

    assert StreamingLLM(sinks=8).allocate(layout, 9) == (9, 9)
    with pytest.raises(PolicyError, match=r"keep must be more than sinks \(8\) tokens, got 8"):
        StreamingLLM(sinks=8).allocate(layout, 8)
