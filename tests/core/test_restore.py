"""Chunks read out of one session and put back into another: attention goes on as if it had prefilled them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kvtier.core.memory import Memory
from kvtier.core.session import Session
from kvtier.errors import SessionStateError
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import Step, StepSource, open_memory

EXACT = 1e-10
CHUNK = small_layout().chunk_tokens
QUEST = "quest(dense_layers=0, read=4096)"

Chunk = list[tuple[torch.Tensor, torch.Tensor]]


def read_chunk(session: Session, row: int, index: int) -> Chunk | None:
    """K and V of every layer of a chunk; None when a layer has lost some of it."""
    chunk: Chunk = []
    for layer, shape in enumerate(session.memory.layout.layers):
        keys = torch.full((shape.num_kv_heads, CHUNK, shape.key_dim), torch.nan, dtype=torch.float64)
        values = torch.full((shape.num_kv_heads, CHUNK, shape.value_dim), torch.nan, dtype=torch.float64)
        if not session.read(layer, row, slice(index * CHUNK, (index + 1) * CHUNK), keys, values):
            return None
        chunk.append((keys, values))
    return chunk


def chunks_of(step: Step, row: int, columns: int) -> list[Chunk]:
    """The same, cut from the step that brought them; ``columns`` of the row, padding stripped."""
    start = step.spans[row].start if step.spans is not None else 0
    return [
        [
            (keys[row, :, at : at + CHUNK], values[row, :, at : at + CHUNK])
            for keys, values in zip(step.keys, step.values, strict=True)
        ]
        for at in range(start, columns, CHUNK)
    ]


def put_back(session: Session, rows: Sequence[list[Chunk]], tokens: Sequence[int], *, coming: int) -> None:
    """Restore ``tokens[b]`` tokens of every row: all in full layers, the last window of them in sliding ones."""
    restoration = session.restoring(len(rows), coming=coming)
    for row, (chunks, due) in enumerate(zip(rows, tokens, strict=True)):
        for layer, shape in enumerate(session.memory.layout.layers):
            first = 0 if shape.window is None else max(0, due - shape.window + 1) // CHUNK
            if first:
                restoration.pass_over(row, layer, first * CHUNK)
            for at in range(first * CHUNK, due, CHUNK):
                keys, values = chunks[at // CHUNK][layer]
                restoration.append(row, layer, keys[:, : due - at], values[:, : due - at])
    columns = max(tokens)
    session.restored(columns, [slice(columns - due, columns) for due in tokens])


def same(step: Step, session: Session, plain: PlainSession) -> None:
    for got, expected in zip(step.run(session), step.run(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=EXACT)


def memory_for(kind: str, path: Path) -> Memory:
    if kind == "tiers":
        return open_memory(small_layout(5), device=70_000, host="48KiB", nvme="16MiB", path=path)
    return open_memory(small_layout(None if kind == "full" else 5), QUEST if kind == "quest" else "full")


KINDS = ["full", "windows", "quest", "tiers"]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_read_as_they_were_appended(kind: str, tmp_path: Path) -> None:
    with closing(memory_for(kind, tmp_path)) as memory:
        memory.keep_open_chunks()
        session, source = memory.session(), StepSource(memory.layout)
        steps = [source.take(tokens) for tokens in (1, 10, 30, 1, 1, 90, 3, 60)]
        whole = [torch.cat(parts, dim=2) for parts in zip(*(step.keys for step in steps), strict=True)]
        seen = 0
        for step in steps:
            for layer, shape in enumerate(memory.layout.layers):
                session.append(layer, step.keys[layer], step.values[layer], step.positions)
                total = seen + step.positions.shape[1]
                for index in range(seen // CHUNK, total // CHUNK):
                    span = slice(index * CHUNK, (index + 1) * CHUNK)
                    keys = torch.full((2, CHUNK, 6), torch.nan, dtype=torch.float64)
                    values = torch.full((2, CHUNK, 4), torch.nan, dtype=torch.float64)
                    assert session.read(layer, 0, span, keys, values)
                    assert torch.equal(keys, whole[layer][0, :, span])
                query = step.queries[layer]
                session.attend(layer, query, step.positions, scale=1.0, window=shape.window)
            seen += step.positions.shape[1]
        assert not session.read(0, 0, slice(seen // CHUNK * CHUNK, seen // CHUNK * CHUNK + CHUNK), keys, values)


def test_what_was_evicted_or_slid_out_cannot_be_read() -> None:
    with closing(open_memory(small_layout(5), "snapkv(window=4)", keep=20)) as memory:
        session, source = memory.session(), StepSource(memory.layout)
        source.take(64).run(session)
        assert read_chunk(session, 0, 0) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(CHUNK, CHUNK), (7 * CHUNK, 6 * CHUNK + 5), (3, 2 * CHUNK)], ids=str)
def test_a_restored_session_attends_as_one_that_prefilled(kind: str, tokens: tuple[int, int], tmp_path: Path) -> None:
    with closing(memory_for(kind, tmp_path)) as memory:
        memory.keep_open_chunks()
        source, plain = StepSource(memory.layout, rows=2), PlainSession(3)
        columns = max(tokens)
        spans = [slice(columns - due, columns) for due in tokens]
        prefix = source.take(columns).padded(spans, [0, 0])
        prefix.run(plain)
        session = memory.session()
        session.expect(columns + 30)
        put_back(session, [chunks_of(prefix, row, columns) for row in (0, 1)], tokens, coming=columns + 30)

        assert (session.length, session.rows) == (columns, 2)
        for count in (30, 1, 1, 40, 1):
            step = source.take(count).padded([slice(0, count)] * 2, [due + plain.length - columns for due in tokens])
            same(step, session, plain)
        removed = min(3, session.croppable)
        for each in (session, plain):
            each.crop(removed)
        same(source.take(1).padded([slice(0, 1)] * 2, [due + plain.length - columns for due in tokens]), session, plain)
        session.close()
        assert sum(ledger.in_use for ledger in memory.ledgers.values()) == 0


def test_restored_rows_can_share_their_pages() -> None:
    with closing(open_memory(small_layout(5))) as memory:
        source, plain = StepSource(memory.layout, rows=2), PlainSession(3)
        prefix = source.take(2 * CHUNK, equal=True)
        prefix.run(plain)
        session = memory.session()
        restoration = session.restoring(2, coming=2 * CHUNK)
        for layer in range(3):
            restoration.append(0, layer, prefix.keys[layer][0], prefix.values[layer][0])
        restoration.share(0, 1)
        session.restored(2 * CHUNK, [slice(0, 2 * CHUNK)] * 2)

        pages = 2 * CHUNK // memory.layout.page_tokens
        assert memory.groups[0].store.table.live == 2 * 2 * pages, "two layers of two heads, and one row"
        for count in (1, 9, 1):
            same(source.take(count), session, plain)


def test_an_incomplete_restoration_leaves_a_session_that_can_only_be_closed() -> None:
    with closing(open_memory(small_layout(5))) as memory:
        session, step = memory.session(), StepSource(memory.layout).take(CHUNK)
        restoration = session.restoring(1, coming=CHUNK)
        restoration.append(0, 0, step.keys[0][0], step.values[0][0])
        with pytest.raises(SessionStateError, match="row 0 must hold 16 tokens in layer 1, got 0"):
            session.restored(CHUNK, [slice(0, CHUNK)])
        with pytest.raises(SessionStateError, match="close this session"):
            step.run(session)
        session.close()
        assert sum(ledger.in_use for ledger in memory.ledgers.values()) == 0


def test_only_an_empty_session_is_restored_and_only_windows_pass_over_tokens() -> None:
    with closing(open_memory(small_layout(5))) as memory:
        session = memory.session()
        with pytest.raises(SessionStateError, match="layer 0 has no sliding window"):
            session.restoring(1, coming=CHUNK).pass_over(0, 0, 3)
        with pytest.raises(SessionStateError, match="only an empty session"):
            session.restoring(1, coming=CHUNK)
