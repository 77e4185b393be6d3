"""The plain session against torch's own attention, and the laws of its operations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.draft_tree import DraftTree
from kvtier.errors import SessionStateError
from kvtier.testing.draft_draws import draw_path
from kvtier.testing.oracles import PlainMemory, PlainSession
from kvtier.types import KVLayout

B, HQ, HK, D = 2, 4, 2, 8


def draw(seed: int, heads: int, tokens: int) -> torch.Tensor:
    return torch.randn(B, heads, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positions(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop).expand(B, -1)


def filled(tokens: int) -> PlainSession:
    session = PlainSession(1)
    session.append(0, draw(1, HK, tokens), draw(2, HK, tokens), positions(0, tokens))
    return session


def ask(session: PlainSession, at: int) -> torch.Tensor:
    return session.attend(0, draw(3, HQ, 1), positions(at, at + 1), scale=0.3)


@pytest.mark.parametrize("window", [None, 3])
def test_causal_attention_is_that_of_torch(window: int | None) -> None:
    q, k, v = draw(3, HQ, 7), draw(1, HK, 7), draw(2, HK, 7)
    session = filled(7)
    ago = torch.arange(7)[:, None] - torch.arange(7)[None, :]
    visible = (ago >= 0) & (ago < (window or 7))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(session.attend(0, q, positions(0, 7), scale=0.3, window=window), expected)


def test_softcap_and_sink_shape_the_softmax() -> None:
    q, k, v = draw(3, HQ, 1), draw(1, HK, 5), draw(2, HK, 5)
    sink = torch.linspace(-1, 1, HQ, dtype=torch.float64)
    out = filled(5).attend(0, q, positions(4, 5), scale=0.3, softcap=0.5, sink=sink)
    for b in range(B):
        for head in range(HQ):
            logits = 0.5 * torch.tanh(0.3 * k[b, head // 2] @ q[b, head, 0] / 0.5)
            weights = logits.exp() / (logits.exp().sum() + sink[head].exp())
            torch.testing.assert_close(out[b, head, 0], weights @ v[b, head // 2])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_how_tokens_came_does_not_matter(widths: list[int]) -> None:
    total = sum(widths)
    k, v = draw(1, HK, total), draw(2, HK, total)
    session, start = PlainSession(1), 0
    for width in widths:
        stop = start + width
        session.append(0, k[:, :, start:stop], v[:, :, start:stop], positions(start, stop))
        start = stop
    assert session.length == total
    torch.testing.assert_close(ask(session, total), ask(filled(total), total))


def test_padding_is_neither_kept_nor_attended() -> None:
    session = PlainSession(1)
    spans = (slice(2, 5), slice(0, 5))
    where = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    session.append(0, draw(1, HK, 5), draw(2, HK, 5), where, spans=spans)
    out = session.attend(0, draw(3, HQ, 5), where, scale=0.3, spans=spans)
    assert not out[0, :, :2].any()
    alone = PlainSession(1)
    alone.append(0, draw(1, HK, 5)[:1, :, 2:], draw(2, HK, 5)[:1, :, 2:], torch.arange(3)[None])
    torch.testing.assert_close(
        out[:1, :, 2:], alone.attend(0, draw(3, HQ, 5)[:1, :, 2:], torch.arange(3)[None], scale=0.3)
    )


@given(tokens=st.integers(1, 8), remove=st.integers(0, 8))
def test_crop_forgets_the_newest(tokens: int, remove: int) -> None:
    session = filled(tokens)
    if remove > tokens:
        with pytest.raises(SessionStateError, match=f"0 to {tokens} columns, got {remove}"):
            session.crop(remove)
        return
    session.crop(remove)
    assert session.length == tokens - remove
    if session.length:
        left = PlainSession(1)
        kept = slice(0, session.length)
        left.append(0, draw(1, HK, tokens)[:, :, kept], draw(2, HK, tokens)[:, :, kept], positions(0, session.length))
        torch.testing.assert_close(ask(session, 9), ask(left, 9))


@given(parents=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_accept_appends_the_path(parents: list[int], data: st.DataObject) -> None:
    each = [None if not above or above > token else above - 1 for token, above in enumerate(parents)]
    path = draw_path(data, each)
    count = len(each)
    k, v = draw(4, HK, count), draw(5, HK, count)
    depths = [0] * count
    for token, above in enumerate(each):
        depths[token] = 0 if above is None else depths[above] + 1
    session, expected = filled(3), filled(3)
    session.append(0, k, v, 3 + torch.tensor([depths, depths]), tree=DraftTree.of(each))
    assert (session.length, session.drafted) == (3, count)
    session.accept(path)
    if path:
        expected.append(0, k[:, :, path], v[:, :, path], positions(3, 3 + len(path)))
    assert (session.length, session.drafted) == (3 + len(path), 0)
    torch.testing.assert_close(ask(session, 20), ask(expected, 20))
    session.crop(len(path))
    torch.testing.assert_close(ask(session, 20), ask(filled(3), 20))


def test_reorder_and_fork() -> None:
    session = filled(4)
    before = ask(session, 4)
    fork = session.fork()
    session.reorder([1, 1])
    q = draw(3, HQ, 1)
    swapped = session.attend(0, q[[0, 0]], positions(4, 5), scale=0.3)
    torch.testing.assert_close(swapped[0], swapped[1])
    session.append(0, draw(4, HK, 1), draw(5, HK, 1), positions(4, 5))
    torch.testing.assert_close(ask(fork, 4), before)


def test_states_that_do_not_fit() -> None:
    session = filled(2)
    with pytest.raises(SessionStateError, match="nothing to accept"):
        session.accept([0])
    with pytest.raises(SessionStateError, match="holds 2 rows, got 1"):
        session.append(0, draw(1, HK, 1)[:1], draw(2, HK, 1)[:1], positions(2, 3)[:1])
    with pytest.raises(SessionStateError, match="at least 1 token"):
        session.expect(0)
    session.expect(1)
    session.record_past(True)
    with session:
        assert session.report().to_dict() == {"rows": 2, "columns": 2, "kv_bytes": 2 * 2 * 2 * HK * D * 8}
    with pytest.raises(SessionStateError, match="closed"):
        session.crop(0)


def test_a_memory_lists_and_closes_its_sessions() -> None:
    layout = KVLayout.uniform(num_layers=2, num_kv_heads=HK, key_dim=D, value_dim=D, dtype="float64")
    memory = PlainMemory(layout, max_prefill=3)
    session = memory.session()
    assert (memory.sessions, memory.max_prefill_chunk(1), session.rows) == ([session], 3, 0)
    memory.close()
    with pytest.raises(SessionStateError, match="closed"):
        session.fork()
