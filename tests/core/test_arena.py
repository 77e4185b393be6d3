"""Arenas: runs are views of the frames they name, whatever the fragmentation, and frames are counted exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.arena import Arena
from kvtier.core.ledger import Ledger
from kvtier.core.policy import IntArray
from kvtier.errors import CapacityError
from kvtier.types import LayerLayout

LAYER = LayerLayout(num_query_heads=2, num_kv_heads=2, key_dim=3, value_dim=2, dtype="float64")
PAGE = 4
FRAME_BYTES = PAGE * (3 + 2) * 8


def arena(*slabs: int, limit: int | None = None) -> Arena:
    made = Arena(LAYER, PAGE, torch.device("cpu"), Ledger("cpu", limit))
    for frames in slabs:
        made.grow(frames)
    return made


def contents(frames: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """K [n, P, 3] and V [n, P, 2] that name their frame, slot and channel."""
    names = torch.from_numpy(frames.ravel()).double()[:, None, None] * 1000
    slots = torch.arange(PAGE, dtype=torch.float64)[None, :, None] * 10
    return names + slots + torch.arange(3), -(names + slots + torch.arange(2))


def fill(target: Arena, frames: IntArray) -> None:
    target.write(frames.ravel(), *contents(frames))


def test_frame_bytes_are_those_of_a_page() -> None:
    assert arena().frame_bytes == FRAME_BYTES


def test_a_fresh_arena_gives_one_run_per_head_side_by_side() -> None:
    frames = arena(20).allocate(2, 5)

    assert frames.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_spare_columns_stay_free_behind_every_head_and_are_taken_by_extend() -> None:
    pool = arena(40)
    first, second = pool.allocate(2, 5, spare=2), pool.allocate(2, 5, spare=2)

    assert [first[0, 0], first[1, 0], second[0, 0], second[1, 0]] == [0, 7, 14, 21]
    assert pool.free_frames == 20
    grown = pool.extend(first[:, -1], 2)
    assert grown is not None
    assert grown.tolist() == [[5, 6], [12, 13]]
    places, rest = pool.places(np.concatenate([first, grown], axis=1))
    assert (len(places), rest.size) == (1, 0)
    assert pool.extend(grown[:, -1], 1) is None, "what lies behind belongs to another head now"
    assert pool.free_frames == 16


def test_spare_columns_are_nobodys_and_given_up_when_there_is_no_room() -> None:
    pool = arena(13)
    first = pool.allocate(2, 3, spare=2)
    second = pool.allocate(1, 4, spare=9)

    assert first.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert second.tolist() == [[8, 9, 10, 11]]
    assert pool.extend(first[:, -1], 2) is None
    assert pool.extend(second[:, -1], 2) is None, "a slab ends"


def test_run_keys_and_values_are_the_frames_and_share_their_memory() -> None:
    pool = arena(20)
    pool.allocate(1, 3)
    frames = pool.allocate(2, 4)
    fill(pool, frames)

    (run,), rest = pool.runs(frames)

    keys, values = contents(frames)
    assert (run.start, run.stop, rest.size) == (0, 4, 0)
    assert torch.equal(run.keys, keys.reshape(2, 4 * PAGE, 3))
    assert torch.equal(run.values, values.reshape(2, 4 * PAGE, 2))
    run.keys[1, 5] = 7.0
    assert (pool.read(frames[1:, 1])[0][0, 1] == 7.0).all(), "a run must be a view of the arena"


def test_a_table_of_one_head_is_cut_where_frames_are_not_neighbours() -> None:
    pool = arena(10)
    pool.allocate(1, 10)
    frames = np.array([[4, 5, 6, 2, 9]])
    fill(pool, frames)

    runs, rest = pool.runs(frames)

    assert [(run.start, run.stop) for run in runs] == [(0, 3), (3, 4), (4, 5)]
    assert rest.size == 0
    for run in runs:
        assert torch.equal(run.keys[0], contents(frames[:, run.start : run.stop])[0].flatten(0, 1))


def test_columns_whose_heads_lie_at_unequal_distances_are_left_over() -> None:
    pool = Arena(
        LayerLayout(num_query_heads=3, num_kv_heads=3, key_dim=3, value_dim=2, dtype="float64"),
        PAGE,
        torch.device("cpu"),
        Ledger("cpu", None),
    )
    pool.grow(12)
    pool.allocate(1, 12)

    runs, rest = pool.runs(np.array([[0, 1, 2, 11], [4, 5, 3, 10], [8, 9, 7, 6]]))

    assert [(run.start, run.stop) for run in runs] == [(0, 2)]
    assert rest.tolist() == [2, 3], "unequal and descending distances have no stride"


def test_neighbouring_slabs_never_join_into_one_run() -> None:
    pool = arena(2, 2)
    frames = pool.allocate(1, 4)
    fill(pool, frames)

    runs, _ = pool.runs(frames)

    assert len(runs) == 2
    found = torch.cat([run.keys[0] for run in runs])
    assert torch.equal(found, contents(frames)[0].flatten(0, 1))


def test_heads_in_different_slabs_are_no_run() -> None:
    pool = arena(2, 2)
    first, second = pool.bounds(0)[0], pool.bounds(1)[0]
    pool.allocate(1, 4)

    runs, rest = pool.runs(np.array([[first], [second]]))

    assert (runs, rest.tolist()) == ([], [0])


def test_no_columns_have_no_runs() -> None:
    runs, rest = arena(4).runs(np.empty((2, 0), dtype=np.int64))

    assert (runs, rest.size) == ([], 0)


def test_scattered_frames_are_used_when_no_run_is_left() -> None:
    pool = arena(6)
    taken = pool.allocate(1, 6)
    pool.release(taken[:, ::2])

    frames = pool.allocate(3, 1)
    fill(pool, frames)

    assert sorted(frames.ravel().tolist()) == [0, 2, 4]
    assert torch.equal(pool.read(frames.ravel())[0], contents(frames)[0])
    assert pool.free_frames == 0


def test_allocating_more_than_is_free_changes_nothing() -> None:
    pool = arena(5)

    with pytest.raises(CapacityError, match="6 page frames were needed, 5 are free"):
        pool.allocate(2, 3)

    assert pool.free_frames == 5
    assert np.unique(pool.allocate(1, 5)).size == 5


def test_growth_is_counted_and_refused_beyond_the_budget() -> None:
    pool = arena(3, limit=4 * FRAME_BYTES)

    assert pool.may_grow(1)
    assert not pool.may_grow(2)
    with pytest.raises(CapacityError, match="cannot hold"):
        pool.grow(2)
    assert (pool.total_frames, pool.slabs, pool._ledger.in_use) == (3, 1, 3 * FRAME_BYTES)


def test_dropping_a_slab_gives_its_bytes_back_and_keeps_the_others() -> None:
    pool = arena(2, 3, 4)
    frames = pool.allocate(1, 9)
    fill(pool, frames)
    kept = frames[0][(frames[0] < pool.bounds(1)[0]) | (frames[0] >= pool.bounds(1)[1])]
    pool.release(np.setdiff1d(frames, kept))
    before = pool.version

    assert pool.empty_slabs() == [1]
    assert pool.slab_bytes(1) == 3 * FRAME_BYTES
    pool.drop(1)

    assert (pool.total_frames, pool.free_frames, pool.slabs) == (6, 0, 2)
    assert pool._ledger.in_use == 6 * FRAME_BYTES
    assert pool.version > before, "cached views must go stale"
    assert torch.equal(pool.read(kept)[0], contents(kept)[0])


def test_ids_of_a_dropped_slab_are_not_used_again() -> None:
    pool = arena(3)
    old = set(pool.allocate(1, 3).ravel().tolist())
    pool.release(np.array(sorted(old)))
    pool.drop(0)
    pool.grow(3)

    assert not old & set(pool.allocate(1, 3).ravel().tolist())


def test_repack_keeps_contents_and_holds_no_frame_too_many() -> None:
    pool = arena(7, 5, 4)
    frames = pool.allocate(1, 16)[0]
    fill(pool, frames)
    kept = frames[[14, 1, 8, 3, 11]]
    pool.release(np.setdiff1d(frames, kept))

    moved = pool.repack(kept)

    assert torch.equal(pool.read(moved)[0], contents(kept)[0])
    assert torch.equal(pool.read(moved)[1], contents(kept)[1])
    assert np.array_equal(np.argsort(moved), np.argsort(kept)), "frames keep their order in memory"
    assert (pool.total_frames, pool.free_frames, pool.slabs) == (5, 0, 1)
    assert pool._ledger.in_use == 5 * FRAME_BYTES


def test_frames_are_found_slab_by_slab() -> None:
    pool = arena(3, 3)
    frames = pool.allocate(1, 6)[0]
    fill(pool, frames)
    second = frames[frames >= pool.bounds(1)[0]]

    (found,) = pool.slabs_of(second)
    parts = pool.slabs_of(frames)

    index = torch.from_numpy(second - found.first)
    assert found.inside is None
    assert torch.equal(found.keys[index], contents(second)[0])
    assert torch.equal(found.values[index], contents(second)[1])
    assert all(part.inside is not None for part in parts)
    assert np.array_equal(parts[0].inside, frames < second[0])
    assert np.array_equal(parts[1].inside, frames >= second[0])


@given(
    slabs=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    freed=st.sets(st.integers(0, 35)),
    heads=st.integers(1, 3),
)
def test_runs_and_the_rest_cover_every_column_once(slabs: list[int], freed: set[int], heads: int) -> None:
    pool = arena(*slabs)
    taken = pool.allocate(1, pool.total_frames)[0]
    pool.release(taken[[index for index in sorted(freed) if index < taken.size]])
    frames = pool.allocate(heads, pool.free_frames // heads)
    fill(pool, frames)

    runs, rest = pool.runs(frames)

    covered = [column for run in runs for column in range(run.start, run.stop)] + rest.tolist()
    assert sorted(covered) == list(range(frames.shape[1]))
    for run in runs:
        keys, values = contents(frames[:, run.start : run.stop])
        assert torch.equal(run.keys, keys.reshape(heads, -1, 3))
        assert torch.equal(run.values, values.reshape(heads, -1, 2))
