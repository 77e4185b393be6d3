"""Calls that do not fit: refused with what was required and what was got, and nothing has changed after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch

from kvtier.core.memory import Memory
from kvtier.core.session import Session
from kvtier.errors import CapacityError, InputError, KVTierError, SessionStateError
from kvtier.testing.oracles import PlainSession
from kvtier.testing.steps import SCALE, Step, StepSource, open_memory

BadCall = Callable[[Session, Step], object]


@pytest.fixture
def memory() -> Iterator[Memory]:
    with closing(open_memory()) as opened:
        yield opened


def shuffled(step: Step) -> torch.Tensor:
    """Positions that are right in the first row only."""
    positions = step.positions.clone()
    positions[1] = positions[1].flip(0)
    return positions


BAD_APPENDS: dict[str, tuple[str, BadCall]] = {
    "no such layer": ("layer must be 0 to 2", lambda s, t: s.append(3, t.keys[0], t.values[0], t.positions)),
    "negative layer": ("layer must be 0 to 2", lambda s, t: s.append(-1, t.keys[0], t.values[0], t.positions)),
    "rows": ("layer 0 needs keys", lambda s, t: s.append(0, t.keys[0][:1], t.values[0][:1], t.positions[:1])),
    "heads": ("layer 0 needs keys", lambda s, t: s.append(0, t.keys[0][:, :1], t.values[0][:, :1], t.positions)),
    "type": ("float64", lambda s, t: s.append(0, t.keys[0].float(), t.values[0].float(), t.positions)),
    "values": ("layer 0 needs keys", lambda s, t: s.append(0, t.keys[0], t.values[0][:, :, 1:], t.positions)),
    "positions": ("positions must be", lambda s, t: s.append(0, t.keys[0], t.values[0], t.positions[:, 1:])),
    "order of one row": ("must ascend", lambda s, t: s.append(0, t.keys[0], t.values[0], shuffled(t))),
    "spans": ("2 slices", lambda s, t: s.append(0, t.keys[0], t.values[0], t.positions, spans=[slice(0, 5)])),
}
BAD_ATTENDS: dict[str, tuple[str, BadCall]] = {
    "no such layer": ("layer must be 0 to 2", lambda s, t: s.attend(3, t.queries[0], t.positions, scale=SCALE)),
    "negative layer": ("layer must be 0 to 2", lambda s, t: s.attend(-1, t.queries[0], t.positions, scale=SCALE)),
    "rows": ("for the 2 rows", lambda s, t: s.attend(0, t.queries[0][:1], t.positions[:1], scale=SCALE)),
    "heads": ("needs queries", lambda s, t: s.attend(0, t.queries[0][:, :2], t.positions, scale=SCALE)),
    "dim": ("needs queries", lambda s, t: s.attend(0, t.queries[0][..., 1:], t.positions, scale=SCALE)),
    "positions": ("positions must be", lambda s, t: s.attend(0, t.queries[0], t.positions[:, 1:], scale=SCALE)),
    "spans": ("2 slices", lambda s, t: s.attend(0, t.queries[0], t.positions, scale=SCALE, spans=[slice(0, 5)])),
}
BAD_CALLS: dict[str, tuple[str, BadCall]] = {
    "crop more than there is": ("crop takes 0 to 13 columns, got 14", lambda s, _: s.crop(14)),
    "crop a negative number": ("crop takes 0 to 13 columns, got -1", lambda s, _: s.crop(-1)),
    "reorder to no row": ("numbers from 0 to 1, got \\[\\]", lambda s, _: s.reorder([])),
    "reorder beyond the rows": ("numbers from 0 to 1, got \\[0, 2\\]", lambda s, _: s.reorder([0, 2])),
    "expect nothing": ("at least 1 token, got 0", lambda s, _: s.expect(0)),
    "accept without a draft": ("nothing to accept", lambda s, _: s.accept([0])),
}
ALL_BAD = BAD_APPENDS | {f"attend: {name}": call for name, call in BAD_ATTENDS.items()} | BAD_CALLS


@pytest.mark.parametrize("case", ALL_BAD)
def test_a_refused_call_changes_nothing(memory: Memory, case: str) -> None:
    message, call = ALL_BAD[case]
    source, session, plain = StepSource(rows=2), memory.session(), PlainSession(3)
    first = source.take(13)
    first.run(session)
    first.run(plain)
    before = session.report().to_dict() | {"seconds": {}}
    step = source.take(5)

    with pytest.raises(KVTierError, match=message):
        call(session, step)

    assert session.report().to_dict() | {"seconds": {}} == before
    for got, expected in zip(step.run(session), step.run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    session.crop(5)
    assert session.length == 13


@pytest.mark.parametrize("case", sorted(BAD_APPENDS.keys() - {"rows"}))
def test_a_refused_first_append_leaves_the_session_empty(memory: Memory, case: str) -> None:
    message, call = BAD_APPENDS[case]
    session = memory.session()

    with pytest.raises(InputError, match=message):
        call(session, StepSource(rows=2).take(5))

    assert (session.rows, session.length) == (0, 0)
    assert session.report().bytes["device"].allocated == 0
    StepSource(rows=3).take(4).run(session)
    assert session.rows == 3


def test_attending_before_appending_is_refused(memory: Memory) -> None:
    session, step = memory.session(), StepSource().take(5)
    with pytest.raises(InputError, match="for the 0 rows that were appended"):
        session.attend(0, step.queries[0], step.positions, scale=SCALE)
    session.append(0, step.keys[0], step.values[0], step.positions)

    with pytest.raises(SessionStateError, match=r"nothing was appended to layer 1; append\(\)"):
        session.attend(1, step.queries[1], step.positions, scale=SCALE)


def test_a_step_that_did_not_reach_every_layer_must_be_finished_first(memory: Memory) -> None:
    source, session, plain = StepSource(), memory.session(), PlainSession(3)
    first, second = source.take(9), source.take(2)
    first.run(plain)
    session.append(0, first.keys[0], first.values[0], first.positions)

    with pytest.raises(SessionStateError, match="layer 1 has seen 0 of 9 columns: the last step did not finish"):
        session.append(0, second.keys[0], second.values[0], second.positions)

    for layer in (1, 2):
        session.append(layer, first.keys[layer], first.values[layer], first.positions)
    for got, expected in zip(second.run(session), second.run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_an_append_may_not_pass_the_end_of_an_announced_prompt(memory: Memory) -> None:
    source, session, plain = StepSource(), memory.session(), PlainSession(3)
    session.expect(12)
    first = source.take(9)
    first.run(session)
    first.run(plain)
    with pytest.raises(InputError, match="3 tokens are left of the announced prompt, got 5; append what follows apart"):
        source.take(5).run(session)

    source.position = 9
    for tokens in (3, 5):
        step = source.take(tokens)
        for got, expected in zip(step.run(session), step.run(plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


CALLS: dict[str, Callable[[Session, Step], object]] = {
    "append": lambda s, t: s.append(0, t.keys[0], t.values[0], t.positions),
    "attend": lambda s, t: s.attend(0, t.queries[0], t.positions, scale=SCALE),
    "expect": lambda s, _: s.expect(4),
    "fork": lambda s, _: s.fork(),
    "crop": lambda s, _: s.crop(0),
    "reorder": lambda s, _: s.reorder([0]),
    "accept": lambda s, _: s.accept([]),
    "record_past": lambda s, _: s.record_past(True),
    "report": lambda s, _: s.report(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_session_refuses_every_call_but_close(memory: Memory, name: str) -> None:
    source = StepSource()
    with memory.session() as session:
        source.take(11).run(session)
    session.close()

    with pytest.raises(SessionStateError, match=r"closed; make a new one with memory\.session\(\)"):
        CALLS[name](session, source.take(1))
    assert memory.groups[0].ledger.in_use == 0


def test_a_closed_memory_makes_no_session_and_lets_open_ones_close() -> None:
    memory = open_memory(device=160_000)
    source, session = StepSource(), memory.session()
    for _ in range(20):
        source.take(40).run(session)
    assert session.report().bytes["host"].used > 0
    memory.close()
    memory.close()

    with pytest.raises(SessionStateError, match="memory is closed; patch the model again"):
        memory.session()
    session.close()
    assert memory.groups[0].ledger.in_use == 0


def fill(source: StepSource, session: Session) -> None:
    for _ in range(400):
        source.take(7).run(session)


@pytest.mark.parametrize("policy", ["full", "quest(dense_layers=0, read=64)", "snapkv(keep=24, window=4)"])
@pytest.mark.parametrize("budget", [12_000, 30_000, 60_000, 96_000, 150_000])
def test_a_session_that_found_no_room_says_so_until_it_is_closed(policy: str, budget: int) -> None:
    memory = open_memory(policy_text=policy, device=budget, host="8KiB")
    source, session = StepSource(), memory.session()
    session.expect(1 << 20)
    with pytest.raises(CapacityError):
        fill(source, session)

    with pytest.raises(SessionStateError, match=r"append failed before .* close this session|did not finish"):
        source.take(7).run(session)
    session.close()

    assert memory.groups[0].ledger.peak <= budget
    assert memory.groups[0].ledger.in_use == 0, memory.groups[0].ledger.describe()
    assert memory.groups[0].store.table.live == 0
    assert all(backend.used_slots == 0 for backend in memory.groups[0].store.lower.backends.values())
    memory.close()
