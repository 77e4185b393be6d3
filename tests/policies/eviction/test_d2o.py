"""D2O: the laws of selections, in the abstract and in a session."""

from __future__ import annotations

import pytest

from kvtier.core.policy import SelectionPolicy
from kvtier.policies.eviction.d2o import D2O
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.merge_laws import MergeLaws
from kvtier.testing.selection_laws import SelectionLaws


class TestD2O(SelectionLaws, EvictionLaws, MergeLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return D2O(sinks=2, recent=3)
