"""PyramidKV: the laws of selections, and budgets that fall in a straight line and lose no token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.policy import SelectionPolicy
from kvtier.errors import PolicyError
from kvtier.policies.eviction.pyramidkv import PyramidKV
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws
from kvtier.types import KVLayout


class TestPyramidKV(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return PyramidKV(window=3, kernel=3, beta=5)


def budgets(policy: PyramidKV, layers: int, keep: int) -> list[int]:
    layout = KVLayout.uniform(num_layers=layers, num_kv_heads=1, key_dim=4, value_dim=4, dtype="float32")
    return list(policy.allocate(layout, keep))


@given(layers=st.integers(1, 90), window=st.integers(1, 64), more=st.integers(1, 5000), beta=st.integers(1, 40))
def test_budgets_fall_in_a_straight_line(layers: int, window: int, more: int, beta: int) -> None:
    shares = budgets(PyramidKV(window=window, beta=beta), layers, window + more)

    assert sum(shares) == layers * (window + more)
    assert shares == sorted(shares, reverse=True)
    if layers > 1:
        first, last = 2 * more - more // beta, more // beta
        for layer, share in enumerate(shares):
            line = window + first - layer * (first - last) / (layers - 1)
            assert abs(share - line) < 1


def test_one_part_in_beta_is_left_for_the_last_layer() -> None:
    assert budgets(PyramidKV(window=32, beta=20), 5, 32 + 200) == [422, 327, 232, 137, 42]


@pytest.mark.parametrize("parameters", [{"beta": 0}, {"beta": 2.0}, {"window": 0}, {"keep": 32}])
def test_parameters_out_of_range_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match="must be"):
        PyramidKV(**parameters)  # type: ignore[arg-type]
