"""Digests and meters around a backend, under the faults of disks."""

import errno
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.errors import DamagedSlotsError, StorageError
from kvtier.storage_backends.host import HostSlots
from kvtier.storage_backends.spill_file import SpillFile
from kvtier.storage_backends.wrappers import Meter, MeteredSlots, VerifiedSlots
from kvtier.testing.backend_laws import BackendFactory, SlotBackendLaws
from kvtier.testing.backend_machine import random_rows
from kvtier.testing.faults import FaultySlots


class TestVerifiedSlots(SlotBackendLaws):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendFactory:
        return lambda slot_bytes, capacity_slots: VerifiedSlots(SpillFile(slot_bytes, capacity_slots, tmp_path))


class TestMeteredSlots(SlotBackendLaws):
    @pytest.fixture
    def backend(self) -> BackendFactory:
        return lambda slot_bytes, capacity_slots: MeteredSlots(HostSlots(slot_bytes, capacity_slots))


@pytest.fixture
def faulty() -> FaultySlots:
    return FaultySlots(HostSlots(4096, 16))


def test_bytes_in_the_wrong_place_are_damage(faulty: FaultySlots) -> None:
    slots = VerifiedSlots(faulty)
    slots.write(taken := slots.reserve(4), rows := random_rows(0, 4, 4096))
    faulty.exchange_slots(1, 3)

    with pytest.raises(DamagedSlotsError, match=r"got others in 2 slots .* of the 4 read \(host\)") as caught:
        slots.read(taken, into := torch.ones_like(rows))

    assert caught.value.slots == (1, 3)
    assert torch.equal(into[[0, 2]], rows[[0, 2]])
    assert not into[[1, 3]].any(), "wrong bytes reached the caller"


def test_a_lost_write_does_not_bring_the_old_bytes_back(faulty: FaultySlots) -> None:
    slots = VerifiedSlots(faulty)
    slots.write(taken := slots.reserve(2), rows := random_rows(0, 2, 4096))
    faulty.lose_write(nth=1)
    slots.write(taken[:1], random_rows(1, 1, 4096))

    with pytest.raises(DamagedSlotsError) as caught:
        slots.read(taken, torch.zeros_like(rows))
    assert caught.value.slots == (0,)


def test_a_short_read_is_damage(faulty: FaultySlots) -> None:
    slots = VerifiedSlots(faulty)
    slots.write(taken := slots.reserve(4), rows := random_rows(0, 4, 4096))
    faulty.short_read(nth=2)
    slots.read(taken, into := torch.zeros_like(rows))
    assert torch.equal(into, rows)

    with pytest.raises(DamagedSlotsError) as caught:
        slots.read(taken, torch.zeros_like(rows))
    assert caught.value.slots == (2, 3)
    slots.read(taken, into)
    assert slots.verified_bytes == 10 * 4096


def test_a_slot_that_was_never_written_cannot_be_read(faulty: FaultySlots) -> None:
    slots = VerifiedSlots(faulty)
    slots.write(first := slots.reserve(1), random_rows(0, 1, 4096))
    slots.release(first)
    again = slots.reserve(2)

    with pytest.raises(DamagedSlotsError, match="nothing ever written in 2 of the 2 read"):
        slots.read(again, torch.zeros(2, 4096, dtype=torch.uint8))


def test_a_failed_write_leaves_no_digest_of_what_was_not_stored(faulty: FaultySlots) -> None:
    slots = VerifiedSlots(faulty)
    slots.write(taken := slots.reserve(4), rows := random_rows(0, 4, 4096))
    faulty.fail_write(nth=1)

    with pytest.raises(StorageError, match="cannot write slots 0, 1, 2, 3"):
        slots.write(taken, random_rows(1, 4, 4096))
    with pytest.raises(DamagedSlotsError) as caught:
        slots.read(taken, into := torch.zeros_like(rows))

    assert caught.value.slots == (0, 1), "half was overwritten before the error"
    assert torch.equal(into[2:], rows[2:])


def test_digests_cost_seventeen_bytes_a_slot(faulty: FaultySlots) -> None:
    assert VerifiedSlots(faulty).digest_bytes == 16 * 17


def test_meters_count_what_went_through_and_what_did_not(faulty: FaultySlots) -> None:
    slots = MeteredSlots(faulty)
    rows = random_rows(0, 8, 4096)
    slots.write(taken := slots.reserve(8), rows)
    faulty.slow_down(0.02)
    slots.read(taken[:2], rows[:2])
    slots.read(taken, rows)
    faulty.fail_read(nth=1)
    faulty.fill_disk()
    with pytest.raises(StorageError):
        slots.read(taken, rows)
    with pytest.raises(StorageError) as caught:
        slots.write(taken, rows)

    meters = slots.meters
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert (meters.read.ops, meters.read.bytes, meters.failed_ops) == (2, 10 * 4096, 2)
    assert meters.read.seconds >= 0.04
    assert meters.write == Meter(1, 8 * 4096, meters.write.seconds)


def test_faults_happen_once_and_when_ordered(faulty: FaultySlots) -> None:
    rows = random_rows(0, 1, 4096)
    taken = faulty.reserve(1)
    faulty.fail_write(nth=2, code=errno.EROFS)
    faulty.write(taken, rows)
    with pytest.raises(StorageError, match=r"Read-only file system"):
        faulty.write(taken, rows)
    faulty.fill_disk()
    with pytest.raises(StorageError, match="No space left"):
        faulty.write(taken, rows)
    faulty.free_disk()
    faulty.slow_down(0.03)
    start = time.perf_counter()
    faulty.write(taken, rows)
    assert time.perf_counter() - start >= 0.03
    faulty.truncate_slot(0, keep=100)
    faulty.flip_bit(0, bit=9)
    faulty.read(np.asarray([0]), into := torch.ones_like(rows))
    expected = torch.zeros_like(rows)
    expected[:, :100] = rows[:, :100]
    expected[0, 1] ^= 2
    assert torch.equal(into, expected)
