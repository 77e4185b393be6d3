"""The laws of record stores hold for the reference store, and each catches a store that breaks it."""

import pytest

from kvtier.testing.record_laws import OpenStore, RecordStoreLaws
from kvtier.testing.reference_records import ReferenceRecords


class TestReferenceRecords(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return ReferenceRecords
