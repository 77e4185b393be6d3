"""The segment store keeps the laws of record stores, durable and relaxed."""

from pathlib import Path

import pytest

from kvtier.storage_backends.records import RecordStore
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.testing.record_laws import OpenStore, RecordStoreLaws


class TestDurableSegments(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        def opens(directory: Path, capacity_bytes: int) -> RecordStore:
            return SegmentRecords(directory, SegmentOptions(capacity=capacity_bytes))

        return opens


class TestRelaxedSegments(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        def opens(directory: Path, capacity_bytes: int) -> RecordStore:
            return SegmentRecords(directory, SegmentOptions(capacity=capacity_bytes, durability="relaxed"))

        return opens
