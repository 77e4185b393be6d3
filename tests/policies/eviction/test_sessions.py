"""Policies that evict while they decode, or merge, in a session against the papers written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.core.kept import KeptSequence
from kvtier.core.policy import KeepPlan
from kvtier.core.session import Session
from kvtier.core.slot_order import SlotOrder
from kvtier.core.stats import SlotView
from kvtier.errors import CapacityError, CompositionError, SessionStateError
from kvtier.policies.eviction.d2o import D2O
from kvtier.testing.dense import DenseRow, reduce_heads
from kvtier.testing.plain_policies import PlainPolicySession
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import SCALE, Step, StepSource, open_memory
from kvtier.types import Rope

EXACT = 1e-10
SINKS, RECENT = 2, 3

Ranking = Callable[[list[float], list[float], int], list[int]]


def streaming(latest: list[float], running: list[float], keep: int) -> list[int]:
    """The sinks and the newest."""
    return [*range(SINKS), *range(len(running) - keep + SINKS, len(running))]


def h2o(latest: list[float], running: list[float], keep: int) -> list[int]:
    """The newest and the most attended of the others, the earlier first."""
    older = len(running) - RECENT
    best = sorted(range(older), key=lambda slot: (-running[slot], slot))[: keep - RECENT]
    return sorted([*best, *range(older, len(running))])


def tova(latest: list[float], running: list[float], keep: int) -> list[int]:
    """The newest, and of the others what its query looks at most."""
    best = sorted(range(len(latest) - 1), key=lambda slot: (-latest[slot], slot))[: keep - 1]
    return sorted([*best, len(latest) - 1])


RULES: dict[str, Ranking] = {
    f"streamingllm(sinks={SINKS})": streaming,
    f"h2o(recent={RECENT})": h2o,
    "tova": tova,
}


class DenseEvicting:
    """One row and layer, whose running votes stay with their tokens."""

    def __init__(self, row: DenseRow, rule: Ranking, keep: int) -> None:
        self.row, self.rule, self.keep = row, rule, keep
        self.running = torch.zeros(row.keys.shape[0], 0, dtype=torch.float64)

    def run(self, step: Step, layer: int, row: int, *, evicts: bool) -> torch.Tensor:
        span = slice(0, step.positions.shape[1]) if step.spans is None else step.spans[row]
        positions = step.positions[row, span]
        self.row.append(step.keys[layer][row, :, span], step.values[layer][row, :, span], positions)
        weights = self.row.weights(step.queries[layer][row, :, span], positions, scale=SCALE)
        out = self.row.attend(weights)
        heads = self.running.shape[0]
        fresh = self.row.length - self.running.shape[1]
        self.running = torch.cat([self.running, self.running.new_zeros(heads, fresh)], 1)
        self.running += reduce_heads(weights.sum(1), heads, "mean")
        latest = reduce_heads(weights[:, -1], heads, "mean")
        if evicts and self.row.length > self.keep:
            plan = [self.rule(*pair, self.keep) for pair in zip(latest.tolist(), self.running.tolist(), strict=True)]
            self.row.keep(plan)
            self.running = self.running.gather(1, torch.tensor(plan))
        return out


class Pair:
    """A session and its oracles, fed the same steps."""

    def __init__(self, session: Session, rule: Ranking, keep: int, rows: int) -> None:
        self.session = session
        layers = session.memory.layout.layers
        self.oracles = [
            [DenseEvicting(DenseRow(one.num_kv_heads, one.key_dim, one.value_dim), rule, keep) for one in layers]
            for _ in range(rows)
        ]

    def run(self, step: Step, *, evicts: bool) -> None:
        outputs = step.run(self.session)
        for row, oracles in enumerate(self.oracles):
            span = slice(0, step.positions.shape[1]) if step.spans is None else step.spans[row]
            for layer, oracle in enumerate(oracles):
                right = oracle.run(step, layer, row, evicts=evicts)
                torch.testing.assert_close(outputs[layer][row, :, span], right, rtol=0, atol=EXACT)
                self.check_slots(row, layer, oracle.row.positions)

    def check_slots(self, row: int, layer: int, right: torch.Tensor) -> None:
        sequence = self.session._batch.rows[row][layer]
        if isinstance(sequence, KeptSequence):
            assert [sorted(head) for head in sequence.positions.tolist()] == right.tolist()

    def prompt(self, source: StepSource, chunks: Sequence[int]) -> None:
        self.session.expect(sum(chunks))
        for place, tokens in enumerate(chunks):
            self.run(source.take(tokens), evicts=place == len(chunks) - 1)


@pytest.mark.parametrize("text", RULES)
@settings(max_examples=12)
@given(
    keep=st.integers(5, 12),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    steps=st.integers(1, 12),
    again=st.lists(st.integers(1, 9), max_size=2),
)
def test_prompts_and_steps_equal_the_paper(
    text: str, keep: int, chunks: list[int], steps: int, again: list[int]
) -> None:
    with closing(open_memory(small_layout(), text, keep=keep)) as memory:
        source, pair = StepSource(memory.layout, rows=2), Pair(memory.session(), RULES[text], keep, 2)
        pair.prompt(source, chunks)
        for _ in range(steps):
            pair.run(source.take(1), evicts=True)
        if again:
            pair.prompt(source, again)
            pair.run(source.take(1), evicts=True)
        pair.session.close()
        assert memory.ledgers[memory.devices[0]].in_use == 0, "votes and slots are given back"


@pytest.mark.parametrize("text", RULES)
def test_sliding_layers_are_left_alone(text: str) -> None:
    with closing(open_memory(small_layout(6), text, keep=6)) as memory, closing(memory.session()) as session:
        source = StepSource(memory.layout)
        session.expect(20)
        source.take(20).run(session)
        source.take(1).run(session)
        kinds = [isinstance(sequence, KeptSequence) for sequence in session._batch.rows[0]]
        assert kinds == [True, False, True]


@pytest.mark.parametrize("text", RULES)
def test_forks_and_reorders_take_their_votes_along(text: str) -> None:
    with closing(open_memory(small_layout(), text, keep=7)) as memory:
        source, pair = StepSource(memory.layout, rows=2), Pair(memory.session(), RULES[text], 7, 2)
        pair.prompt(source, [15])
        pair.run(source.take(1), evicts=True)
        twin = pair.session.fork()
        pair.session.reorder([1, 0])
        pair.oracles.reverse()
        pair.run(source.take(1), evicts=True)
        pair.session.close()
        step = source.take(1)
        step.run(twin)
        assert twin.report().kept == 7
        twin.close()


def test_what_a_step_evicted_cannot_be_cropped_back() -> None:
    with closing(open_memory(small_layout(), "tova", keep=6)) as memory, closing(memory.session()) as session:
        source = StepSource(memory.layout)
        session.expect(5)
        source.take(5).run(session)
        assert session.croppable == 5
        session.crop(1)
        source = StepSource(memory.layout, seed=1)
        source.position = 4
        for _ in range(4):
            source.take(1).run(session)
        assert session.croppable == 0
        with pytest.raises(SessionStateError, match="evicts while it decodes"):
            session.crop(1)


def test_slots_are_counted_and_bounded() -> None:
    with closing(open_memory(small_layout(), "h2o(recent=2)", keep=8, device=40_000)) as memory:
        session = memory.session()
        source = StepSource(memory.layout)
        session.expect(40)
        for _ in range(5):
            source.take(8).run(session)
        for _ in range(30):
            source.take(1).run(session)
        held = memory.ledgers[memory.devices[0]]
        assert held.by_purpose["slots"] > 0
        assert held.peak <= 40_000
        with pytest.raises(CapacityError):
            StepSource(memory.layout, rows=64).take(64).run(memory.session())


ORDERLESS = ["streamingllm(sinks=2)", "streamingllm(positions='compact')", "h2o(recent=2)", "tova"]
ORDERLESS += ["d2o(sinks=1, recent=2, when='step')"]


@pytest.mark.parametrize("text", ORDERLESS)
def test_the_order_of_slots_in_memory_does_not_matter(text: str) -> None:
    layout = small_layout(rope=Rope(frequencies=(1.0, 0.1)))
    with closing(open_memory(layout, text, keep=9)) as memory:
        source, sessions = StepSource(layout, rows=2), [memory.session(), memory.session()]
        prompt = source.take(20)
        for session in sessions:
            session.expect(20)
            prompt.run(session)
        for seed in range(8):
            for index, sequence in enumerate(sessions[1]._batch.sequences):
                assert isinstance(sequence, KeptSequence)
                shuffle(sequence, seed * 100 + index)
            step = source.take(1)
            for one, other in zip(*(step.run(session) for session in sessions), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        for one, other in zip(*(session._batch.sequences for session in sessions), strict=True):
            assert isinstance(one, KeptSequence) and isinstance(other, KeptSequence)  # noqa: PT018 - for the type
            assert np.array_equal(np.sort(one.positions, axis=1), np.sort(other.positions, axis=1))


def shuffle(sequence: KeptSequence, seed: int) -> None:
    """Put the slots of each head in another order, with all that belongs to them."""
    random = np.random.default_rng(seed)
    positions = sequence.positions.copy()
    group = sequence.votes.shape[0] // sequence.keys.shape[0]
    for head in range(sequence.keys.shape[0]):
        order = random.permutation(sequence.length)
        held = slice(0, sequence.length)
        for part in (sequence.keys, sequence.values):
            part[head, held] = part[head, order].clone()
        queries = slice(head * group, (head + 1) * group)
        sequence.votes[queries, held] = sequence.votes[queries][:, order].clone()
        positions[head] = positions[head, order]
    sequence.order = SlotOrder(positions)


@pytest.mark.parametrize("sinks", [0, 3])
def test_compact_positions_stay_within_the_window_however_far_the_text_goes(sinks: int) -> None:
    rope = Rope(frequencies=(1.0, 0.1))
    layout = small_layout(rope=rope)
    with closing(open_memory(layout, f"streamingllm(sinks={sinks}, positions='compact')", keep=8)) as memory:
        session, plain = memory.session(), PlainPolicySession(layout, memory.policy)
        source = StepSource(layout, rows=2)
        plain.expect(15)
        session.expect(15)
        for position, steps in ((0, [15]), (15, [1, 1]), (40_000, [1] * 10), (3_000_000, [1] * 10)):
            source.position = position
            for tokens in steps:
                step = source.take(tokens)
                for one, other in zip(step.run(session), step.run(plain), strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
        kept = session._batch.rows[0][0]
        assert isinstance(kept, KeptSequence)
        assert int(kept.positions.max()) == 3_000_009
        assert [segment.ahead for segment in kept.segments()] == ([0, 3_000_002] if sinks else [3_000_002])


def test_a_merge_threshold_begins_anew_with_every_sequence() -> None:
    with closing(open_memory(small_layout(), "d2o(sinks=1, recent=2, when='step')", keep=8)) as memory:
        outputs = []
        for _ in range(2):
            source, session = StepSource(memory.layout, seed=5), memory.session()
            session.expect(20)
            source.take(20).run(session)
            outputs.append([source.take(1).run(session) for _ in range(6)])
            session.close()
        for one, other in zip(*outputs, strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_layers_keep_their_share_of_the_budget_at_every_step() -> None:
    with closing(open_memory(small_layout(), "d2o(sinks=1, recent=2, when='step')", keep=10)) as memory:
        source, session = StepSource(memory.layout, rows=2), memory.session()
        session.expect(40)
        source.take(40).run(session)
        before = [[one.length for one in row] for row in session._batch.rows]
        assert all(sum(row) == 30 for row in before)
        for _ in range(3):
            source.take(1).run(session)
        assert [[one.length for one in row] for row in session._batch.rows] == before


def test_reading_a_part_and_voting_by_all_exclude_each_other() -> None:
    with pytest.raises(CompositionError, match="h2o evicts by the attention of every step, and quest leaves pages"):
        open_memory(small_layout(), "h2o(recent=2) | quest", keep=16, read=32)


def test_layers_whose_attention_is_spread_keep_more() -> None:
    sums = [torch.zeros(4, 50), torch.zeros(4, 50)]
    sums[0][:, 3] = 50.0
    sums[1] += 1.0
    peaked, spread = D2O(sinks=1, recent=2).share((20, 20), sums)
    assert peaked + spread == 40
    assert peaked < spread


@pytest.mark.parametrize("chunks", [[40], [13, 27]])
def test_d2o_waits_for_all_layers_and_keeps_the_budget(chunks: list[int]) -> None:
    policy = "d2o(sinks=1, recent=3)"
    with closing(open_memory(small_layout(6), policy, keep=12)) as memory, closing(memory.session()) as session:
        source = StepSource(memory.layout, rows=2)
        session.expect(sum(chunks))
        for tokens in chunks:
            step = source.take(tokens)
            lengths = []
            for index in range(3):
                session.append(index, step.keys[index], step.values[index], step.positions)
                session.attend(
                    index, step.queries[index], step.positions, scale=SCALE, window=memory.layout.layers[index].window
                )
                lengths.append([session._batch.rows[row][0].length for row in range(2)])
            assert lengths[0] == lengths[1], "the first layer waits for the last"
        for row in range(2):
            kept = [session._batch.rows[row][layer].length for layer in (0, 2)]
            assert sum(kept) == 24
        source.take(1).run(session)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_merged_slots_are_convex_sums_of_what_went_in(seed: int) -> None:
    with closing(open_memory(small_layout(), "d2o(sinks=1, recent=3)", keep=9)) as memory:
        session = memory.session()
        step = StepSource(memory.layout, seed=seed).take(25)
        session.expect(25)
        step.run(session)
        for layer, shape in enumerate(memory.layout.layers):
            sequence = session._batch.rows[0][layer]
            held = torch.from_numpy(sequence.positions.view.copy())
            keep = held.expand(shape.num_kv_heads, -1)[None]
            segments = list(sequence.segments(1))
            keys, values = (torch.cat([getattr(part, name)[0] for part in segments], 1) for name in ("keys", "values"))
            policy = D2O(sinks=1, recent=3)
            positions = torch.arange(25).expand(1, shape.num_kv_heads, 25)
            view = SlotView(positions=positions, protected=policy.protected(positions), keys=step.keys[layer])
            plan = policy.merge(view, KeepPlan(keep))
            assert plan is not None
            for name, now in (("keys", keys), ("values", values)):
                before = getattr(step, name)[layer][0]
                right = before.gather(1, keep[0].unsqueeze(-1).expand(-1, -1, before.shape[2])).clone()
                for head in range(shape.num_kv_heads):
                    into: dict[int, torch.Tensor] = {}
                    entries = zip(plan.src[0, head], plan.dst[0, head], plan.weight[0, head], strict=True)
                    for src, dst, weight in ((int(s), int(d), float(w)) for s, d, w in entries):
                        if weight:
                            into[dst] = into.get(dst, torch.zeros(())) + weight * before[head, src]
                    for slot, vector in into.items():
                        right[head, keep[0, head].tolist().index(slot)] = vector
                torch.testing.assert_close(now, right, rtol=0, atol=1e-6)
        session.close()
