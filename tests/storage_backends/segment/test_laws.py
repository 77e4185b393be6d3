"""The segment store keeps the laws of record stores, and comes through crashes."""

import pytest

from kvtier.testing.crash.check import Promise
from kvtier.testing.crash.kills import Subject
from kvtier.testing.crash.load import Load
from kvtier.testing.crash_laws import CrashLaws
from kvtier.testing.record_laws import OpenStore, RecordStoreLaws
from kvtier.testing.record_laws.capacity import CapacityLaws
from kvtier.testing.record_laws.damage import DamageLaws
from kvtier.testing.record_laws.reopening import ReopeningLaws
from kvtier.testing.small_segments import MIB, open_durable, open_relaxed

_HERE = "kvtier.testing.small_segments"


class TestSegments(RecordStoreLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return open_durable


class TestRelaxedSegments(CapacityLaws, DamageLaws, ReopeningLaws):
    @pytest.fixture
    def store(self) -> OpenStore:
        return open_relaxed


class TestCrashes(CrashLaws):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(target=f"{_HERE}:open_durable")


class TestCrashesOfAFullStore(CrashLaws):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(target=f"{_HERE}:open_durable", promise=Promise(evicts=True), load=Load(filler=200_000))


class TestCrashesWhenRelaxed(CrashLaws):
    @pytest.fixture
    def subject(self) -> Subject:
        # What is under way when the machine stops comes on top of the bound: three threads, 70 KB each.
        return Subject(target=f"{_HERE}:open_relaxed", promise=Promise(lost_bytes=MIB + 300_000, lost_seconds=2.0))
