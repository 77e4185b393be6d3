"""Spill slots in segments: the laws of slot backends, and one capacity shared with the cache."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.errors import CapacityError, ConfigError
from kvtier.storage_backends.base import SlotBackend, check_sizes
from kvtier.storage_backends.records import PutState, ReadRequest
from kvtier.storage_backends.segment import SegmentOptions, SegmentRecords
from kvtier.storage_backends.segment.spill import SegmentSpill
from kvtier.testing.backend_laws import BackendFactory, SlotBackendLaws
from kvtier.testing.backend_machine import random_rows
from kvtier.testing.record_samples import physical_bytes, sample_key, sample_record

SEGMENT = 136 << 10  # so small that whole segments stay within the slack of the laws
MIB = 1 << 20


class OwnSpill(SegmentSpill):
    """Closes its store with itself."""

    def close(self) -> None:
        super().close()
        self._records.close()


class TestSegmentSpill(SlotBackendLaws):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendFactory:
        opened = 0

        def opens(slot_bytes: int, capacity_slots: int) -> SlotBackend:
            nonlocal opened
            check_sizes(slot_bytes, capacity_slots)
            opened += 1
            stride = -(-slot_bytes // 4096) * 4096
            capacity = 4 * MIB + 2 * capacity_slots * stride
            options = SegmentOptions(capacity=capacity, segment_bytes=SEGMENT)
            return OwnSpill(slot_bytes, capacity_slots, SegmentRecords(tmp_path / str(opened), options))

        return opens


def test_spill_takes_from_the_cache_and_gives_back(tmp_path: Path) -> None:
    options = SegmentOptions(capacity=8 * MIB)
    with SegmentRecords(tmp_path, options) as records:
        for number in range(64):
            records.put([sample_record(number, 100_000)])
        full = records.stats()
        assert full.evicted > 0
        spill = SegmentSpill(64 << 10, 1000, records)
        slots = spill.reserve(60)
        rows = random_rows(1, 60, 64 << 10)
        spill.write(slots, rows)
        squeezed = records.stats()
        assert squeezed.live_bytes < full.live_bytes
        assert physical_bytes(tmp_path) <= options.capacity
        for number in range(100, 164):
            records.put([sample_record(number, 100_000)])
            assert physical_bytes(tmp_path) <= options.capacity
        into = torch.zeros_like(rows)
        spill.read(slots, into)
        assert torch.equal(into, rows), "the cache wrote over a spilled page"
        spill.close()
        for number in range(200, 264):
            assert records.put([sample_record(number, 100_000)])[0].state is PutState.STORED
        assert records.stats().records > squeezed.records


def test_a_reservation_that_cannot_be_had_takes_nothing(tmp_path: Path) -> None:
    with SegmentRecords(tmp_path, SegmentOptions(capacity=8 * MIB)) as records:
        records.put([sample_record(1, 10_000)])
        with (
            records.lease([sample_key(1)], owner="test", seconds=60),
            SegmentSpill(1 * MIB - 8192, 100, records) as spill,
        ):
            with pytest.raises(CapacityError, match=r"required a segment of 1\.0 MiB, got none"):
                spill.reserve(50)
            assert spill.used_slots == 0
            assert spill.allocated_bytes == 0
            assert spill.reserve(3).size == 3
        assert records.contains([sample_key(1)])[0], "a leased record made room for a spill"


def test_released_slots_free_their_segments(tmp_path: Path) -> None:
    with (
        SegmentRecords(tmp_path, SegmentOptions(capacity=8 * MIB)) as records,
        SegmentSpill(4096, 1000, records) as spill,
    ):
        slots = spill.reserve(1000)
        held = spill.allocated_bytes
        spill.release(slots[500:])
        spill.release(slots[100:500])
        assert spill.allocated_bytes <= held / 2
        assert spill.reserve(900).size == 900


def test_what_a_dead_process_spilled_is_free_again(tmp_path: Path) -> None:
    options = SegmentOptions(capacity=8 * MIB)
    with SegmentRecords(tmp_path, options) as records:
        records.put([sample_record(1, 10_000)])
        spill = SegmentSpill(1 * MIB - 8192, 100, records)
        spill.write(spill.reserve(3), random_rows(1, 3, 1 * MIB - 8192))
    with SegmentRecords(tmp_path, options) as records:
        into = torch.zeros(10_000, dtype=torch.uint8)
        assert records.read([ReadRequest(sample_key(1), into)]) == [True]
        assert records.stats().records == 1
        with SegmentSpill(1 * MIB - 8192, 100, records) as spill:
            assert spill.reserve(5).size == 5
        assert physical_bytes(tmp_path) <= options.capacity


def test_slots_larger_than_a_segment_are_refused(tmp_path: Path) -> None:
    with (
        SegmentRecords(tmp_path, SegmentOptions(capacity=8 * MIB)) as records,
        pytest.raises(ConfigError, match="raise segment_bytes"),
    ):
        SegmentSpill(2 * MIB, 1, records)


def test_a_run_may_cross_segments(tmp_path: Path) -> None:
    with (
        SegmentRecords(tmp_path, SegmentOptions(capacity=8 * MIB, segment_bytes=SEGMENT)) as records,
        SegmentSpill(8192, 100, records) as spill,
    ):
        slots = spill.reserve(50)
        rows = random_rows(2, 50, 8192)
        spill.write(slots, rows)
        into = torch.zeros_like(rows)
        spill.read(slots, into)
        assert torch.equal(into, rows)
        assert np.unique(slots // spill._per_segment).size == 4
