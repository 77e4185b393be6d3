"""H2O: the laws of selections, in the abstract and in a session."""

from __future__ import annotations

import pytest

from kvtier.core.policy import SelectionPolicy
from kvtier.policies.eviction.h2o import H2O
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws


class TestH2O(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return H2O(recent=3)
