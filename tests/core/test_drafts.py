"""A tree of drafted tokens in a session: dense attention over each line, and an accepted path leaves what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.attention import AnySequence, positions_of, segments_of
from kvtier.core.draft_tree import DraftTree, RowTree
from kvtier.core.kept import KeptSequence
from kvtier.core.sequence import LayerSequence
from kvtier.core.session import Session
from kvtier.errors import CapacityError, InputError, SessionStateError
from kvtier.testing.draft_draws import draw_path, draw_tree
from kvtier.testing.oracles import PlainSession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import SCALE, Step, StepSource, open_memory
from kvtier.types import Rope

EXACT = 1e-10
ROPE = Rope(frequencies=(1.0, 0.1))


class Drafted:
    """Random tokens of a tree for each row, behind what a source has brought."""

    def __init__(self, source: StepSource, tree: DraftTree) -> None:
        self.tree, self.rows, first = tree, tree.of_rows(source.rows), source.position
        self.step = source.take(tree.tokens)
        source.position -= tree.tokens
        positions = torch.full((source.rows, tree.tokens), first)
        for row, parents in enumerate(self.rows):
            positions[row, : len(parents)] = torch.tensor(RowTree().places(parents, first), dtype=torch.int64)
        self.step = replace(self.step, positions=positions)

    def run(
        self, session: Session | PlainSession, *, softcap: float | None = None, sink: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Draft and attend in every layer."""
        return replace(self.step, tree=self.tree).run(session, softcap=softcap, sink=sink)

    def tokens(self, paths: Sequence[Sequence[int]]) -> list[Step]:
        """The tokens of the paths one by one, as a decoder without drafts would bring them."""
        steps = []
        for at in range(max(map(len, paths))):
            spans = tuple(slice(0, int(at < len(path))) for path in paths)
            column = torch.tensor([path[at] if at < len(path) else 0 for path in paths])

            def picked(part: torch.Tensor, column: torch.Tensor = column) -> torch.Tensor:
                return torch.stack([part[row, :, token : token + 1] for row, token in enumerate(column.tolist())])

            positions = self.step.positions.gather(1, column[:, None])
            keys, values, queries = (
                tuple(map(picked, parts)) for parts in (self.step.keys, self.step.values, self.step.queries)
            )
            steps.append(
                replace(self.step, keys=keys, values=values, queries=queries, positions=positions, spans=spans)
            )
        return steps


def close(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


LAYOUTS = {
    "plain": small_layout(),
    "sliding": small_layout(window=5),
    "alone": small_layout(heads=3, group=1),
    "wide": small_layout(heads=1, group=4),
}


@given(
    data=st.data(),
    rows=st.integers(1, 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    text=st.sampled_from(["full", "quest(dense_layers=1, read=100000)"]),
    device=st.sampled_from([None, 400_000]),
    before=st.lists(st.integers(1, 21), min_size=1, max_size=2),
    softcap=st.sampled_from([None, 2.0]),
    sunk=st.booleans(),
)
def test_a_tree_is_dense_attention_over_every_line(
    data: st.DataObject,
    rows: int,
    layout: str,
    text: str,
    device: int | None,
    before: list[int],
    softcap: float | None,
    sunk: bool,
) -> None:
    shape = LAYOUTS[layout]
    sink = torch.linspace(-2, 2, shape.layers[0].num_query_heads, dtype=torch.float64) if sunk else None
    with closing(open_memory(shape, text, device=device)) as memory:
        source, session, plain = StepSource(shape, rows=rows), memory.session(), PlainSession(3)
        for tokens in before:
            step = source.take(tokens)
            step.run(session)
            step.run(plain)
        drafted = Drafted(source, draw_tree(data, rows, most=9))
        got = drafted.run(session, softcap=softcap, sink=sink)
        close(got, drafted.run(plain, softcap=softcap, sink=sink))
        assert session.length == sum(before)
        assert session.drafted == drafted.tree.tokens
        for row, parents in enumerate(drafted.rows):
            assert all(not out[row, :, len(parents) :].any() for out in got), "padding must come out as zeros"

        paths = [draw_path(data, parents) for parents in drafted.rows]
        session.accept(paths)
        plain.accept(paths)

        assert (session.length, session.drafted) == (sum(before) + max(map(len, paths)), 0)
        source.position += max(map(len, paths))
        for tokens in (1, 11):
            step = source.take(tokens)
            close(step.run(session), step.run(plain))


def test_an_explicit_ancestor_mask_says_the_same() -> None:
    parents = [None, 0, 0, 1, None, 2]
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        past = source.take(13)
        past.run(session)
        drafted = Drafted(source, DraftTree.of(parents))
        outputs = drafted.run(session)
        allowed = torch.eye(6, dtype=torch.bool)
        for token, parent in enumerate(parents):
            if parent is not None:
                allowed[token] |= allowed[parent]
        mask = torch.cat([torch.ones(6, 13, dtype=torch.bool), allowed], dim=1)
        for layer, out in enumerate(outputs):
            k, v = (
                torch.cat([getattr(past, name)[layer], getattr(drafted.step, name)[layer]], dim=2)
                for name in ("keys", "values")
            )
            expected = torch.nn.functional.scaled_dot_product_attention(
                drafted.step.queries[layer], k, v, mask, scale=SCALE, enable_gqa=True
            )
            torch.testing.assert_close(out, expected, rtol=0, atol=EXACT)


def test_a_line_of_64_drafts_is_causal_attention() -> None:
    line = DraftTree.of([None, *range(63)])
    with closing(open_memory()) as memory:
        source, session, plain = StepSource(), memory.session(), memory.session()
        first = source.take(5)
        first.run(session)
        first.run(plain)
        drafted = Drafted(source, line)
        close(drafted.run(session), drafted.step.run(plain))
        one = source.take(1)
        with pytest.raises(InputError, match="at most 64 tokens of a row are drafted at a time, got 65"):
            session.append(0, one.keys[0], one.values[0], torch.tensor([[69]]), tree=DraftTree.of([63]))
        session.accept(range(64))
        assert session.length == 69


@pytest.mark.parametrize("text", ["full", "quest(dense_layers=0, read=1000)"])
def test_a_row_without_a_past_may_draft(text: str) -> None:
    with closing(open_memory(policy_text=text)) as memory:
        source, session, plain = StepSource(rows=2), memory.session(), PlainSession(3)
        step = source.take(9).padded([slice(0, 9), slice(0, 0)], [0, 0])
        step.run(session)
        step.run(plain)
        drafted = Drafted(source, DraftTree.of([[None, 0, 0], [None, None]]))
        close(drafted.run(session), drafted.run(plain))
        session.accept([[0, 2], [1]])
        plain.accept([[0, 2], [1]])
        source.position += 2
        step = source.take(3)
        close(step.run(session), step.run(plain))


COMPOSITIONS = [
    "full",
    "snapkv(window=2, keep=12)",
    "snapkv(window=2, keep=12) | quest(dense_layers=1, read=16)",
    "adakv(window=2, keep=9)",
    "h2o(recent=3, keep=10)",
    "tova(keep=10)",
    "streamingllm(sinks=2, keep=10)",
    "streamingllm(sinks=2, keep=10, positions='compact')",
    "d2o(sinks=1, recent=3, keep=10, when='step')",
]


def state(session: Session) -> list[dict[str, object]]:
    """Everything that the sequences of a session hold."""
    return [_state_of(sequence) for sequence in session._batch.sequences]


def _state_of(sequence: AnySequence) -> dict[str, object]:
    found: dict[str, object] = {"kind": type(sequence), "last": sequence.last_position, "length": sequence.length}
    found["positions"] = torch.from_numpy(np.array(positions_of(sequence)))
    with segments_of(sequence) as segments:
        parts = [(segment.keys.clone(), segment.values.clone()) for segment in segments]
    for name, place in (("keys", 0), ("values", 1)):
        found[name] = torch.cat([part[place].double() for part in parts], dim=2) if parts else torch.zeros(0)
    if isinstance(sequence, LayerSequence):
        found["pages"], found["tail"] = sequence.pages.length, sequence.tail_length
        found |= {} if sequence.sketch is None else dict(sequence.sketch.views())
    if isinstance(sequence, KeptSequence):
        found["votes"], found["seen"] = sequence.votes, sequence.seen
        found["memory"] = torch.zeros(0) if sequence.memory is None else sequence.memory
    return found


def assert_same_state(one: Session, other: Session) -> None:
    for mine, theirs in zip(state(one), state(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]  # type: ignore[arg-type]
            assert same, f"{name}: {value} != {theirs[name]}"


@pytest.mark.parametrize("text", COMPOSITIONS)
@settings(max_examples=8)
@given(data=st.data(), rows=st.integers(1, 2), sliding=st.booleans(), decoded=st.integers(0, 3))
def test_an_accepted_path_leaves_what_plain_steps_leave_and_a_rejected_one_nothing(
    text: str, data: st.DataObject, rows: int, sliding: bool, decoded: int
) -> None:
    layout = small_layout(window=6 if sliding else None, rope=ROPE)
    with closing(open_memory(layout, text)) as memory:
        source, session, plain = StepSource(layout, rows=rows), memory.session(), memory.session()
        for one in (session, plain):
            one.expect(30)
        for tokens in [30, *[1] * decoded]:
            step = source.take(tokens)
            step.run(session)
            step.run(plain)
        drafted = Drafted(source, draw_tree(data, rows, most=7))
        drafted.run(session)
        assert_same_state(session, plain)
        paths = [draw_path(data, parents) for parents in drafted.rows]
        for (_, row), held in session._drafts._held.items():
            rejected = [token for token in range(held.keys.shape[2]) if token not in paths[row]]
            held.keys[:, :, rejected] = held.values[:, :, rejected] = torch.nan

        session.accept(paths)
        for step in drafted.tokens(paths):
            step.run(plain)

        assert_same_state(session, plain)
        assert (session.length, session.croppable) == (plain.length, plain.croppable)
        source.position += max(map(len, paths))
        for tokens in (1, 1):
            step = source.take(tokens)
            for got, expected in zip(step.run(session), step.run(plain), strict=True):
                assert torch.equal(got, expected)
        assert_same_state(session, plain)


def test_pending_drafts_touch_no_sequence_and_are_counted() -> None:
    with closing(open_memory(policy_text="quest(dense_layers=0, read=64)", device=400_000)) as memory:
        source, session = StepSource(rows=2), memory.session()
        source.take(14).run(session)
        versions = [sequence.version for sequence in session._batch.sequences]
        before = session.report()
        drafted = Drafted(source, DraftTree.of([[None, 0, 0, 1, 2], [None] * 3]))
        drafted.run(session)

        report = session.report()
        assert [sequence.version for sequence in session._batch.sequences] == versions
        assert (report.kept, report.device_bytes["tails"]) == (before.kept, before.device_bytes["tails"])
        assert report.device_bytes["drafts"] == 3 * (5 + 3) * memory.groups[0].layer.token_bytes
        session.accept([])
        assert session.report().device_bytes.get("drafts", 0) == 0
        assert [sequence.version for sequence in session._batch.sequences] == versions
        drafted.run(session)
        session.close()
        assert memory.ledgers[memory.devices[0]].in_use == 0


def test_drafts_are_read_within_the_budget_of_a_retriever() -> None:
    with closing(open_memory(policy_text="quest(dense_layers=0, read=24)")) as memory:
        source, session = StepSource(), memory.session()
        source.take(80).run(session)
        before = session._batch.pages_read
        Drafted(source, DraftTree.of([None, 0, 0, 1, 2])).run(session)
        assert session._batch.pages_read - before == 3 * ((24 - 0 - 5) // 4)
        session.accept([])
        wide = Drafted(source, DraftTree.of([None, *range(30)])).run(session)
        assert all(bool(out.isfinite().all()) for out in wide), "more drafts than the budget leave no page, and no NaN"


BadCall = Callable[[Session, Drafted], object]
PENDING: dict[str, BadCall] = {
    "a fork": lambda s, _: s.fork(),
    "a reorder": lambda s, _: s.reorder([0, 1]),
    "a crop": lambda s, _: s.crop(1),
    "a prompt": lambda s, _: s.expect(1),
    "other tokens are appended": lambda s, d: s.append(0, d.step.keys[0], d.step.values[0], d.step.positions),
}


@pytest.mark.parametrize("what", PENDING)
def test_what_waits_until_drafts_are_accepted_or_dropped(what: str) -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(rows=2), memory.session()
        source.take(9).run(session)
        drafted = Drafted(source, DraftTree.of([None, 0]))
        drafted.run(session)
        with pytest.raises(SessionStateError, match=rf"accept\(\[\]\) to drop them, before {what}"):
            PENDING[what](session, drafted)
        session.accept([])
        step = source.take(2)
        step.run(session)
        assert session.length == 11


def draft(session: Session, drafted: Drafted, layer: int = 0, **changes: object) -> None:
    given = {"positions": drafted.step.positions, "tree": drafted.tree, **changes}
    session.append(layer, drafted.step.keys[layer], drafted.step.values[layer], **given)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[str, BadCall]] = {
    "rows": ("one for each of the 2 rows, got 3", lambda s, d: draft(s, d, tree=DraftTree.of([[None, 0]] * 3))),
    "columns": (
        "a tree of 3 tokens needs as many columns, got 2",
        lambda s, d: draft(s, d, tree=DraftTree.of([None] * 3)),
    ),
    "siblings in a row": ("stands one behind", lambda s, d: draft(s, d, tree=DraftTree.of([None, None]))),
    "in the past": ("the last one held", lambda s, d: draft(s, d, positions=d.step.positions - 1)),
    "spans": ("leave out spans", lambda s, d: draft(s, d, spans=[slice(0, 2)] * 2)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_drafts_change_nothing(case: str) -> None:
    message, call = REFUSED[case]
    with closing(open_memory()) as memory:
        source, session = StepSource(rows=2), memory.session()
        source.take(9).run(session)
        drafted = Drafted(source, DraftTree.of([None, 0]))
        with pytest.raises(InputError, match=message):
            call(session, drafted)
        assert session.drafted == 0
        source.take(1).run(session)


def test_layers_must_agree_and_none_may_lack_what_is_accepted() -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        source.take(9).run(session)
        drafted = Drafted(source, DraftTree.of([None, 0]))
        draft(session, drafted)
        with pytest.raises(InputError, match="the same tree, got another one for layer 1"):
            draft(session, drafted, 1, tree=DraftTree.of([None, None]))
        with pytest.raises(InputError, match="all layers must be given the same positions"):
            draft(session, drafted, 1, positions=drafted.step.positions + 1)
        with pytest.raises(SessionStateError, match="layer 1 lacks drafted tokens that layer 0 has"):
            draft(session, drafted, tree=DraftTree.of([1, 1]))
        with pytest.raises(SessionStateError, match="layer 1 attends with the queries of the tokens"):
            session.attend(1, drafted.step.queries[1], drafted.step.positions, scale=SCALE)
        with pytest.raises(SessionStateError, match="layer 1 has not seen all drafted tokens"):
            session.accept([0])
        with pytest.raises(InputError, match="a path leads from"):
            session.accept([1])
        session.accept([])
        assert session.length == 9
        source.take(3).run(session)


def test_drafts_follow_a_whole_prompt() -> None:
    with closing(open_memory()) as memory:
        source, session = StepSource(), memory.session()
        drafted = Drafted(source, DraftTree.of([None]))
        with pytest.raises(SessionStateError, match="drafted tokens come after a prompt"):
            drafted.run(session)
        session.expect(8)
        source.take(5).run(session)
        with pytest.raises(SessionStateError, match="drafted tokens come after a prompt"):
            Drafted(source, DraftTree.of([None])).run(session)


def test_drafts_that_find_no_room_are_dropped_and_the_session_lives() -> None:
    with closing(open_memory(device=60_000)) as memory:
        source, session = StepSource(rows=2), memory.session()
        source.take(9).run(session)
        ledger = memory.ledgers[memory.devices[0]]
        drafted = Drafted(source, DraftTree.of([None] * 9))
        limit, ledger.limit = ledger.limit, ledger.by_purpose["tails"] + 1500
        with pytest.raises(CapacityError, match="drafts"):
            drafted.run(session)
        ledger.limit = limit
        assert (session.drafted, ledger.by_purpose["drafts"]) == (0, 0)
        drafted.run(session)
        session.accept([3])
        assert session.length == 10
