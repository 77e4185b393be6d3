"""Plans of spans are compared, pair by pair, with what every query may see."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvtier.kernels.spans import (
    Rows,
    Span,
    all_seen,
    batch_row,
    causal_plan,
    fits,
    hidden_pairs,
    plan_blocks,
    whole_plan,
)
from kvtier.types import Visibility


def seen_by_rule(visible: Visibility, heads: int) -> torch.Tensor:
    """Bool [B, heads, Tq, N], pair by pair in Python."""
    batch, queries = visible.q_pos.shape
    keys = visible.k_pos.shape[2]
    seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            places = visible.k_pos[b, h if visible.k_pos.shape[1] > 1 else 0].tolist()
            for i, at in enumerate(visible.q_pos[b].tolist()):
                for j, place in enumerate(places):
                    seen[b, h, i, j] = place <= at and (visible.window is None or place > at - visible.window)
    return seen


def seen_by_plan(plan: list[Rows], visible: Visibility, heads: int) -> torch.Tensor:
    """The same from a plan; rows must cover every query once, in order, and spans of a row must not meet."""
    batch, queries = visible.q_pos.shape
    keys = visible.k_pos.shape[2]
    seen = torch.zeros(batch * heads, queries, keys, dtype=torch.bool)
    assert [rows.start for rows in plan] == [0, *(rows.stop for rows in plan[:-1])]
    assert plan[-1].stop == queries
    for rows in plan:
        for span in rows.spans:
            part = seen[:, rows.start : rows.stop, span.start : span.stop]
            assert part.shape[1] > 0
            assert part.shape[2] > 0
            assert not part.any()
            if span.kind == "masked":
                at, over = slice(rows.start, rows.stop), slice(span.start, span.stop)
                part[:] = ~hidden_pairs(visible, at, over, batch * heads)
            else:
                part[:] = True if span.kind == "visible" else torch.ones(part.shape[1:], dtype=torch.bool).tril()
    return seen.view(batch, heads, queries, keys)


@st.composite
def visibilities(draw: st.DrawFn) -> tuple[Visibility, int]:
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 14)), draw(st.integers(1, 30))
    shape = (batch, draw(st.sampled_from([1, heads])), keys)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    k_pos = torch.randint(0, 40, shape, generator=generator)
    if draw(st.booleans()):
        k_pos = k_pos.sort(-1).values
    q_pos = torch.randint(0, 40, (batch, queries), generator=generator)
    if draw(st.booleans()):
        q_pos = q_pos.sort(-1).values
    return Visibility(q_pos, k_pos, draw(st.none() | st.integers(1, 20))), heads


@given(visibilities(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_hold_exactly_the_visible_pairs(case: tuple[Visibility, int], row_block: int, key_block: int) -> None:
    visible, heads = case
    plan = plan_blocks(visible, row_block, key_block)
    assert seen_by_plan(plan, visible, heads).equal(seen_by_rule(visible, heads))


@given(
    past=st.integers(0, 9),
    before=st.integers(0, 5),
    queries=st.integers(1, 12),
    own=st.integers(0, 12),
    late=st.integers(0, 14),
    row_block=st.integers(1, 6),
    batch=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
def test_a_chunk_needs_no_masks(
    past: int, before: int, queries: int, own: int, late: int, row_block: int, batch: int, seed: int
) -> None:
    assume(past + own > 0)
    generator = torch.Generator().manual_seed(seed)
    first = past + before
    old = torch.randperm(first, generator=generator)[:past]
    keys = torch.cat([old, first + late + torch.arange(own)])
    offsets = torch.arange(batch)[:, None] * 100
    visible = Visibility(first + torch.arange(queries) + offsets, (keys + offsets)[:, None])
    plan = causal_plan(visible, row_block)
    assert plan is not None
    assert all(span.kind != "masked" for rows in plan for span in rows.spans)
    assert seen_by_plan(plan, visible, 2).equal(seen_by_rule(visible, 2))


@given(visibilities(), st.integers(1, 9))
def test_a_causal_plan_is_right_or_refused(case: tuple[Visibility, int], row_block: int) -> None:
    visible, heads = case
    plan = causal_plan(visible, row_block)
    if plan is None:
        consecutive = bool((visible.q_pos.diff() == 1).all())
        assert not consecutive or not bool((visible.k_pos < visible.q_pos[:, None, :1]).all()) or visible.window
    else:
        assert seen_by_plan(plan, visible, heads).equal(seen_by_rule(visible, heads))


CHUNK = torch.arange(10, 18)


@pytest.mark.parametrize(
    ("q_pos", "k_pos", "window"),
    [
        (CHUNK, CHUNK, 7),
        (CHUNK * 2, CHUNK * 2, None),
        (CHUNK, CHUNK.flip(0), None),
        (CHUNK, torch.cat([CHUNK, torch.arange(5)]), None),
        (CHUNK, torch.cat([CHUNK[:3], CHUNK[4:]]), None),
    ],
    ids=["window", "queries with gaps", "keys reversed", "past last", "keys with a hole"],
)
def test_what_is_no_chunk_is_refused(q_pos: torch.Tensor, k_pos: torch.Tensor, window: int | None) -> None:
    assert causal_plan(Visibility(q_pos[None], k_pos[None, None], window), 4) is None


def test_a_window_that_hides_nothing_is_no_obstacle() -> None:
    assert causal_plan(Visibility(CHUNK[None], CHUNK[None, None], 8), 4) is not None


def test_rows_of_a_batch_with_different_pasts_are_refused() -> None:
    q_pos = torch.stack([CHUNK, CHUNK + 1])
    k_pos = torch.stack([CHUNK, CHUNK])[:, None]
    assert causal_plan(Visibility(q_pos, k_pos), 4) is None


def test_whole_blocks_need_no_mask_and_unseen_ones_are_left_out() -> None:
    visible = Visibility(torch.arange(64, 72)[None], torch.arange(128)[None, None])
    assert plan_blocks(visible, 8, 16) == [Rows(0, 8, [Span(0, 64, "visible"), Span(64, 80, "masked")])]


@pytest.mark.parametrize("length", [512, 2048])
def test_a_window_costs_in_proportion_to_the_tokens(length: int) -> None:
    window, block = 64, 16
    position = torch.arange(length)[None]
    plan = plan_blocks(Visibility(position, position[None], window), block, block)
    looked_at = sum((rows.stop - rows.start) * (span.stop - span.start) for rows in plan for span in rows.spans)
    assert looked_at <= length * (window + 2 * block)


def test_every_key_is_in_the_whole_plan() -> None:
    assert whole_plan(5, 9, 2) == [Rows(at, min(at + 2, 5), [Span(0, 9, "visible")]) for at in (0, 2, 4)]


def test_pieces_end_to_end() -> None:
    assert Span(3, 10, "masked").pieces(4) == [Span(3, 7, "masked"), Span(7, 10, "masked")]
    assert Span(3, 10, "visible").pieces(7) == [Span(3, 10, "visible")]
    assert Span(3, 10, "causal").pieces(2) == [Span(3, 10, "causal")]


def test_a_batch_row_alone() -> None:
    visible = Visibility(torch.arange(6).view(2, 3), torch.arange(8).view(2, 1, 4), 5)
    row = batch_row(visible, slice(1, 2))
    assert row is not None
    assert row.q_pos.tolist() == [[3, 4, 5]]
    assert row.k_pos.tolist() == [[[4, 5, 6, 7]]]
    assert row.window == 5
    assert batch_row(None, slice(0, 1)) is None


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "expected"),
    [
        ((2, 3), (2, 1, 7), True),
        ((2, 3), (2, 4, 7), True),
        ((2, 3), (2, 2, 7), False),
        ((2, 2), (2, 1, 7), False),
        ((2, 3), (1, 1, 7), False),
        ((2, 3), (2, 7), False),
        ((2, 3), (2, 1, 8), False),
    ],
)
def test_shapes_of_positions(q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, expected: bool) -> None:
    visible = Visibility(torch.zeros(q_shape, dtype=torch.int64), torch.zeros(k_shape, dtype=torch.int64))
    assert fits(visible, torch.zeros(2, 8, 3, 16), 4, 7) is expected


@given(visibilities())
def test_all_seen_is_true_of_every_pair(case: tuple[Visibility, int]) -> None:
    visible, heads = case
    assert all_seen(visible) <= bool(seen_by_rule(visible, heads).all())


@pytest.mark.parametrize(
    ("q_pos", "k_pos", "window", "expected"),
    [
        ([5, 6], [1, 5], None, True),
        ([5, 6], [3, 5], 4, True),
        ([5, 6], [2, 5], 4, False),
        ([5, 6], [1, 6], None, False),
        ([5, 6], [], None, False),
        ([], [1], None, False),
    ],
)
def test_all_seen(q_pos: list[int], k_pos: list[int], window: int | None, *, expected: bool) -> None:
    queries, keys = torch.tensor(q_pos, dtype=torch.int64), torch.tensor(k_pos, dtype=torch.int64)
    assert all_seen(Visibility(queries[None], keys[None, None], window)) is expected
