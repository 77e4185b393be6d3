"""The segment store over a disk that fails: read errors, lost, torn and misplaced writes, a full disk, a broken one."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvtier.storage_backends.engines import PosixEngine
from kvtier.storage_backends.records import RecordStore
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.testing.faults import FaultyEngine, ReadFault, WriteFault
from kvtier.testing.record_laws import Fault, OpenStore
from kvtier.testing.record_laws.machine import FaultMachineLaws


class OnAFaultyEngine(SegmentRecords):
    """A segment store that closes the engine it was given."""

    def close(self) -> None:
        super().close()
        self._engine.close()


class TestSegmentsOnAFaultyEngine(FaultMachineLaws):
    @pytest.fixture
    def engines(self) -> list[FaultyEngine]:
        return []

    @pytest.fixture
    def store(self, engines: list[FaultyEngine]) -> OpenStore:
        def opens(directory: Path, capacity_bytes: int) -> RecordStore:
            engines[:] = [FaultyEngine(PosixEngine(threads=2))]
            return OnAFaultyEngine(directory, SegmentOptions(capacity=capacity_bytes), engine=engines[0])

        return opens

    @pytest.fixture
    def faults(self, engines: list[FaultyEngine]) -> Sequence[Fault]:
        def hurt(store: RecordStore | None, _directory: Path, rng: random.Random) -> None:
            if store is None:
                return
            engine = engines[0]
            rng.choice(
                [
                    lambda: engine.on_read(rng.choice(list(ReadFault)), nth=rng.randint(1, 4)),
                    lambda: engine.on_write(rng.choice(list(WriteFault)), nth=rng.randint(1, 4)),
                    lambda: engine.fill_disk(after_bytes=rng.choice([0, 4096, 1 << 20])),
                    lambda: engine.fail_syncs(rng.randint(1, 3)),
                    engine.break_disk,
                    lambda: engine.slow_down(0.001),
                ]
            )()

        return (hurt,)

    @pytest.fixture
    def heal(self, engines: list[FaultyEngine]) -> Callable[[], None]:
        def repair() -> None:
            engines[0].repair()  # of the store that is open now

        return repair
