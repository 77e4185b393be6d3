"""Where a prompt ends, and which of its queries are remembered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.prompt import PromptTracker
from kvtier.core.selection import PromptWindow
from kvtier.errors import InputError


def window(first: int, tokens: int) -> PromptWindow:
    """Queries that hold their own positions."""
    positions = torch.arange(first, first + tokens)
    return PromptWindow(
        query=positions.double()[None, None, :, None].expand(1, 2, -1, 3).clone(),
        lse=-positions.double()[None, None].expand(1, 2, -1).clone(),
        positions=positions[None],
    )


def windows(tracker: PromptTracker, layer: int, rows: int) -> list[PromptWindow | None]:
    """The windows that a tracker hands out."""
    return [None if seen is None else seen.window for seen in tracker.take(layer, rows)]


def test_sums_of_chunks_add_up_and_belong_to_their_layer_and_row() -> None:
    tracker = PromptTracker()
    tracker.add(0, 1, torch.tensor([[1.0, 2.0]]))
    tracker.add(0, 1, torch.tensor([[10.0, 20.0, 30.0]]))
    tracker.add(1, 1, torch.tensor([[5.0]]))
    twin = tracker.fork()
    twin.add(0, 1, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))

    (nothing, seen) = tracker.reordered([0, 1]).take(0, 2)
    assert nothing is None
    assert seen is not None
    assert seen.sums is not None
    assert seen.sums.tolist() == [[11.0, 22.0, 30.0]]
    (_, apart) = twin.take(0, 2)
    assert apart is not None
    assert apart.sums is not None
    assert apart.sums.tolist() == [[11.0, 22.0, 30.0, 1.0]]


@given(tokens=st.lists(st.integers(1, 9), min_size=1, max_size=6), width=st.integers(1, 12))
def test_the_last_queries_of_a_prompt_are_gathered_over_its_chunks(tokens: list[int], width: int) -> None:
    tracker, first = PromptTracker(), 0
    for count in tokens:
        tracker.note(0, 0, window(max(first, first + count - width), min(count, width)), width)
        first += count

    (gathered,) = windows(tracker, 0, 1)

    assert gathered is not None
    expected = window(max(0, first - width), min(first, width))
    assert torch.equal(gathered.positions, expected.positions)
    assert torch.equal(gathered.query, expected.query)
    assert torch.equal(gathered.lse, expected.lse)
    assert tracker.take(0, 1) == [None], "windows are handed out once"


def test_windows_belong_to_their_layer_and_row() -> None:
    tracker = PromptTracker()
    tracker.note(0, 1, window(3, 2), 4)
    tracker.note(1, 0, window(7, 1), 4)
    moved = tracker.reordered([1, 1, 0])

    assert [None if held is None else held.positions.tolist() for held in windows(moved, 0, 3)] == [
        [[3, 4]],
        [[3, 4]],
        None,
    ]
    assert [None if held is None else held.positions.tolist() for held in windows(moved, 1, 3)] == [None, None, [[7]]]
    held = tracker.take(0, 2)
    assert held[0] is None
    assert held[1] is not None


def test_without_an_announcement_each_append_of_several_tokens_is_a_prompt() -> None:
    tracker = PromptTracker()
    assert tracker.decoding(1)
    tracker.appended(12, 12)
    assert (tracker.end, tracker.decoding(12), tracker.decoding(13)) == (12, False, True)
    tracker.appended(13, 1)
    assert tracker.end == 12
    tracker.appended(16, 3)
    assert tracker.end == 16


def test_once_announced_only_announced_tokens_are_prompts() -> None:
    tracker = PromptTracker()
    tracker.announce(10)
    tracker.appended(4, 4)
    assert not tracker.decoding(4)
    tracker.appended(10, 6)
    assert not tracker.decoding(10)
    tracker.appended(15, 5)
    assert tracker.end == 10
    assert tracker.decoding(15)


def test_an_append_may_not_pass_the_end_of_an_announced_prompt() -> None:
    tracker = PromptTracker()
    tracker.check(0, 99)
    tracker.announce(10)
    tracker.check(0, 10)
    tracker.check(10, 5)
    with pytest.raises(InputError, match="3 tokens are left of the announced prompt, got 4; append what follows apart"):
        tracker.check(7, 4)


@pytest.mark.parametrize(("left", "end"), [(4, 4), (12, 10)])
def test_a_crop_into_the_prompt_ends_it_there(left: int, end: int) -> None:
    tracker = PromptTracker()
    tracker.announce(10)
    tracker.crop(left)
    assert tracker.end == end


def test_a_crop_forgets_the_queries_of_the_running_prompt() -> None:
    tracker = PromptTracker()
    tracker.announce(10)
    tracker.note(0, 0, window(0, 4), 4)
    tracker.crop(2)
    assert tracker.take(0, 1) == [None]


def test_forks_go_their_own_way() -> None:
    tracker = PromptTracker()
    tracker.note(0, 0, window(0, 2), 4)
    twin = tracker.fork()
    twin.announce(5)
    twin.note(0, 0, window(2, 1), 4)

    assert tracker.end is None
    (held,) = tracker.take(0, 1)
    assert held is not None
    assert held.window is not None
    assert held.window.positions.tolist() == [[0, 1]]
    assert twin.take(0, 1) != [None]
