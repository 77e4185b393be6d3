"""The segment store keeps the laws of record stores; those of crashes are in `test_crashes.py`."""

import pytest

from kvtier.testing.record_laws import OpenStore, RecordStoreLaws
from kvtier.testing.record_laws.capacity import CapacityLaws
from kvtier.testing.record_laws.damage import DamageLaws
from kvtier.testing.record_laws.reopening import ReopeningLaws
from kvtier.testing.segment_stores import durable, relaxed


class TestSegments(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return durable


class TestRelaxedSegments(CapacityLaws, DamageLaws, ReopeningLaws):
    """The laws that the mode could break."""

    @pytest.fixture
    def store(self) -> OpenStore:
        return relaxed
