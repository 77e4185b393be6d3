"""TOVA: the laws of selections, in the abstract and in a session."""

from __future__ import annotations

import pytest

from kvtier.core.policy import SelectionPolicy
from kvtier.policies.eviction.tova import TOVA
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws


class TestTOVA(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return TOVA()
