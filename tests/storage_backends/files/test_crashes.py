"""Crashes of a store of files: the laws; relaxed puts promise nothing before a flush."""

from pathlib import Path

import pytest

from kvtier.testing.crash_laws import CrashLaws, Promise, Subject

OPENING = Path(__file__).with_name("opening.py")
UNBOUNDED = 1 << 62


class TestDurableFilesCrash(CrashLaws):
    corruptions = 30

    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(target=f"{OPENING}:durable")


class TestRelaxedFilesCrash(CrashLaws):
    kills = 2
    power_losses = 15
    corruptions = 5

    @pytest.fixture
    def subject(self) -> Subject:
        promise = Promise(lost_bytes=UNBOUNDED, lost_seconds=float(UNBOUNDED))
        return Subject(target=f"{OPENING}:relaxed", promise=promise)
