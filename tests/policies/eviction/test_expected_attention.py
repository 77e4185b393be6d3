"""Expected Attention: the laws of selections, and the paper written out key by key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import SelectionPolicy
from kvtier.core.stats import QueryMoments, SlotView, Stats
from kvtier.errors import PolicyError
from kvtier.policies.eviction.expected_attention import ExpectedAttention
from kvtier.testing.dense import reduce_heads
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws
from kvtier.types import KVLayout, Rope

SCALE = 0.4


class TestExpectedAttention(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return ExpectedAttention(n_future=5, n_sink=2)


def mean_rotation(rope: Rope, first: int, count: int, dim: int) -> torch.Tensor:
    """The mean of the rotations to ``count`` positions from ``first``, entry by entry."""
    total = torch.zeros(dim, dim, dtype=torch.float64)
    pairs = len(rope.frequencies)
    for position in range(first, first + count):
        one = torch.eye(dim, dtype=torch.float64)
        for pair, frequency in enumerate(rope.frequencies):
            angle = position * frequency
            one[pair, pair] = one[pair + pairs, pair + pairs] = math.cos(angle) * rope.scaling
            one[pair, pair + pairs], one[pair + pairs, pair] = (
                -math.sin(angle) * rope.scaling,
                math.sin(angle) * rope.scaling,
            )
        total += one
    return total / count


@given(
    seed=st.integers(0, 2**16),
    slots=st.integers(3, 12),
    group=st.sampled_from([1, 2, 4]),
    sinks=st.integers(0, 2),
    covariance=st.booleans(),
    norms=st.booleans(),
    epsilon=st.sampled_from([0.0, 0.1]),
    how=st.sampled_from(["mean", "max", "sum"]),
    scaling=st.sampled_from([1.0, 1.3]),
)
def test_scores_are_those_of_the_paper(
    seed: int,
    slots: int,
    group: int,
    sinks: int,
    covariance: bool,
    norms: bool,
    epsilon: float,
    how: str,
    scaling: float,
) -> None:
    random = torch.Generator().manual_seed(seed)
    rope = Rope(frequencies=(1.0, 0.3), scaling=scaling)
    keys = torch.randn(2, 2, slots, 5, generator=random)
    queries = torch.randn(2, 2 * group, 9, 5, generator=random)
    spread = torch.stack([torch.stack([torch.cov(head.T, correction=0) for head in row]) for row in queries])
    positions = torch.arange(slots).expand(2, 2, slots) * 2
    policy = ExpectedAttention(
        n_future=7,
        n_sink=sinks,
        use_covariance=covariance,
        use_vnorm=norms,
        epsilon=epsilon,
        group_reduce=how,  # type: ignore[arg-type]
    )
    lengths = torch.rand(2, 2, slots, generator=random)
    view = SlotView(positions=positions, protected=policy.protected(positions), keys=keys, value_norms=lengths)
    got = policy.score(view, Stats(query_moments=QueryMoments(queries.mean(2), spread, rope, SCALE)))

    turn = mean_rotation(rope, 2 * slots - 1, 7, 5)
    for row in range(2):
        open_slots = [slot for slot in range(slots) if int(positions[row, 0, slot]) >= sinks]
        shares = torch.zeros(2 * group, slots, dtype=torch.float64)
        for head in range(2 * group):
            mean = turn @ queries[row, head].double().mean(0)
            cov = turn @ spread[row, head].double() @ turn.T
            for slot in open_slots:
                key = keys[row, head // group, slot].double()
                exponent = float(mean @ key) * SCALE
                if covariance:
                    exponent += float(key @ cov @ key) * SCALE**2 / 2
                shares[head, slot] = math.exp(exponent)
            shares[head] /= shares[head].sum()
        right = reduce_heads(shares, 2, how)  # type: ignore[arg-type]
        if norms:
            right = (right + epsilon) * lengths[row].double()
        torch.testing.assert_close(got[row][:, open_slots].double(), right[:, open_slots], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_future": 0}, "n_future must be an integer of at least 1, got 0"),
        ({"n_sink": -1}, "n_sink must be an integer of at least 0, got -1"),
        ({"use_vnorm": 1}, "use_vnorm must be True or False, got 1"),
        ({"epsilon": -0.5}, r"epsilon must be at least 0, got -0\.5"),
        ({"group_reduce": "min"}, "group_reduce must be 'mean', 'max' or 'sum', got 'min'"),
        ({"keep": 4}, "keep must be an integer of at least 5, got 4"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=f"expected_attention: {message}"):
        ExpectedAttention(**parameters)  # type: ignore[arg-type]


def test_a_budget_within_the_sinks_is_refused_when_it_is_allocated() -> None:
    layout = KVLayout.uniform(num_layers=2, num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")

    assert ExpectedAttention().allocate(layout, 5) == (5, 5)
    with pytest.raises(PolicyError, match=r"keep must be more than n_sink \(4\) tokens, got 4"):
        ExpectedAttention().allocate(layout, 4)
