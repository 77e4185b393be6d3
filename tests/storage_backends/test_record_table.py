"""The table of records against a dict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvtier.storage_backends.record_table import RecordTable, Rows, join_keys
from kvtier.storage_backends.segment.rows import FIELDS


def key_of(number: int, *, alike: bool) -> bytes:
    """Keys that count upwards, or that agree but for one word: nothing that a hash should rely on."""
    return number.to_bytes(32, "big") if alike else bytes(8) + number.to_bytes(8, "little") + bytes(16)


def rows(*sequences: int) -> Rows:
    at = np.zeros(len(sequences), dtype=FIELDS)
    at["sequence"], at["segment"] = sequences, 1
    return at


class TableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = RecordTable(FIELDS, "segment")
        self.model: dict[bytes, int] = {}
        self.clock = 0

    @rule(numbers=st.sets(st.integers(0, 400), max_size=200), alike=st.booleans())
    def insert(self, numbers: set[int], alike: bool) -> None:
        new = [key for key in (key_of(number, alike=alike) for number in numbers) if key not in self.model]
        sequences = list(range(self.clock, self.clock + len(new)))
        self.clock += len(new)
        found = self.table.insert(join_keys(new), rows(*sequences))
        assert self.table.at["sequence"][found].tolist() == sequences
        self.model |= dict(zip(new, sequences, strict=True))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            gone = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=150))
            self.table.remove(self.table.find(join_keys(gone)))
            for key in gone:
                del self.model[key]

    @invariant()
    def agrees_with_a_dict(self) -> None:
        keys = [key_of(number, alike=alike) for number in range(400) for alike in (False, True)]
        found = self.table.find(join_keys(keys))
        assert [key in self.model for key in keys] == (found >= 0).tolist()
        a_few_at_a_time = [self.table.find(join_keys(keys[at : at + 32])) for at in range(0, len(keys), 32)]
        assert np.concatenate(a_few_at_a_time).tolist() == found.tolist()
        there = found[found >= 0]
        expected = [self.model[key] for key in keys if key in self.model]
        assert self.table.at["sequence"][there].tolist() == expected
        assert self.table.count == len(set(self.model)) == self.table.live().size == self.table.lying_at(1).size


def test_any_sequence_of_calls_agrees_with_a_dict() -> None:
    run_state_machine_as_test(TableMachine)


@given(count=st.integers(0, 3000))
def test_memory_stays_in_bounds(count: int) -> None:
    table = RecordTable(FIELDS, "segment")
    for at in range(0, count, 100):
        batch = range(at, min(count, at + 100))
        table.insert(join_keys([number.to_bytes(32, "little") for number in batch]), rows(*batch))
    assert table.held_bytes <= 200 * max(count, 64)


@pytest.mark.parametrize("rounds", [300])
def test_records_that_come_and_go_cost_no_more(rounds: int) -> None:
    table = RecordTable(FIELDS, "segment")
    for turn in range(rounds):
        batch = range(turn * 50, turn * 50 + 50)
        table.insert(join_keys([number.to_bytes(32, "little") for number in batch]), rows(*batch))
        if turn >= 4:
            old = range((turn - 4) * 50, (turn - 4) * 50 + 50)
            for number in old:
                table.remove(table.find(join_keys([number.to_bytes(32, "little")])))
    assert table.count == 200
    assert table.held_bytes < 64_000
