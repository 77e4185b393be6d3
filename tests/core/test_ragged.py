"""KV heads of different lengths: what they hold is attended exactly, what they dropped is freed, in every tier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.memory import Memory
from kvtier.core.ragged import UNSEEN, HeadPages, RaggedSequence
from kvtier.core.session import Session
from kvtier.errors import CapacityError, SessionStateError
from kvtier.testing.dense_heads import AdaKVRule, DenseHeadsSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import SCALE, Step, StepSource, open_memory
from kvtier.types import DTypeName, KVLayout

POLICY = "adakv(window=2, kernel=3)"


def layout_of(dtype: DTypeName, *, heads: int, group: int) -> KVLayout:
    return KVLayout.uniform(
        num_layers=2,
        num_query_heads=heads * group,
        num_kv_heads=heads,
        key_dim=8,
        value_dim=8,
        dtype=dtype,
        page_tokens=4,
        block_tokens=8,
        chunk_tokens=16,
    )


def ragged(session: Session, row: int, layer: int) -> RaggedSequence:
    sequence = session._batch.rows[row][layer]
    assert isinstance(sequence, RaggedSequence)
    return sequence


def storage_bytes(memory: Memory) -> int:
    """Bytes of the memory that every slab of every arena really has."""
    return sum(
        pool.untyped_storage().nbytes()
        for group in memory.groups
        for slab in group.arena._slabs
        for pool in (slab.keys, slab.values)
    )


@contextmanager
def prompted(memory: Memory, *, tokens: int, rows: int = 1, seed: int = 0) -> Iterator[tuple[Session, StepSource]]:
    """A session whose prompt has ended."""
    source = StepSource(memory.layout, rows=rows, seed=seed)
    with closing(memory), closing(memory.session()) as session:
        session.expect(tokens)
        source.take(tokens).run(session)
        yield session, source


def gathered(sequence: RaggedSequence, step: Step, seen: Sequence[Step], row: int, layer: int) -> torch.Tensor:
    """Attention [Hq, Tq, Dv] of a step over the tokens whose positions a sequence names, gathered head by head."""
    keys, values = (
        torch.cat([getattr(one, name)[layer][row] for one in seen], dim=1).double() for name in ("keys", "values")
    )
    query, group = step.queries[layer][row].double(), step.queries[layer].shape[1] // keys.shape[0]
    outputs = []
    for index in range(query.shape[0]):
        positions = sequence.positions[index // group]
        own = torch.from_numpy(positions[positions != UNSEEN])
        weights = torch.softmax(query[index] @ keys[index // group, own].T * SCALE, dim=1)
        outputs.append(weights @ values[index // group, own])
    return torch.stack(outputs)


def answers(plain: DenseHeadsSession, step: Step) -> list[torch.Tensor]:
    """What the oracle says to a step, layer by layer."""
    outputs = []
    for layer in range(len(step.layout.layers)):
        plain.append(layer, step.keys[layer], step.values[layer], step.positions)
        outputs.append(plain.attend(layer, step.queries[layer], step.positions, scale=SCALE))
    return outputs


@pytest.mark.parametrize(("dtype", "slack"), [("float32", 2e-6), ("bfloat16", 2**-7)])
@settings(max_examples=8)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    chunks=st.lists(st.integers(1, 33), min_size=1, max_size=2),
    keep=st.integers(3, 20),
    steps=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_steps_are_exact_over_what_each_head_kept(
    dtype: DTypeName,
    slack: float,
    rows: int,
    heads: int,
    group: int,
    chunks: list[int],
    keep: int,
    steps: int,
    seed: int,
) -> None:
    layout = layout_of(dtype, heads=heads, group=group)
    source = StepSource(layout, rows=rows, seed=seed)
    with closing(open_memory(layout, POLICY, keep=keep)) as memory, closing(memory.session()) as session:
        session.expect(sum(chunks))
        seen = [source.take(tokens) for tokens in chunks]
        for step in seen:
            step.run(session)
        for _ in range(steps):
            seen.append(source.take(1))
            outputs = seen[-1].run(session)
            for row in range(rows):
                for layer, out in enumerate(outputs):
                    sequence = session._batch.rows[row][layer]
                    if isinstance(sequence, RaggedSequence):
                        right = gathered(sequence, seen[-1], seen, row, layer)
                        torch.testing.assert_close(out[row].double(), right, rtol=0, atol=slack)
        held = [sequence for sequence in session._batch.sequences if isinstance(sequence, RaggedSequence)]
        assert len(held) == (2 * rows if sum(chunks) > keep else 0)
        assert all(int(sequence.counts.sum()) == heads * (keep + steps) for sequence in held)


def test_what_heads_dropped_is_freed_and_the_report_says_what_is_allocated() -> None:
    layout = layout_of("float32", heads=3, group=2)
    with prompted(open_memory(layout, POLICY, keep=40), tokens=400) as (session, source):
        memory = session.memory
        pages = sum(int((-(-ragged(session, 0, layer).counts // 4)).sum()) for layer in range(2))
        full = 400 * sum(one.token_bytes for one in layout.layers)
        used = memory.groups[0].arena.total_frames - memory.groups[0].arena.free_frames

        assert used == pages
        assert pages <= 2 * 3 * (40 // 4 + 1)
        assert storage_bytes(memory) == session.report().device_bytes["pages"]
        assert storage_bytes(memory) * 6 < full
        for _ in range(50):
            source.take(1).run(session)
        assert storage_bytes(memory) == session.report().device_bytes["pages"]
        counts = [ragged(session, 0, layer).counts for layer in range(2)]
        assert all(int(one.sum()) == 3 * 90 for one in counts)
        assert any(one.max() > one.min() for one in counts)
    assert storage_bytes(memory) == 0 == memory.ledgers[memory.devices[0]].in_use


def test_a_head_that_looks_at_little_gives_its_pages_to_one_that_looks_at_much() -> None:
    layout = layout_of("float32", heads=2, group=1)
    with closing(open_memory(layout, "adakv(window=2, kernel=1)", keep=32)) as memory:
        session = memory.session()
        step = StepSource(layout).take(200)
        for layer in range(2):
            step.keys[layer][0, 0] *= 0.0  # attends evenly
            step.keys[layer][0, 1, 17] = 50 * step.queries[layer][0, 1, -2:].sum(0)  # attends to one token
        session.expect(200)
        step.run(session)

        even, sharp = ragged(session, 0, 0).kept.counts.tolist()
        assert (even, sharp) == (64 - (2 + 6), 2 + 6)
        frames = memory.groups[0].arena.total_frames - memory.groups[0].arena.free_frames
        assert frames == 2 * (-(-even // 4) + -(-sharp // 4))
        session.close()


@pytest.mark.parametrize("lower", ["host", "nvme"])
def test_pages_of_unequal_heads_live_in_any_tier(lower: str, tmp_path: Path) -> None:
    layout, rule = small_layout(heads=3), AdaKVRule(window=2, kernel=3, keep=24)
    host, nvme = (None, "1MiB") if lower == "nvme" else ("1MiB", None)
    memory = open_memory(layout, POLICY, keep=24, device=130_000, host=host, nvme=nvme, path=tmp_path)
    with prompted(memory, tokens=120, rows=2) as (session, source):
        plain, again = DenseHeadsSession(layout, rule), StepSource(layout, rows=2)
        answers(plain, again.take(120))
        for number in range(20):
            group = memory.groups[0]
            if number % 3 == 0:
                group.store.tick()
                group.store.demote(group.arena.total_frames - group.arena.free_frames, 0)
                assert ragged(session, 0, 0).kept.in_place() is None
            if number % 5 == 4:
                group.store.tick()
                group.store.promote(ragged(session, 0, 0).kept.ids, batch=64)
                assert ragged(session, 0, 0).kept.in_place() is not None
            step, same = source.take(1), again.take(1)
            for out, right in zip(step.run(session), answers(plain, same), strict=True):
                torch.testing.assert_close(out, right, rtol=0, atol=1e-10)
        held = session.report()
        assert held.bytes["device"].peak <= 130_000
        assert held.pages_read == held.pages_held > 0


def test_rows_of_different_lengths_are_evicted_each_for_itself() -> None:
    layout, rule = small_layout(heads=3), AdaKVRule(window=2, kernel=3, keep=10)
    with closing(open_memory(layout, POLICY, keep=10)) as memory, closing(memory.session()) as session:
        source = StepSource(layout, rows=3)
        spans = [slice(0, 40), slice(29, 40), slice(33, 40)]
        prompt = source.take(40).padded(spans, [0, 0, 0])
        prompt.run(session)
        step = source.take(1).padded([slice(0, 1)] * 3, [40, 11, 7])
        outputs = step.run(session)
        for row, span in enumerate(spans):
            plain = DenseHeadsSession(layout, rule)
            alone = prompt.rows([row])
            answers(plain, replace(alone.columns(span), spans=None))
            for out, right in zip(outputs, answers(plain, replace(step.rows([row]), spans=None)), strict=True):
                torch.testing.assert_close(out[row], right[0], rtol=0, atol=1e-10)


def test_forks_share_pages_and_the_last_owner_frees_them() -> None:
    with prompted(open_memory(small_layout(), POLICY, keep=12), tokens=60) as (session, source):
        table = session.memory.groups[0].store.table
        alone = table.live
        twin = session.fork()
        assert table.live == alone
        source.take(1).run(twin)
        assert ragged(twin, 0, 0).kept is ragged(session, 0, 0).kept
        assert (ragged(twin, 0, 0).counts - ragged(session, 0, 0).counts).tolist() == [1, 1]
        session.close()
        assert table.live == alone
        twin.close()
        assert table.live == 0


def test_equal_rows_keep_one_copy_of_what_their_heads_kept() -> None:
    layout = small_layout(heads=3)
    with closing(open_memory(layout, POLICY, keep=12)) as memory, closing(memory.session()) as session:
        source = StepSource(layout, rows=3)
        session.expect(60)
        source.take(60, equal=True).run(session)
        assert ragged(session, 0, 0).kept is ragged(session, 2, 0).kept
        session.reorder([2, 0, 0])
        source.take(1).run(session)
        assert ragged(session, 0, 1).kept is ragged(session, 2, 1).kept


def test_a_crop_reaches_back_to_the_eviction() -> None:
    with prompted(open_memory(small_layout(), POLICY, keep=12), tokens=60) as (session, source):
        for _ in range(11):
            source.take(1).run(session)
        assert session.croppable == 11
        with pytest.raises(SessionStateError, match="only 11 came after the last eviction"):
            session.crop(12)
        session.crop(11)
        assert session.length == 60
        assert int(ragged(session, 0, 0).counts.sum()) == 2 * 12
        assert ragged(session, 0, 0).last_position == 59


def test_without_room_an_eviction_fails_and_everything_is_given_back() -> None:
    memory = open_memory(small_layout(), POLICY, keep=30, host=None, device=13_000)
    with closing(memory):
        session = memory.session()
        session.expect(44)
        with pytest.raises(CapacityError):
            StepSource(memory.layout).take(44).run(session)
        session.close()
        assert memory.groups[0].store.table.live == 0
        assert memory.ledgers[memory.devices[0]].in_use == 0


def test_pages_that_find_no_room_are_not_held() -> None:
    memory = open_memory(small_layout(), POLICY, keep=30, host=None, device=2_000)
    with closing(memory):
        group = memory.groups[0]
        pages = torch.zeros(200, 4, 6, dtype=torch.float64), torch.zeros(200, 4, 4, dtype=torch.float64)
        counts = np.array([400, 400])
        with pytest.raises(CapacityError):
            HeadPages.write(group, counts, *pages, np.zeros((2, 400), dtype=np.int64))
        assert group.store.table.live == 0


def test_a_query_before_what_is_kept_does_not_see_it() -> None:
    with prompted(open_memory(small_layout(), POLICY, keep=12), tokens=60) as (session, source):
        step = source.take(1)
        earlier = torch.full_like(step.positions, 30)
        sequence = ragged(session, 0, 0)
        out = session.attend(0, step.queries[0], earlier, scale=SCALE)[0]
        held, seen = sequence.positions, StepSource(session.memory.layout).take(60)
        for index in range(4):
            own = held[index // 2][held[index // 2] <= 30]
            weights = torch.softmax(step.queries[0][0, index] @ seen.keys[0][0, index // 2, own].T * SCALE, dim=-1)
            torch.testing.assert_close(out[index], weights @ seen.values[0][0, index // 2, own], rtol=0, atol=1e-10)
