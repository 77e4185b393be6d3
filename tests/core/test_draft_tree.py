"""Trees of drafted tokens: what is one, where its tokens stand, who descends from whom, and which paths lead down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.draft_tree import DraftTree, RowTree, rows_of_path
from kvtier.errors import InputError


def test_one_tree_for_all_rows_or_one_for_each() -> None:
    shared, own = DraftTree.of([None, 0, 0]), DraftTree.of([[None], [None, 0], []])
    assert shared.of_rows(2) == ((None, 0, 0), (None, 0, 0))
    assert own.of_rows(3) == ((None,), (None, 0), ())
    assert (shared.tokens, own.tokens) == (3, 2)
    assert own.spans(3) == (slice(0, 1), slice(0, 2), slice(0, 0))
    assert DraftTree.of(own) is own


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "at least 1 token"),
        ([[], []], "at least 1 token"),
        ([[None]] * 3, "each of the 2 rows, got 3 trees"),
        ([None, [None]], "one list of numbers, or one list for each row"),
    ],
)
def test_what_is_no_tree(parents: list[list[None] | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DraftTree.of(parents).of_rows(2)


@given(draws=st.lists(st.integers(0, 63), min_size=1, max_size=64), root=st.integers(0, 9), split=st.integers(0, 64))
def test_places_and_ancestors(draws: list[int], root: int, split: int) -> None:
    parents = [None if parent in (0, token + 1) or parent > token else parent - 1 for token, parent in enumerate(draws)]
    tree = RowTree()
    for part in (parents[:split], parents[split:]):
        tree = tree.grown(part, tree.places(part, root), last=root - 1, column=len(tree.parents))

    assert tree.columns == tuple(range(len(parents)))
    for token, parent in enumerate(parents):
        line = [token]
        while parent is not None:
            line.insert(0, parent)
            parent = parents[parent]
        assert tree.positions[token] == root + len(line) - 1
        assert tree.ancestors[token] == sum(1 << above for above in line)
        tree.check_path(line)
        if len(line) > 1:
            with pytest.raises(InputError, match="a path leads from"):
                tree.check_path(line[1:])


@pytest.mark.parametrize(
    ("parents", "positions", "message"),
    [
        ([None, 1], [4, 5], "token 1 must follow None, or one of those before it, got parent 1"),
        ([-1], [4], "got parent -1"),
        ([None, 0, 0], [4, 5, 6], "stands one behind the one it follows"),
        ([None, None], [4, 5], "stands one behind"),
        ([None], [3], r"behind the last one held \(at 3\), got parents \[None\] at positions \[3\]"),
        ([None] * 65, [4] * 65, "at most 64 tokens of a row are drafted at a time, got 65"),
    ],
)
def test_tokens_out_of_place(parents: list[int | None], positions: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RowTree().grown(parents, positions, last=3, column=0)


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 0], [0, 1, 1], [3], [-1]])
def test_what_is_no_path(path: list[int]) -> None:
    with pytest.raises(InputError, match="a path leads from a drafted token without a parent"):
        RowTree().grown([None, 0, None], [0, 1, 0], last=None, column=0).check_path(path)


def test_one_path_for_all_rows_or_one_for_each() -> None:
    assert rows_of_path([0, 1], 2) == [[0, 1], [0, 1]]
    assert rows_of_path([[0], []], 2) == [[0], []]
    assert rows_of_path([], 2) == [[], []]
    for wrong in ([[0]], [[0], [0], [0]], [0, [1]]):
        with pytest.raises(InputError, match="one path, or one for each of the 2 rows"):
            rows_of_path(wrong, 2)  # type: ignore[arg-type]
