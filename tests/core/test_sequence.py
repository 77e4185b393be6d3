"""One sequence in one layer: whatever is appended, forked and cropped, its slots are those of a plain tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.attention import segments_of
from kvtier.core.memory import Memory
from kvtier.core.sequence import LayerSequence
from kvtier.errors import SessionStateError
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import open_memory

TOKENS = 37
BUDGET = 60_000


@pytest.fixture(params=["full", "quest(dense_layers=0, read=64)"])
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    with closing(open_memory(policy_text=request.param, device=BUDGET)) as opened:
        yield opened


def tokens(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """K [2, n, 6], V [2, n, 4] and positions [1, n] that name their token; positions have gaps."""
    names = torch.arange(start, stop, dtype=torch.float64)[None, :, None] + torch.tensor([0.0, 1000.0])[:, None, None]
    return (
        (names + torch.arange(6) / 8).contiguous(),
        -(names + torch.arange(4) / 8).contiguous(),
        3 * np.arange(start, stop)[None],
    )


def opened(memory: Memory, count: int = TOKENS) -> LayerSequence:
    sequence = memory.sequence(0)
    assert isinstance(sequence, LayerSequence)
    if count:
        sequence.append(*tokens(0, count))
    return sequence


def demote_all(memory: Memory) -> None:
    store = memory.groups[0].store
    store.tick()
    store.demote(store.arena.total_frames, 0)


def check(sequence: LayerSequence, expected: list[int]) -> None:
    """The slots are these tokens, in K, V, positions and sketches."""
    assert sequence.length == len(expected)
    keys = torch.full((2, len(expected), 6), torch.nan, dtype=torch.float64)
    values = torch.full((2, len(expected), 4), torch.nan, dtype=torch.float64)
    with segments_of(sequence) as segments:
        for segment in segments:
            keys[:, segment.start : segment.stop] = segment.keys[0]
            values[:, segment.start : segment.stop] = segment.values[0]
    every = tokens(0, max(expected, default=0) + 1)
    assert torch.equal(keys, every[0][:, expected])
    assert torch.equal(values, every[1][:, expected])
    assert (sequence.positions.view == every[2][:, expected]).all()
    assert sequence.last_position == (int(every[2][0, expected[-1]]) if expected else None)
    if sequence.sketch is not None:
        assert sequence.sketch.length == sequence.pages.length
        if sequence.sealed:
            pages = keys[:, : sequence.sealed].unflatten(1, (-1, 4))
            assert torch.equal(sequence.sketch.views()["low"][0], pages.amin(2))
            assert torch.equal(sequence.sketch.views()["high"][0], pages.amax(2))


@pytest.mark.parametrize("count", range(26))
def test_full_blocks_are_sealed_and_the_rest_stays_raw(memory: Memory, count: int) -> None:
    sequence = opened(memory, count)

    assert sequence.sealed == count // 8 * 8
    assert sequence.tail_length == count % 8
    check(sequence, list(range(count)))


@given(cuts=st.sets(st.integers(1, TOKENS - 1)))
def test_any_chunks_make_the_same_sequence(cuts: set[int]) -> None:
    with closing(open_memory(device=BUDGET)) as memory:
        sequence = opened(memory, 0)
        edges = [0, *sorted(cuts), TOKENS]
        for start, stop in pairwise(edges):
            sequence.append(*tokens(start, stop))

        assert sequence.sealed == 32
        check(sequence, list(range(TOKENS)))


@pytest.mark.parametrize("demoted", [False, True], ids=["on the device", "below"])
def test_a_crop_at_every_length_keeps_what_came_before_and_goes_on(memory: Memory, demoted: bool) -> None:
    sequence = opened(memory)
    for remove in range(TOKENS + 1):
        if demoted:
            demote_all(memory)
        twin = sequence.fork()
        twin.crop(remove)
        left = list(range(TOKENS - remove))
        check(twin, left)
        for start in (TOKENS, TOKENS + 9):
            twin.append(*tokens(start, start + 9))
        check(twin, left + list(range(TOKENS, TOKENS + 18)))
        twin.release()

    check(sequence, list(range(TOKENS)))


@pytest.mark.parametrize("demoted", [False, True], ids=["on the device", "below"])
def test_a_fork_at_every_length_grows_apart(memory: Memory, demoted: bool) -> None:
    for count in range(0, TOKENS, 3):
        one = opened(memory, count)
        if demoted:
            demote_all(memory)
        two = one.fork()
        one.append(*tokens(count, count + 10))
        two.append(*tokens(count + 50, count + 61))

        check(one, list(range(count + 10)))
        check(two, [*range(count), *range(count + 50, count + 61)])
        one.release()
        check(two, [*range(count), *range(count + 50, count + 61)])
        two.release()
    assert memory.groups[0].store.table.live == 0


def test_forks_share_pages_and_copy_the_tail() -> None:
    with closing(open_memory(device=BUDGET)) as memory:
        one = opened(memory)
        pages = memory.groups[0].store.table.live
        forks = [one.fork() for _ in range(3)]

        assert memory.groups[0].store.table.live == pages
        assert memory.groups[0].ledger.by_purpose["tails"] == 4 * memory.groups[0].tail_bytes(8)
        for sequence in [*forks, one]:
            sequence.release()
        assert memory.groups[0].store.table.live == 0
        assert memory.groups[0].ledger.by_purpose["tails"] == 0


def test_versions_are_equal_exactly_when_contents_are_shared() -> None:
    with closing(open_memory()) as memory:
        one = opened(memory)
        two, three = one.fork(), one.fork()
        assert one.version is two.version
        three.append(*tokens(TOKENS, TOKENS + 1))
        assert one.version is not three.version
        two.crop(1)
        assert one.version is not two.version
        two.append(*tokens(TOKENS - 1, TOKENS))
        assert one.version is not two.version


def test_replacing_slots_gives_heads_different_tokens_and_ends_the_croppable_past(memory: Memory) -> None:
    sequence = opened(memory)
    keys, values, positions = tokens(0, TOKENS)
    slots = np.stack([np.arange(0, 22, 2), np.arange(1, 12)])
    index = torch.from_numpy(slots)[..., None]
    kept = keys.gather(1, index.expand(-1, -1, 6)), values.gather(1, index.expand(-1, -1, 4))
    sequence.replace(*kept, np.take_along_axis(np.repeat(positions, 2, 0), slots, 1))
    sequence.append(*tokens(TOKENS, TOKENS + 6))

    assert (sequence.length, sequence.evicted_length, sequence.croppable) == (17, 11, 6)
    with segments_of(sequence) as segments:
        for segment in segments:
            stop = min(segment.stop, 11)
            assert torch.equal(segment.keys[0, :, : stop - segment.start], kept[0][:, segment.start : stop])
    with pytest.raises(SessionStateError, match="cannot remove 7 tokens: only 6 came after the last eviction"):
        sequence.check_crop(7)
    sequence.check_crop(6)
    sequence.crop(6)
    assert sequence.positions.view.tolist() == (3 * slots).tolist()


def test_sequences_that_grow_side_by_side_stay_in_one_run_each() -> None:
    with closing(open_memory(small_layout())) as memory:
        sequences = [memory.sequence(layer) for layer in range(2)]
        memory.groups[0].planned_frames = 400
        for sequence in sequences:
            sequence.append(*tokens(0, 64))
        for at in range(64, 128):
            for sequence in sequences:
                sequence.append(*tokens(at, at + 1))
        for sequence in sequences:
            assert isinstance(sequence, LayerSequence)
            segments = sequence.segments_in_place()
            assert segments is not None
            assert len(segments) <= 3, "the prompt, one run for what was generated, the tail"
            check(sequence, list(range(128)))


def test_a_crop_frees_the_pages_beyond_it(memory: Memory) -> None:
    sequence = opened(memory)
    assert memory.groups[0].store.table.live == 2 * 8
    sequence.crop(TOKENS - 9)
    assert memory.groups[0].store.table.live == 2 * 2
    sequence.crop(2)
    assert memory.groups[0].store.table.live == 0


def test_runs_are_views_and_pages_elsewhere_are_read_in_staged_groups() -> None:
    with closing(open_memory(small_layout(), device=BUDGET)) as memory:
        sequence = opened(memory, 64)
        assert sequence.loose_columns == 0
        arena = memory.groups[0].arena
        with segments_of(sequence) as segments:
            slab = {arena._slabs[index].keys.untyped_storage().data_ptr() for index in range(arena.slabs)}
            assert all(segment.keys.untyped_storage().data_ptr() in slab for segment in segments)
        demote_all(memory)

        assert sequence.loose_columns == 16
        ledger = memory.groups[0].ledger
        before, columns = ledger.by_purpose["staging"], memory.groups[0].staging_columns
        assert columns < 16
        with segments_of(sequence) as segments:
            for segment in segments:
                assert segment.stop - segment.start <= columns * 4
                assert ledger.by_purpose["staging"] == memory.groups[0].staging_bytes(16)
        assert ledger.by_purpose["staging"] == before == 0
