"""Records in files: the laws of record stores."""

from pathlib import Path

import pytest

from kvtier.storage_backends.files import FileOptions, FileRecords
from kvtier.storage_backends.records import RecordStore
from kvtier.testing.record_laws import OpenStore, RecordStoreLaws
from kvtier.testing.record_laws.lifetime import LifetimeLaws
from kvtier.testing.record_laws.reopening import ReopeningLaws


class TestFileRecords(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return open_durable


class TestRelaxedFileRecords(LifetimeLaws, ReopeningLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return open_relaxed


def open_durable(directory: Path, capacity_bytes: int) -> RecordStore:
    return FileRecords(directory, FileOptions(capacity=capacity_bytes))


def open_relaxed(directory: Path, capacity_bytes: int) -> RecordStore:
    return FileRecords(directory, FileOptions(capacity=capacity_bytes, durability="relaxed"))
