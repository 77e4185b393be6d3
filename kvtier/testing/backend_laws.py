"""The laws of slot backends: subclass `SlotBackendLaws` in a test file and they run on your backend."""
# ruff: noqa: S101 - laws are made of assert

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from kvtier.errors import CapacityError, ConfigError, DamagedSlotsError, InputError, StorageError
from kvtier.storage_backends.base import SlotBackend
from kvtier.storage_backends.wrappers import VerifiedSlots, WrappedSlots
from kvtier.testing.backend_machine import SlotMachine, random_rows
from kvtier.testing.faults import FaultySlots
from kvtier.testing.leaks import NoLeaks

__all__ = ["BackendFactory", "SlotBackendLaws"]

BackendFactory: TypeAlias = Callable[[int, int], SlotBackend]
"""Opens a fresh backend of (slot_bytes, capacity_slots)."""

_SLOT_BYTES = st.sampled_from([1, 24, 1000, 4096, 8192, 12_289])
# The factory fixture opens a fresh backend at each call, so sharing it between examples is safe.
_LAW = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)
_SLACK_BYTES = 64 * 4096  # tables of a file system, whole pages of slabs


class SlotBackendLaws(NoLeaks):
    """What every slot backend keeps; override the fixture ``backend``.

    Examples
    --------
    ::

        class TestMySlots(SlotBackendLaws):
            @pytest.fixture
            def backend(self, tmp_path: Path) -> BackendFactory:
                return lambda slot_bytes, capacity_slots: MySlots(slot_bytes, capacity_slots, tmp_path)
    """

    @pytest.fixture
    def backend(self) -> BackendFactory:
        """Say how a backend is opened: ``(slot_bytes, capacity_slots) -> SlotBackend``."""
        pytest.fail("override the fixture 'backend': return a function (slot_bytes, capacity_slots) -> SlotBackend")

    @_LAW
    @given(slot_bytes=_SLOT_BYTES, data=st.data())
    def test_any_order_of_slots_round_trips(
        self, backend: BackendFactory, slot_bytes: int, data: st.DataObject
    ) -> None:
        """Row i goes to and comes from slot i, whatever the order, repeated on reading too."""
        with backend(slot_bytes, 40) as opened:
            slots = opened.reserve(data.draw(st.integers(1, 40), label="slots"))
            written = np.asarray(data.draw(st.permutations(slots.tolist()), label="written"), dtype=np.int64)
            rows = random_rows(0, slots.size, slot_bytes)
            opened.write(written, rows)
            expected = dict(zip(written.tolist(), rows, strict=True))
            asked = data.draw(st.lists(st.sampled_from(slots.tolist()), max_size=50), label="read")
            into = torch.zeros(len(asked), slot_bytes, dtype=torch.uint8)

            opened.read(np.asarray(asked, dtype=np.int64), into)

            assert all(torch.equal(row, expected[slot]) for row, slot in zip(into, asked, strict=True))

    @_LAW
    @given(
        slot_bytes=_SLOT_BYTES, offset=st.integers(0, 9), step=st.integers(1, 3), order=st.permutations(list(range(6)))
    )
    def test_rows_may_be_views(
        self, backend: BackendFactory, slot_bytes: int, offset: int, step: int, order: list[int]
    ) -> None:
        """Rows need not be aligned or adjacent, and nothing beside them is touched."""
        with backend(slot_bytes, 8) as opened:
            slots = opened.reserve(6)[order]
            wide = random_rows(1, 6 * step, slot_bytes + 16)
            view = wide[::step, offset : offset + slot_bytes]
            opened.write(slots, view)
            target = torch.zeros(6 * step, slot_bytes + 16, dtype=torch.uint8)

            opened.read(slots, target[::step, offset : offset + slot_bytes])

            assert torch.equal(target[::step, offset : offset + slot_bytes], view)
            assert target.count_nonzero() == view.count_nonzero(), "bytes outside the view were touched"

    @_LAW
    @given(data=st.data())
    def test_overwriting_some_slots_leaves_the_others(self, backend: BackendFactory, data: st.DataObject) -> None:
        """A write changes its own slots only."""
        with backend(5000, 24) as opened:
            slots = opened.reserve(24)
            rows = random_rows(2, 24, 5000)
            opened.write(slots, rows)
            some = np.asarray(data.draw(st.lists(st.integers(0, 23), unique=True, min_size=1)), dtype=np.int64)
            rows[torch.from_numpy(some)] = random_rows(3, some.size, 5000)
            opened.write(slots[some], rows[torch.from_numpy(some)])
            into = torch.zeros_like(rows)

            opened.read(slots, into)

            assert torch.equal(into, rows)

    @pytest.mark.parametrize("capacity", [0, 1, 37])
    def test_capacity_is_exact(self, backend: BackendFactory, capacity: int) -> None:
        """Every slot can be had and not one more; a refusal takes nothing."""
        with backend(8192, capacity) as opened:
            assert (opened.free_slots, opened.used_slots) == (capacity, 0)
            with pytest.raises(CapacityError, match=f"required {capacity + 1} .* got {capacity}"):
                opened.reserve(capacity + 1)
            assert opened.free_slots == capacity, "a reservation that failed took slots"
            assert opened.reserve(capacity).tolist() == list(range(capacity))
            assert (opened.free_slots, opened.used_slots) == (0, capacity)
            assert opened.reserve(0).size == 0

    def test_a_run_is_preferred_and_scattered_slots_are_the_last_resort(self, backend: BackendFactory) -> None:
        """The lowest run that fits, else the lowest slots."""
        with backend(64, 16) as opened:
            opened.reserve(16)
            opened.release(np.asarray([1, 3, 8, 9, 10]))

            assert opened.reserve(3).tolist() == [8, 9, 10]
            assert opened.reserve(2).tolist() == [1, 3]

    def test_a_wrong_release_changes_nothing(self, backend: BackendFactory) -> None:
        """Slots unknown, free, or named twice are refused, with all that were named beside them."""
        with backend(4096, 8) as opened:
            opened.release(opened.reserve(8)[4:])
            for wrong in ([4], [0, 4], [0, 0], [-1], [8], [[1]], [0.5]):
                with pytest.raises(InputError):
                    opened.release(np.asarray(wrong))
            assert opened.used_slots == 4

    def test_wrong_transfers_are_refused(self, backend: BackendFactory) -> None:
        """Slots must be reserved, rows must be bytes of the right shape on the CPU."""
        with backend(4096, 8) as opened:
            slots = opened.reserve(2)
            rows = torch.zeros(2, 4096, dtype=torch.uint8)
            for transfer in (opened.write, opened.read):
                with pytest.raises(InputError, match="reserved"):
                    transfer(slots + 1, rows)
                for wrong in (rows[:1], rows[:, 1:], rows.view(torch.int8), rows.to("meta")):
                    with pytest.raises(InputError, match="rows must be uint8"):
                        transfer(slots, wrong)
            with pytest.raises(InputError, match="once"):
                opened.write(slots[[0, 0]], rows)

    def test_impossible_sizes_are_refused(self, backend: BackendFactory) -> None:
        """Sizes are checked before anything is opened."""
        for slot_bytes, capacity_slots in ((0, 1), (-4096, 1), (4096, -1)):
            with pytest.raises(ConfigError, match="must be at least"):
                backend(slot_bytes, capacity_slots)

    @_LAW
    @given(slot_bytes=_SLOT_BYTES, budget=st.integers(0, 1 << 22))
    def test_slots_within_a_budget_keep_it(self, backend: BackendFactory, slot_bytes: int, budget: int) -> None:
        """`slots_within` is nearly all that a budget of bytes can hold, and not more."""
        with backend(slot_bytes, 0) as opened:
            innermost = opened
            while isinstance(innermost, WrappedSlots):
                innermost = innermost.inner
            count = innermost.slots_within(slot_bytes, budget)
        with backend(slot_bytes, count) as opened:
            assert 0 <= budget - opened.capacity_bytes < _SLACK_BYTES

    @pytest.mark.parametrize("slot_bytes", [1000, 8192])
    def test_what_is_held_never_exceeds_the_capacity(self, backend: BackendFactory, slot_bytes: int) -> None:
        """Bytes held cover what was written and stay under the bound; closed, they are none."""
        with backend(slot_bytes, 512) as opened:
            bound = opened.capacity_bytes + _SLACK_BYTES
            for turn in range(1, 17):
                slots = opened.reserve(32)
                opened.write(slots, random_rows(4, 32, slot_bytes))
                assert turn * 32 * slot_bytes <= opened.allocated_bytes <= bound
        assert opened.allocated_bytes == 0

    def test_close_is_idempotent_and_final(self, backend: BackendFactory) -> None:
        """A second close does nothing; every other call says that the backend is closed."""
        opened = backend(4096, 4)
        slots = opened.reserve(2)
        rows = random_rows(5, 2, 4096)
        opened.write(slots, rows)
        opened.close()
        opened.close()
        for call in (
            lambda: opened.reserve(1),
            lambda: opened.release(slots),
            lambda: opened.write(slots, rows),
            lambda: opened.read(slots, rows),
        ):
            with pytest.raises(StorageError, match="closed"):
                call()

    def test_threads_on_different_slots_do_not_meet(self, backend: BackendFactory) -> None:
        """Threads reserve, write, read and release beside each other."""
        rounds, size = 12, 8192
        start = threading.Barrier(4)

        def transfer(opened: SlotBackend, worker: int) -> bool:
            start.wait(timeout=30)
            for turn in range(rounds):
                slots = opened.reserve(16 + worker)
                rows = random_rows(worker * rounds + turn, slots.size, size)
                opened.write(slots, rows)
                into = torch.zeros_like(rows)
                opened.read(slots, into)
                opened.release(slots)
                if not torch.equal(into, rows):
                    return False
            return True

        with backend(size, 80) as opened, ThreadPoolExecutor(4) as pool:
            assert all(pool.map(transfer, [opened] * 4, range(4)))
            assert opened.used_slots == 0

    @_LAW
    @given(data=st.data())
    def test_never_a_wrong_byte_when_verified(self, backend: BackendFactory, data: st.DataObject) -> None:
        """Under any damage at rest a verified read is right or names exactly the damaged slots."""
        with VerifiedSlots(faulty := FaultySlots(backend(600, 12))) as verified:
            slots = verified.reserve(12)
            rows = random_rows(6, 12, 600) | 1
            verified.write(slots, rows)
            damaged = data.draw(st.lists(st.integers(0, 11), unique=True), label="damaged")
            for slot in damaged:
                _damage(faulty, slot, data)
            into = torch.zeros_like(rows)
            if damaged:
                with pytest.raises(DamagedSlotsError) as caught:
                    verified.read(slots, into)
                assert caught.value.slots == tuple(sorted(damaged))
                rows[damaged] = 0
            else:
                verified.read(slots, into)
            assert torch.equal(into, rows)
            assert verified.verified_bytes == (12 - len(damaged)) * 600

    def test_any_sequence_of_calls_agrees_with_a_dict(self, backend: BackendFactory) -> None:
        """The backend is a dict with a bound."""

        class Machine(SlotMachine):
            def __init__(self) -> None:
                super().__init__(backend(1000, 20))

        run_state_machine_as_test(Machine)


def _damage(faulty: FaultySlots, slot: int, data: st.DataObject) -> None:
    """Damage one slot at rest."""
    if data.draw(st.booleans(), label="flip"):
        faulty.flip_bit(slot, data.draw(st.integers(0, 600 * 8 - 1), label="bit"))
    else:
        faulty.truncate_slot(slot, data.draw(st.integers(0, 599), label="keep"))
