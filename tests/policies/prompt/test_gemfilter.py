"""GemFilter keeps the laws of prompt filters, pools as it says, and votes in a layer that can see."""

import pytest
import torch

from kvtier.core.policy import PromptFilterPolicy
from kvtier.errors import CompositionError, PolicyError
from kvtier.policies.prompt.gemfilter import GemFilter
from kvtier.testing.prompt_laws import PromptFilterLaws
from kvtier.types import KVLayout, LayerLayout


class TestLaws(PromptFilterLaws):
    @pytest.fixture(params=["mean", "max"])
    def policy(self, request: pytest.FixtureRequest) -> PromptFilterPolicy:
        return GemFilter(pool=request.param, prefix=2, suffix=3)


def layout(*windows: int | None) -> KVLayout:
    shape = {"num_query_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "dtype": "float32"}
    return KVLayout(layers=tuple(LayerLayout(**shape, window=window) for window in windows))


def kept(policy: GemFilter, votes: list[float], keep: int) -> list[int]:
    return policy.keep_tokens(torch.arange(len(votes)), torch.tensor(votes), keep).tolist()


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_neighbours_of_a_vote_survive_with_it(pool: str) -> None:
    votes = [0.0] * 20
    votes[10] = 5.0

    assert kept(GemFilter(pool=pool, prefix=1, suffix=2), votes, 8) == [0, 8, 9, 10, 11, 12, 18, 19]


def test_one_sharp_vote_drowns_in_a_mean_and_not_in_a_maximum() -> None:
    votes = [0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0]
    edge = {"prefix": 0, "suffix": 0, "kernel": 3}

    assert kept(GemFilter(pool="mean", **edge), votes, 3) == [7, 8, 9]
    assert kept(GemFilter(pool="max", **edge), votes, 3) == [1, 2, 3]


def test_what_is_protected_lends_its_votes_to_no_neighbour() -> None:
    votes = [1e6, -3.0, -1.0, -2.0, -4.0, 1e6]

    assert kept(GemFilter(prefix=1, suffix=1, kernel=3), votes, 4) == [0, 1, 2, 5]


def test_the_pool_ends_with_the_prompt() -> None:
    # Filled up with zeros, the first and the last mean of these would be the highest.
    assert kept(GemFilter(prefix=0, suffix=0, kernel=3), [-9.0, -9.0, -9.0, -1.0, -9.0, -9.0, -9.0], 3) == [2, 3, 4]


def test_the_question_comes_before_the_beginning_when_room_is_short() -> None:
    assert kept(GemFilter(prefix=3, suffix=3), [0.0] * 9, 4) == [0, 6, 7, 8]
    assert kept(GemFilter(prefix=3, suffix=3), [0.0] * 9, 2) == [7, 8]


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (2, 1), (4, 2), (32, 16), (40, 20)])
def test_half_of_the_depth_votes_by_default(depth: int, layer: int) -> None:
    assert GemFilter().vote_layer(layout(*[None] * depth)) == layer


def test_the_layer_that_votes_sees_all_tokens() -> None:
    assert GemFilter().vote_layer(layout(None, None, 16, 16, None, 16)) == 4
    assert GemFilter(layer=1).vote_layer(layout(None, None, 16, 16)) == 1
    with pytest.raises(CompositionError, match="layer 2 has a sliding window of 16 tokens"):
        GemFilter(layer=2).vote_layer(layout(None, None, 16, 16))
    with pytest.raises(CompositionError, match="none of the layers 2 to 3 does"):
        GemFilter().vote_layer(layout(None, None, 16, 16))
    with pytest.raises(CompositionError, match="layer must be from 0 to 3 in this model, got 4"):
        GemFilter(layer=4).vote_layer(layout(None, None, 16, 16))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": 0}, "keep must be an integer of at least 1"),
        ({"kernel": 4}, "kernel must be an odd integer"),
        ({"pool": "median"}, "pool must be 'mean' or 'max'"),
        ({"prefix": -1}, "prefix must be an integer of at least 0"),
        ({"suffix": 1.5}, "suffix must be an integer of at least 0"),
        ({"layer": -1}, "layer must be an integer of at least 0"),
    ],
)
def test_fields_are_checked(fields: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        GemFilter(**fields)
