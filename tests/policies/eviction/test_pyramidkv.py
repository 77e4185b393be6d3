"""PyramidKV: the laws of selections, in the abstract and in a session."""

from __future__ import annotations

import pytest

from kvtier.core.policy import SelectionPolicy
from kvtier.policies.eviction.pyramidkv import PyramidKV
from kvtier.testing.eviction_laws import EvictionLaws
from kvtier.testing.selection_laws import SelectionLaws


class TestPyramidKV(SelectionLaws, EvictionLaws):
    @pytest.fixture
    def policy(self) -> SelectionPolicy:
        return PyramidKV(window=4)
