"""Attention through a session equals dense attention: padding, sinks, soft caps, windows, on every tier."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import SessionStateError
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import SCALE, StepSource, open_memory
from kvtier.types import KVLayout, LayerLayout

EXACT = 1e-10


def assert_equal(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


def spans_for(lengths: Sequence[int], width: int, side: str) -> list[slice]:
    edges = {"left": lambda n: slice(width - n, width), "right": lambda n: slice(0, n)}
    return [edges[side](length) for length in lengths]


MEMORIES = {
    "device": open_memory,
    "host": lambda: open_memory(device=150_000),
    "sliding": lambda: open_memory(small_layout(window=7), device=150_000),
}


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_sequences_without_padding(kind: str, side: str) -> None:
    with closing(MEMORIES[kind]()) as memory:
        source, session = StepSource(memory.layout, rows=4), memory.session()
        singles, held = [PlainSession(3) for _ in range(4)], [0] * 4
        for lengths in ([23, 5, 0, 16], [9, 2, 4, 0], [1] * 4, [1] * 4, [3, 1, 2, 3]):
            spans = spans_for(lengths, max(lengths), side)
            step = source.take(max(lengths)).padded(spans, held)

            outputs = step.run(session)

            for row, (single, span) in enumerate(zip(singles, spans, strict=True)):
                assert all(not out[row, :, : span.start].any() for out in outputs), "padding must come out as zeros"
                assert all(not out[row, :, span.stop :].any() for out in outputs), "padding must come out as zeros"
                if span.start < span.stop:
                    alone = replace(step.rows([row]), spans=None).columns(span)
                    assert_equal([out[row : row + 1, :, span] for out in outputs], alone.run(single))
                held[row] += span.stop - span.start


@given(
    side=st.sampled_from(["left", "right"]),
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    remove=st.integers(0, 30),
)
def test_a_crop_counts_columns_and_takes_the_real_tokens_among_them(
    side: str, lengths: list[tuple[int, int]], remove: int
) -> None:
    widths = [max(*pair, 1) for pair in lengths]
    remove = min(remove, sum(widths))
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(rows=2), memory.session(), PlainSession(3)
        held = [0, 0]
        for pair, width in zip(lengths, widths, strict=True):
            spans = spans_for(pair, width, side)
            step = source.take(width).padded(spans, held)
            step.run(session)
            step.run(plain)
            held = [count + span.stop - span.start for count, span in zip(held, spans, strict=True)]

        session.crop(remove)
        plain.crop(remove)

        assert session.length == plain.length == sum(widths) - remove
        after = source.take(1).padded([slice(0, 1)] * 2, held)
        assert_equal(after.run(session), after.run(plain))


@given(
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    softcap=st.none() | st.floats(0.5, 30),
    sinks=st.none() | st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    device=st.sampled_from([None, 150_000]),
    sliding=st.booleans(),
)
def test_soft_caps_sinks_and_windows_are_those_of_dense_attention(
    cuts: list[int], softcap: float | None, sinks: list[float] | None, device: int | None, sliding: bool
) -> None:
    sink = None if sinks is None else torch.tensor(sinks, dtype=torch.float64)
    with closing(open_memory(small_layout(window=9 if sliding else None), device=device)) as memory:
        source, session, plain = StepSource(memory.layout, rows=2), memory.session(), PlainSession(3)
        for tokens in cuts:
            step = source.take(tokens)
            assert_equal(step.run(session, softcap=softcap, sink=sink), step.run(plain, softcap=softcap, sink=sink))


@pytest.mark.parametrize("window", [1, 3, 16, 100])
def test_a_window_may_be_asked_of_a_layer_that_keeps_everything(window: int) -> None:
    with closing(open_memory(device=150_000)) as memory:
        source, session, plain = StepSource(rows=2), memory.session(), PlainSession(3)
        for tokens in (40, 1, 7, 1):
            step = source.take(tokens)
            for layer in range(3):
                outputs = []
                for each in (session, plain):
                    each.append(layer, step.keys[layer], step.values[layer], step.positions)
                    outputs.append(each.attend(layer, step.queries[layer], step.positions, scale=SCALE, window=window))
                assert_equal(outputs[:1], outputs[1:])


def test_positions_may_have_gaps_and_start_anywhere() -> None:
    with closing(open_memory(small_layout(window=9))) as memory:
        source, session, plain = StepSource(memory.layout), memory.session(), PlainSession(3)
        for tokens in (12, 1, 5):
            step = source.take(tokens)
            step = replace(step, positions=1000 + 3 * step.positions)
            assert_equal(step.run(session), step.run(plain))


def test_one_row_of_positions_stands_for_all_rows() -> None:
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(rows=3), memory.session(), PlainSession(3)
        for tokens in (12, 1):
            step = source.take(tokens)
            assert_equal(replace(step, positions=step.positions[:1]).run(session), step.run(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_have_the_type_of_the_queries_and_the_accuracy_of_fp32(dtype: str) -> None:
    layer = LayerLayout(num_query_heads=4, num_kv_heads=2, key_dim=6, value_dim=4, dtype=dtype)
    layout = KVLayout(layers=(layer,), page_tokens=4, block_tokens=8, chunk_tokens=16)
    with closing(open_memory(layout, device=60_000)) as memory:
        source, session, exact = StepSource(layout), memory.session(), PlainSession(1)
        for tokens in (70, 1, 9):
            step = source.take(tokens)
            (got,) = step.run(session)
            wide = replace(
                step,
                keys=tuple(part.double() for part in step.keys),
                values=tuple(part.double() for part in step.values),
                queries=tuple(part.double() for part in step.queries),
            )
            (expected,) = wide.run(exact)

            assert got.dtype == getattr(torch, dtype)
            summed = session.length * torch.finfo(torch.float32).eps * float(step.values[0].abs().max())
            rounded = torch.finfo(got.dtype).eps / 2 * expected.abs()
            assert ((got.double() - expected).abs() <= rounded + summed).all()


def test_a_recorded_past_may_be_cropped_beyond_the_window() -> None:
    with closing(open_memory(small_layout(window=5))) as memory:
        source, session, plain = StepSource(memory.layout), memory.session(), PlainSession(3)
        session.record_past(True)
        for tokens in (9, 20):
            step = source.take(tokens)
            step.run(session)
            step.run(plain)
        session.crop(18)
        plain.crop(18)
        step = source.take(3)
        assert_equal(step.run(session), step.run(plain))

        session.record_past(False)
        for tokens in (20, 1):
            source.take(tokens).run(session)
        assert session.croppable < 10
        with pytest.raises(SessionStateError, match=r"record_past\(True\) before the appends"):
            session.crop(10)


def test_what_was_appended_may_be_overwritten_by_the_caller() -> None:
    with closing(open_memory(small_layout(window=5))) as memory:
        source, session, plain = StepSource(memory.layout), memory.session(), PlainSession(3)
        step = source.take(13)
        step.run(session)
        step.run(plain)
        for part in [*step.keys, *step.values, *step.queries]:
            part.fill_(torch.nan)

        step = source.take(1)
        assert_equal(step.run(session), step.run(plain))
