"""Speculated tokens stay raw until they are accepted, and what is not accepted leaves no trace."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import InputError, SessionStateError
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import Step, StepSource, open_memory

EXACT = 1e-10


def assert_same(step: Step, *sessions: object) -> None:
    first, second = (step.run(session) for session in sessions)  # type: ignore[arg-type]
    for got, expected in zip(first, second, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


@given(
    before=st.integers(0, 20),
    drafted=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
    sliding=st.booleans(),
)
def test_any_path_may_be_accepted(before: int, drafted: list[int], data: st.DataObject, sliding: bool) -> None:
    path = sorted(data.draw(st.sets(st.integers(0, sum(drafted) - 1))))
    layout = small_layout(window=6 if sliding else None)
    with closing(open_memory(layout, "quest(dense_layers=1, read=4096)", device=400_000)) as memory:
        source, session, plain = StepSource(layout, rows=2), memory.session(), PlainSession(3)
        session.record_past(sliding)
        if before:
            assert_same(source.take(before), session, plain)
        session.begin_draft()
        plain.begin_draft()
        for tokens in drafted:
            assert_same(source.take(tokens), session, plain)

        session.accept(path)
        plain.accept(path)

        assert session.length == before + len(path)
        assert_same(source.take(1), session, plain)
        assert_same(source.take(11), session, plain)


def test_drafted_tokens_are_not_sealed_and_accepted_blocks_are() -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        source.take(6).run(session)
        tail_bytes = session.report().device_bytes["tails"]
        session.begin_draft()
        for _ in range(5):
            source.take(8).run(session)

        assert memory.groups[0].store.table.live == 0
        assert session.report().device_bytes["tails"] > tail_bytes
        session.accept(range(12))

        assert memory.groups[0].store.table.live == 3 * 2 * (18 // 8 * 2)
        assert session.report().device_bytes["tails"] == tail_bytes


def test_a_prompt_of_speculated_tokens_is_not_evicted() -> None:
    with closing(open_memory(policy_text="snapkv(window=2, keep=8)")) as memory:
        source, session = StepSource(), memory.session()
        source.take(20).run(session)
        assert session.report().kept == 8
        session.begin_draft()
        source.take(6).run(session)
        session.accept(range(4))

        assert session.report().kept == 12


def test_a_draft_may_be_forked() -> None:
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(), memory.session(), PlainSession(3)
        assert_same(source.take(10), session, plain)
        session.begin_draft()
        plain.begin_draft()
        assert_same(source.take(12), session, plain)
        twin = session.fork()
        session.accept([])
        twin.accept([0, 2])
        plain.accept([0, 2])

        assert session.length == 10
        assert_same(source.take(3), twin, plain)


@pytest.mark.parametrize("path", [[-1], [5], [0, 0], [2, 1]])
def test_paths_are_ascending_numbers_of_drafted_tokens(path: list[int]) -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        source.take(3).run(session)
        session.begin_draft()
        source.take(5).run(session)

        with pytest.raises(InputError, match="path must be ascending numbers from 0 to 4, got"):
            session.accept(path)
        session.accept([4])
        assert session.length == 4


def test_one_draft_at_a_time_and_no_crop_into_it() -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        source.take(3).run(session)
        session.begin_draft()

        with pytest.raises(SessionStateError, match=r"a draft is already open; accept\(\) it first"):
            session.begin_draft()
        with pytest.raises(SessionStateError, match=r"a draft is open; accept\(\) it before a crop"):
            session.crop(1)
        session.accept([])
        session.crop(1)
        assert session.length == 2
