"""The history of columns equals a plain table of which column was a real token in which row."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.columns import ColumnHistory

ROWS = 3


def test_a_new_history_is_empty() -> None:
    assert ColumnHistory().empty
    history = ColumnHistory()
    history.note(1)
    assert not history.empty


def test_removing_nothing_counts_nothing() -> None:
    history = ColumnHistory()
    history.note(4, ((0, 4), (2, 4), (3, 4)))

    left, counts = history.without(0, ROWS)

    assert counts == [0, 0, 0]
    assert left.without(4, ROWS)[1] == [4, 2, 1]


def test_padding_may_be_on_the_left_on_the_right_or_everywhere() -> None:
    history = ColumnHistory()
    history.note(10, ((6, 10), (0, 4), (0, 0)))

    left, counts = history.without(3, ROWS)
    assert counts == [3, 0, 0]
    left, counts = left.without(5, ROWS)
    assert counts == [1, 2, 0]
    assert left.without(2, ROWS)[1] == [0, 2, 0]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_stretches_without_padding_are_one(columns: list[int]) -> None:
    history = ColumnHistory()
    for count in columns:
        history.note(count)

    assert len(history._stretches) == 1
    assert history.without(sum(columns), 2)[1] == [sum(columns)] * 2


class HistoryMachine(RuleBasedStateMachine):
    """Against one list of booleans per row, with padding on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.history = ColumnHistory()
        self.table: list[list[bool]] = [[] for _ in range(ROWS)]
        self.forks: list[tuple[ColumnHistory, list[list[bool]]]] = []

    @rule(columns=st.integers(1, 6), padded=st.booleans(), data=st.data())
    def note(self, columns: int, padded: bool, data: st.DataObject) -> None:
        span = st.tuples(st.integers(0, columns), st.integers(0, columns)).map(lambda edges: (min(edges), max(edges)))
        real = tuple(data.draw(span) for _ in range(ROWS)) if padded else None
        self.history.note(columns, real)
        for row, held in enumerate(self.table):
            start, stop = (0, columns) if real is None else real[row]
            held += [start <= column < stop for column in range(columns)]

    @rule(share=st.floats(0, 1))
    def remove(self, share: float) -> None:
        count = int(share * len(self.table[0]))
        expected = [sum(held[len(held) - count :]) for held in self.table]
        self.history, counts = self.history.without(count, ROWS)
        assert counts == expected
        self.table = [held[: len(held) - count] for held in self.table]

    @rule(order=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, order: list[int]) -> None:
        self.history = self.history.reordered(order)
        self.table = [list(self.table[row]) for row in order]

    @precondition(lambda self: len(self.forks) < 3)
    @rule()
    def fork(self) -> None:
        self.forks.append((self.history.fork(), [list(held) for held in self.table]))

    @precondition(lambda self: self.forks)
    @rule()
    def swap(self) -> None:
        """Go on in the oldest fork."""
        self.forks.append((self.history, self.table))
        self.history, self.table = self.forks.pop(0)

    @invariant()
    def every_suffix_has_the_same_counts(self) -> None:
        for history, table in [(self.history, self.table), *self.forks]:
            assert history.empty == (not table[0])
            for count in range(0, len(table[0]) + 1, max(1, len(table[0]) // 4)):
                assert history.without(count, ROWS)[1] == [sum(held[len(held) - count :]) for held in table]


TestHistoryMachine = HistoryMachine.TestCase
