"""Segment stores under SIGKILL, simulated power losses and corruption, durable and relaxed."""

import pytest

from kvtier.testing.crash_laws import CrashLaws, Promise, Subject
from kvtier.testing.segment_stores import RELAXED_LOSS_BYTES, RELAXED_LOSS_SECONDS


class TestDurableSegmentsCrash(CrashLaws):
    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(target="kvtier.testing.segment_stores:durable")


class TestRelaxedSegmentsCrash(CrashLaws):
    corruptions = 10  # what is stored lies alike in both modes

    @pytest.fixture
    def subject(self) -> Subject:
        promise = Promise(lost_bytes=RELAXED_LOSS_BYTES, lost_seconds=RELAXED_LOSS_SECONDS)
        return Subject(target="kvtier.testing.segment_stores:relaxed", promise=promise)
