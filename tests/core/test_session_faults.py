"""A session over a bad disk: lost pages and failed writes are errors, never other attention, and close frees all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.core.memory import Memory
from kvtier.core.pages import NVME
from kvtier.core.session import Session
from kvtier.errors import PagesLostError, SessionStateError, StorageError
from kvtier.storage_backends.wrappers import VerifiedSlots
from kvtier.testing.faults import FaultySlots
from kvtier.testing.oracles import PlainSession
from kvtier.testing.steps import StepSource, open_memory

POLICIES = ["full", "quest(dense_layers=1, read=4096)"]
BUDGETS = {"quest": 250_000}


def broken_disk(memory: Memory) -> FaultySlots:
    """Put faults between the digests and the file of the NVMe tier."""
    verified = memory.groups[0].store.lower.backends[NVME]
    assert isinstance(verified, VerifiedSlots)
    verified.inner = FaultySlots(verified.inner)
    return verified.inner


def stored_slots(memory: Memory) -> list[int]:
    table = memory.groups[0].store.table
    only_there = table.copy[NVME] & ~table.copy[:NVME].any(axis=0)
    slots: list[int] = table.slot[NVME][np.flatnonzero(only_there)].tolist()
    return slots


def fill(source: StepSource, *sessions: Session | PlainSession) -> None:
    for _ in range(8):
        step = source.take(40)
        for session in sessions:
            step.run(session)


def nothing_is_left(memory: Memory) -> bool:
    store, ledger = memory.groups[0].store, memory.groups[0].ledger
    used = [backend.used_slots for backend in store.lower.backends.values()]
    return store.table.live == 0 and not any(used) and ledger.in_use == 0


@pytest.fixture
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Memory]:
    with closing(
        open_memory(
            policy_text=request.param,
            device=BUDGETS.get(request.param[:5], 110_000),
            host="16KiB",
            nvme="8MiB",
            path=tmp_path,
        )
    ) as opened:
        yield opened


@pytest.mark.parametrize("memory", POLICIES, indirect=True)
def test_a_damaged_page_is_lost_loudly_and_close_frees_the_rest(memory: Memory) -> None:
    disk, source, session = broken_disk(memory), StepSource(), memory.session()
    fill(source, session)
    for slot in stored_slots(memory):
        disk.flip_bit(slot, 5)

    with pytest.raises(PagesLostError, match=r"do not match their digest; call handle\.recover\(\)"):
        source.take(1).run(session)

    assert memory.groups[0].ledger.by_purpose["staging"] == 0
    session.close()
    assert nothing_is_left(memory)


@pytest.mark.parametrize("memory", POLICIES, indirect=True)
def test_each_flipped_page_is_an_error_or_was_not_read(memory: Memory) -> None:
    disk, source, session, plain = broken_disk(memory), StepSource(), memory.session(), PlainSession(3)
    fill(source, session, plain)
    positions = torch.tensor([[source.position - 1]])
    query = source.take(1).queries
    lost = 0
    for slot in stored_slots(memory)[::7]:
        disk.flip_bit(slot, 100)
        for layer in range(3):
            expected = plain.attend(layer, query[layer], positions, scale=0.3)
            try:
                got = session.attend(layer, query[layer], positions, scale=0.3)
            except PagesLostError:
                lost += 1
            else:
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        disk.flip_bit(slot, 100)
    assert lost == len(stored_slots(memory)[::7]), "each page belongs to one layer, and every layer reads all"


@pytest.mark.parametrize("memory", ["full"], indirect=True)
def test_a_read_that_failed_once_may_be_tried_again(memory: Memory) -> None:
    disk, source, session, plain = broken_disk(memory), StepSource(), memory.session(), PlainSession(3)
    fill(source, session, plain)
    step = source.take(1)
    session.append(0, step.keys[0], step.values[0], step.positions)
    plain.append(0, step.keys[0], step.values[0], step.positions)
    disk.fail_read()

    with pytest.raises(PagesLostError, match=r"nvme tier cannot be read .*Input/output error"):
        session.attend(0, step.queries[0], step.positions, scale=0.3)

    got = session.attend(0, step.queries[0], step.positions, scale=0.3)
    expected = plain.attend(0, step.queries[0], step.positions, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory", ["full"], indirect=True)
def test_a_write_that_failed_ends_the_session_and_loses_no_other(memory: Memory) -> None:
    disk, source, session = broken_disk(memory), StepSource(), memory.session()
    other, other_source, plain = memory.session(), StepSource(seed=1), PlainSession(3)
    fill(other_source, other, plain)
    disk.fill_disk()
    with pytest.raises(StorageError, match="No space left"):
        fill(source, session)

    with pytest.raises(SessionStateError, match=r"an append failed before .*No space left.* close this session"):
        source.take(1).run(session)
    session.close()
    disk.free_disk()
    step = other_source.take(1)
    for got, expected in zip(step.run(other), step.run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    other.close()
    assert nothing_is_left(memory)


@pytest.mark.parametrize("memory", ["snapkv(window=8, keep=64)"], indirect=True)
def test_pages_lost_during_an_eviction_end_the_session(memory: Memory) -> None:
    disk, source, session = broken_disk(memory), StepSource(), memory.session()
    session.expect(330)
    fill(source, session)
    step = source.take(10)
    session.append(0, step.keys[0], step.values[0], step.positions)
    twin = session.fork()
    before = disk._reads
    twin.attend(0, step.queries[0], step.positions, scale=0.3)
    reads = disk._reads - before
    assert reads > 3, "the prompt must be longer than device and host"
    disk.fail_read(reads * 2 // 3)  # a third is the attention, a third its votes, a third the copy of what is kept

    with pytest.raises(PagesLostError):
        session.attend(0, step.queries[0], step.positions, scale=0.3)

    with pytest.raises(SessionStateError, match=r"an eviction failed before .* close this session"):
        session.attend(0, step.queries[0], step.positions, scale=0.3)
    session.close()
    twin.close()
    assert nothing_is_left(memory)
