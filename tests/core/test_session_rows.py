"""Rows that are equal share their pages, grow apart when they differ, and are permuted as a beam search asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from kvtier.core.memory import Memory
from kvtier.core.session import Session
from kvtier.errors import CapacityError, SessionStateError
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import StepSource, open_memory

EXACT = 1e-10


def held_pages(memory: Memory) -> int:
    return memory.groups[0].store.table.live


def run_both(source: StepSource, tokens: int, session: Session, plain: PlainSession, *, equal: bool = False) -> None:
    step = source.take(tokens, equal=equal)
    for got, expected in zip(step.run(session), step.run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("policy", ["full", "quest(dense_layers=0, read=4096)"])
def test_four_equal_beams_take_the_bytes_of_one(policy: str) -> None:
    used = {}
    for beams in (1, 4):
        with closing(open_memory(policy_text=policy)) as memory:
            source, session, plain = StepSource(rows=beams), memory.session(), PlainSession(3)
            run_both(source, 203, session, plain, equal=True)
            held = session.report().device_bytes
            used[beams] = held["pages"] + held.get("sketches", 0)
            assert session.report().bytes["device"].allocated - used[beams] == held["tails"]
            assert held_pages(memory) == 3 * 2 * 50
            assert held["tails"] == beams * 3 * 8 * small_layout().layers[0].token_bytes

    assert used[4] == used[1], "pages and sketches are shared, only tails of one block are not"


def test_beams_grow_apart_and_are_reordered() -> None:
    with closing(open_memory(policy_text="quest(dense_layers=1, read=4096)", device=400_000)) as memory:
        source, session, plain = StepSource(rows=4), memory.session(), PlainSession(3)
        run_both(source, 61, session, plain, equal=True)
        shared = held_pages(memory)
        for order in ([0, 0, 2, 3], [3, 3, 3, 1], [2, 1, 0, 3], [1, 1, 1, 1]):
            session.reorder(order)
            plain.reorder(order)
            run_both(source, 1, session, plain)
            run_both(source, 9, session, plain)
        assert held_pages(memory) > shared, "what differs is not shared"
        session.crop(40)
        plain.crop(40)
        assert held_pages(memory) <= shared
        run_both(source, 12, session, plain)
        session.close()
        assert held_pages(memory) == 0


def test_a_crop_after_a_reorder_knows_the_padding_of_each_row() -> None:
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(rows=3), memory.session(), PlainSession(3)
        spans = [slice(0, 12), slice(9, 12), slice(0, 5)]
        step = source.take(12).padded(spans, [0, 0, 0])
        step.run(session)
        step.run(plain)
        for each in (session, plain):
            each.reorder([2, 0, 1])
            each.crop(7)

        step = source.take(1).padded([slice(0, 1)] * 3, [20, 20, 20])
        for got, expected in zip(step.run(session), step.run(plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


def test_rows_equal_in_keys_and_not_in_values_or_positions_do_not_share() -> None:
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(rows=3), memory.session(), PlainSession(3)
        step = source.take(16, equal=True)
        values = tuple(part.clone() for part in step.values)
        for part in values:
            part[1, :, 3] += 1
        positions = step.positions.clone()
        positions[2] += 1
        step = replace(step, values=values, positions=positions)
        step.run(session)
        step.run(plain)

        assert held_pages(memory) == 3 * 3 * 2 * 4
        step = replace(source.take(1), positions=torch.tensor([[16], [16], [17]]))
        for got, expected in zip(step.run(session), step.run(plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


def test_rows_that_bring_the_same_tokens_to_different_pasts_do_not_share() -> None:
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(rows=2), memory.session(), PlainSession(3)
        run_both(source, 8, session, plain, equal=True)
        run_both(source, 8, session, plain)
        run_both(source, 16, session, plain, equal=True)
        run_both(source, 1, session, plain)

        assert held_pages(memory) == 3 * 2 * (2 + 2 * 6)


def test_rows_dropped_by_a_reorder_are_freed() -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(rows=3), memory.session()
        source.take(16).run(session)
        assert held_pages(memory) == 3 * 24
        session.reorder([2, 2])
        assert (held_pages(memory), session.rows) == (24, 2)
        session.reorder([0])
        assert (held_pages(memory), session.rows) == (24, 1)


def test_a_fork_keeps_its_contents_when_the_original_goes_on_or_closes() -> None:
    with closing(open_memory(small_layout(window=6), device=150_000)) as memory:
        source, session, plain = StepSource(memory.layout, rows=2), memory.session(), PlainSession(3)
        run_both(source, 45, session, plain)
        twin, plain_twin = session.fork(), plain.fork()
        run_both(source, 13, session, plain)
        session.crop(0)
        session.close()
        source.position = 45
        run_both(source, 20, twin, plain_twin)
        twin.close()

        assert held_pages(memory) == 0
        assert memory.groups[0].ledger.in_use == 0


@pytest.fixture
def crowded() -> Iterator[Memory]:
    """Room for the tails of two rows and a third of two more."""
    tails = 2 * 3 * 8 * small_layout().layers[0].token_bytes
    with closing(open_memory(device=tails + tails // 3, host=None)) as memory:
        yield memory


def test_a_fork_without_room_takes_nothing_and_changes_nothing(crowded: Memory) -> None:
    source, session, plain = StepSource(rows=2), crowded.session(), PlainSession(3)
    run_both(source, 3, session, plain)
    before = crowded.groups[0].ledger.in_use

    with pytest.raises(CapacityError, match="tails"):
        session.fork()

    assert crowded.groups[0].ledger.in_use == before
    run_both(source, 2, session, plain)


def test_a_reorder_without_room_leaves_a_session_that_can_only_be_closed(crowded: Memory) -> None:
    source, session = StepSource(rows=2), crowded.session()
    source.take(3).run(session)

    with pytest.raises(CapacityError, match="tails"):
        session.reorder([0, 1, 1, 0])

    with pytest.raises(SessionStateError, match=r"a reorder failed before .* close this session"):
        source.take(1).run(session)
    session.close()
    assert crowded.groups[0].ledger.in_use == 0


def test_a_beam_search_needs_room_for_its_rows_only(crowded: Memory) -> None:
    source, session, plain = StepSource(rows=2), crowded.session(), PlainSession(3)
    run_both(source, 3, session, plain)
    session.reorder([1, 1])
    plain.reorder([1, 1])
    run_both(source, 2, session, plain)


def test_rows_without_room_for_their_tails_take_nothing() -> None:
    tail = 8 * small_layout().layers[0].token_bytes
    with closing(open_memory(device=4 * tail, host=None)) as memory:
        session = memory.session()
        with pytest.raises(CapacityError, match="tails"):
            StepSource(rows=2).take(1).run(session)

        session.close()
        assert memory.groups[0].ledger.in_use == 0
