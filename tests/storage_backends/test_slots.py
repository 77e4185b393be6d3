"""The slot accounting against a set, and its preference for runs."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CapacityError, InputError
from kvtier.storage_backends.slots import SlotAllocator, as_slots, is_run


def dumb_choice(free: set[int], count: int, capacity: int, starts: list[int]) -> list[int]:
    """First-fit run by trying every start, those that cross into another part last; else the lowest free slots."""
    runs = [range(start, start + count) for start in range(capacity - count + 1)]
    within = [run for run in runs if not any(start in run[1:] for start in starts)]
    for run in within + runs:
        if free.issuperset(run):
            return list(run)
    return sorted(free)[:count]


@given(st.data())
def test_reservations_agree_with_trying_every_start(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(0, 24), label="capacity")
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, max(1, capacity - 1)), max_size=3), label="starts"))]
    starts = starts if starts[-1] < capacity else [0]
    slots, free = SlotAllocator(capacity, starts), set(range(capacity))
    for _ in range(data.draw(st.integers(0, 30), label="steps")):
        used = sorted(set(range(capacity)) - free)
        if used and bool(data.draw(st.integers(0, 1), label="release")):
            gone = data.draw(st.lists(st.sampled_from(used), unique=True), label="gone")
            slots.release(np.asarray(gone, dtype=np.int64))
            free |= set(gone)
        else:
            count = data.draw(st.integers(0, len(free)), label="count")
            expected = dumb_choice(free, count, capacity, starts)
            assert slots.reserve(count).tolist() == expected
            free -= set(expected)
        assert slots.free == len(free)
        parts = [range(start, stop) for start, stop in pairwise([*starts, capacity])]
        assert slots.used == [len(part) - len(free.intersection(part)) for part in parts]


def test_what_cannot_be_reserved_is_said() -> None:
    slots = SlotAllocator(4)
    slots.reserve(3)

    with pytest.raises(CapacityError, match=r"required 2 free slots, got 1 of 4; release slots"):
        slots.reserve(2)
    with pytest.raises(InputError, match="at least 0"):
        slots.reserve(-1)
    assert slots.free == 1


def test_many_wrong_slots_are_named_in_short() -> None:
    slots = SlotAllocator(100)

    with pytest.raises(InputError, match=r"0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        slots.release(np.arange(100))


def test_a_slot_named_twice_is_found_in_any_order() -> None:
    slots = SlotAllocator(8)
    slots.reserve(8)

    with pytest.raises(InputError, match=r"got 3 more than once"):
        slots.release(np.asarray([3, 1, 3]))
    slots.release(np.asarray([3, 1, 0]))
    assert slots.free == 3


@pytest.mark.parametrize("wrong", [[[1]], [0.5], ["1"], [-1], [4]])
def test_what_is_no_slot_is_refused(wrong: list[object]) -> None:
    with pytest.raises(InputError, match="slots must"):
        as_slots(np.asarray(wrong), 4)


@pytest.mark.parametrize(
    ("slots", "run"), [([], True), ([5], True), ([5, 6, 7], True), ([5, 7], False), ([6, 5], False)]
)
def test_runs_are_recognised(slots: list[int], run: bool) -> None:
    assert is_run(as_slots(np.asarray(slots), 8)) == run
