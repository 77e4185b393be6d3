"""Append-only arrays and sketches: forks never see each other's appends, bytes are counted until the last owner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.growable import GrowingArray, GrowingSketch
from kvtier.core.ledger import Ledger
from kvtier.errors import CapacityError

ROWS = 2
MOST_OWNERS = 4


def numbered(first: int, count: int, rows: int = ROWS) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Columns [rows, count] that no other call has made."""
    return np.arange(first, first + count)[None] * 10 + np.arange(rows)[:, None]


def sketch_of(first: int, count: int) -> dict[str, torch.Tensor]:
    """Two summaries [Hk, count, ...] of different shape and type."""
    low = torch.from_numpy(numbered(first, count)).double()[..., None].expand(-1, -1, 3).contiguous()
    return {"low": low, "high": (-low).float()[..., :1].contiguous()}


def test_one_row_of_columns_stands_for_all_rows() -> None:
    array = GrowingArray(3, np.int64)
    array.append(np.array([[4, 5]]))

    assert array.view.tolist() == [[4, 5]] * 3


def test_rows_may_come_to_differ_later() -> None:
    array = GrowingArray(1, np.int64)
    array.append(np.array([[4, 5]]))
    twin = array.fork()
    array.append(np.array([[6], [7]]))

    assert array.view.tolist() == [[4, 5, 6], [4, 5, 7]]
    assert twin.view.tolist() == [[4, 5]]


def test_the_first_fork_to_append_goes_on_in_place() -> None:
    array = GrowingArray(1, np.int64)
    array.append(numbered(0, 3, 1))
    twin = array.fork()
    array.append(numbered(3, 2, 1))
    assert np.shares_memory(array.view, twin.view)
    twin.append(numbered(9, 2, 1))

    assert not np.shares_memory(array.view, twin.view)
    assert array.view.tolist() == [[0, 10, 20, 30, 40]]
    assert twin.view.tolist() == [[0, 10, 20, 90, 100]]


def test_a_sketch_with_room_reserved_does_not_move() -> None:
    ledger = Ledger("cpu", None)
    sketch = GrowingSketch(ledger)
    sketch.append(sketch_of(0, 1), reserve=40)
    before = sketch.views()["low"].data_ptr()
    sketch.append(sketch_of(1, 39), reserve=40)

    assert sketch.views()["low"].data_ptr() == before
    assert ledger.in_use == ledger.peak == sketch.nbytes == 2 * 40 * (3 * 8 + 4)


def test_a_sketch_beyond_the_budget_keeps_what_it_has() -> None:
    ledger = Ledger("cpu", 2 * 4 * (3 * 8 + 4))
    sketch = GrowingSketch(ledger)
    sketch.append(sketch_of(0, 4), reserve=4)

    with pytest.raises(CapacityError, match="sketches"):
        sketch.append(sketch_of(4, 1), reserve=1)

    assert sketch.length == 4
    assert torch.equal(sketch.views()["low"][0], sketch_of(0, 4)["low"])
    sketch.release()
    assert ledger.in_use == 0


class ForkMachine(RuleBasedStateMachine):
    """Owners of one history that append, truncate, fork and release, as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.arrays: list[tuple[GrowingArray[np.int64], list[int]]] = [(GrowingArray(ROWS, np.int64), [])]
        self.next = 0

    @rule(owner=st.integers(0, MOST_OWNERS - 1), count=st.integers(0, 30))
    def append(self, owner: int, count: int) -> None:
        array, expected = self.arrays[owner % len(self.arrays)]
        array.append(numbered(self.next, count))
        expected += range(self.next, self.next + count)
        self.next += count

    @rule(owner=st.integers(0, MOST_OWNERS - 1), share=st.floats(0, 1))
    def truncate(self, owner: int, share: float) -> None:
        array, expected = self.arrays[owner % len(self.arrays)]
        length = int(share * len(expected))
        array.truncate(length)
        del expected[length:]

    @precondition(lambda self: len(self.arrays) < MOST_OWNERS)
    @rule(owner=st.integers(0, MOST_OWNERS - 1))
    def fork(self, owner: int) -> None:
        array, expected = self.arrays[owner % len(self.arrays)]
        self.arrays.append((array.fork(), list(expected)))

    @precondition(lambda self: len(self.arrays) > 1)
    @rule(owner=st.integers(0, MOST_OWNERS - 1))
    def release(self, owner: int) -> None:
        array, _ = self.arrays.pop(owner % len(self.arrays))
        array.release()

    @invariant()
    def every_owner_sees_its_own_columns(self) -> None:
        for array, expected in self.arrays:
            assert array.length == len(expected)
            assert (array.view == np.array(expected, dtype=np.int64)[None] * 10 + np.arange(ROWS)[:, None]).all()


class SketchMachine(RuleBasedStateMachine):
    """The same for sketches, whose bytes the ledger counts once however many owners share them."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("cpu", None)
        self.sketches: list[tuple[GrowingSketch, list[int]]] = [(GrowingSketch(self.ledger), [])]
        self.next = 0

    @rule(owner=st.integers(0, MOST_OWNERS - 1), count=st.integers(1, 20), reserve=st.integers(0, 50))
    def append(self, owner: int, count: int, reserve: int) -> None:
        sketch, expected = self.sketches[owner % len(self.sketches)]
        sketch.append(sketch_of(self.next, count), reserve)
        expected += range(self.next, self.next + count)
        self.next += count

    @rule(owner=st.integers(0, MOST_OWNERS - 1), share=st.floats(0, 1))
    def truncate(self, owner: int, share: float) -> None:
        sketch, expected = self.sketches[owner % len(self.sketches)]
        length = int(share * len(expected))
        sketch.truncate(length)
        del expected[length:]

    @precondition(lambda self: len(self.sketches) < MOST_OWNERS)
    @rule(owner=st.integers(0, MOST_OWNERS - 1))
    def fork(self, owner: int) -> None:
        sketch, expected = self.sketches[owner % len(self.sketches)]
        self.sketches.append((sketch.fork(), list(expected)))

    @precondition(lambda self: len(self.sketches) > 1)
    @rule(owner=st.integers(0, MOST_OWNERS - 1))
    def release(self, owner: int) -> None:
        sketch, _ = self.sketches.pop(owner % len(self.sketches))
        sketch.release()

    @invariant()
    def every_owner_sees_its_own_pages(self) -> None:
        for sketch, expected in self.sketches:
            assert sketch.length == len(expected)
            if expected:
                pages = [sketch_of(page, 1) for page in expected]
                for name, view in sketch.views().items():
                    assert torch.equal(view[0], torch.cat([page[name] for page in pages], dim=1))

    @invariant()
    def bytes_are_those_of_the_distinct_buffers(self) -> None:
        buffers = {
            view.untyped_storage().data_ptr(): view.untyped_storage().nbytes()
            for sketch, _ in self.sketches
            for view in sketch.views().values()
        }
        assert self.ledger.in_use == sum(buffers.values())

    def teardown(self) -> None:
        for sketch, _ in self.sketches:
            sketch.release()
        assert self.ledger.in_use == 0


TestForkMachine = ForkMachine.TestCase
TestSketchMachine = SketchMachine.TestCase
