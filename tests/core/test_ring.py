"""A sliding window holds what its next query may see and what a crop may need, and counts the bytes of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.ledger import Ledger
from kvtier.core.ring import WindowSequence
from kvtier.errors import CapacityError, SessionStateError
from kvtier.types import LayerLayout

CPU = torch.device("cpu")
SLACK = 64


def opened(window: int, ledger: Ledger | None = None, *, chunk: int = 0) -> WindowSequence:
    layer = LayerLayout(num_query_heads=2, num_kv_heads=2, key_dim=3, value_dim=2, dtype="float64", window=window)
    return WindowSequence.empty(layer, window, CPU, ledger or Ledger("cpu", None), chunk=chunk)


def contents(names: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K [2, n, 3] and V [2, n, 2] that tell the names of their tokens."""
    content = torch.tensor(names, dtype=torch.float64)[None, :, None] + torch.tensor([0.0, 0.25])[:, None, None]
    return content.expand(2, -1, 3), -content.expand(2, -1, 2)


def append(sequence: WindowSequence, names: list[int]) -> None:
    """Tokens whose contents and positions tell their name; names ascend."""
    sequence.append(*contents(names), 2 * np.array([names], dtype=np.int64))


def reads(sequence: WindowSequence, names: list[int], start: int, stop: int) -> bool:
    """Whether tokens ``start`` to ``stop`` can be read, after a check that they are the ones of these names."""
    got = sequence.read(start, stop)
    if got is None:
        return False
    assert all(torch.equal(*pair) for pair in zip(got, contents(names[start:stop]), strict=True))
    return True


def held(sequence: WindowSequence) -> list[int]:
    """Names of the tokens held, after a check that K, V and positions agree on them."""
    names = (sequence.positions // 2).tolist()
    segments = list(sequence.segments())
    assert len(segments) == (1 if names else 0)
    for segment in segments:
        keys, values = contents(names)
        assert (segment.start, segment.stop) == (0, len(names))
        assert torch.equal(segment.keys[0], keys)
        assert torch.equal(segment.values[0], values)
    return names


@pytest.mark.parametrize("window", [1, 2, 5, 70])
def test_at_every_length_the_window_before_each_step_is_held(window: int) -> None:
    sequence, seen = opened(window), 0
    for tokens in [1, 1, 3, 70, 1, 2, 150, *[1] * 70, 7]:
        append(sequence, list(range(seen, seen + tokens)))
        assert held(sequence) == list(range(max(0, seen - window + 1), seen + tokens))
        seen += tokens
        sequence.settle()
        assert held(sequence) == list(range(max(0, seen - window + 1), seen))
        assert sequence.last_position == (2 * (seen - 1) if window > 1 else None)
        assert sequence.seen == seen
        assert sequence.keys.shape[1] == window - 1 + SLACK, "an outgrown buffer shrinks back"


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("chunk", [4, 32, 200])
def test_the_open_chunk_can_be_read_until_the_step_that_fills_it_is_over(window: int, chunk: int) -> None:
    ledger = Ledger("cpu", None)
    sequence, names = opened(window, ledger, chunk=chunk), list[int]()
    bytes_held = ledger.in_use
    for tokens in [1, 1, 3, 70, 1, 2, 350, *[1] * 70, 7, chunk, 1]:
        first = len(names) // chunk * chunk
        names += range(len(names), len(names) + tokens)
        append(sequence, names[-tokens:])
        assert held(sequence) == names[max(0, len(names) - tokens - window + 1) :], "what attention sees is the window"
        assert reads(sequence, names, first, len(names))
        sequence.settle()
        assert reads(sequence, names, len(names) // chunk * chunk, len(names))
        assert ledger.in_use == bytes_held
    assert sequence.read(0, 1) is None
    assert sequence.read(len(names) - 1, len(names) + 1) is None


def test_tokens_that_slid_out_elsewhere_are_only_counted() -> None:
    sequence, names = opened(4, chunk=8), list(range(30))
    sequence.pass_over(21)
    append(sequence, names[21:26])

    assert (sequence.seen, sequence.croppable) == (26, 2)
    assert reads(sequence, names, 21, 26)
    assert sequence.read(20, 26) is None
    with pytest.raises(SessionStateError, match="5 tokens are held"):
        sequence.pass_over(1)


def test_a_step_beyond_the_budget_is_refused_with_the_window_whole() -> None:
    layer_bytes = 2 * (3 + 2) * 8
    ledger = Ledger("cpu", (4 + SLACK) * layer_bytes + 100)
    sequence = opened(5, ledger)
    append(sequence, list(range(9)))

    with pytest.raises(CapacityError, match="windows"):
        append(sequence, list(range(9, 10 + SLACK)))

    assert held(sequence)[-4:] == [5, 6, 7, 8]
    sequence.release()
    assert ledger.in_use == 0


def test_a_crop_past_the_window_names_the_remedy() -> None:
    sequence = opened(4)
    append(sequence, list(range(10)))
    sequence.settle()
    assert sequence.croppable == 0

    with pytest.raises(SessionStateError, match=r"cannot remove 2 .* window of 4: the 3 .* record_past\(True\)"):
        sequence.check_crop(2)


def test_a_sequence_shorter_than_its_window_may_be_cropped_whole() -> None:
    sequence = opened(8)
    append(sequence, [0, 1, 2])
    sequence.settle()

    assert sequence.croppable == 3
    sequence.crop(3)
    assert (held(sequence), sequence.seen) == ([], 0)
    append(sequence, [5])
    assert held(sequence) == [5]


class WindowMachine(RuleBasedStateMachine):
    """Appends, crops, forks and recordings against the list of all tokens ever appended."""

    window = 6
    chunk = 0

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("cpu", None)
        self.pairs: list[tuple[WindowSequence, list[int]]] = [(opened(self.window, self.ledger, chunk=self.chunk), [])]
        self.next = 0

    @property
    def current(self) -> tuple[WindowSequence, list[int]]:
        return self.pairs[-1]

    @rule(count=st.integers(1, 90), settle=st.booleans())
    def append(self, count: int, settle: bool) -> None:
        sequence, tokens = self.current
        names = list(range(self.next, self.next + count))
        self.next += count
        before = max(0, len(tokens) - self.window + 1)
        append(sequence, names)
        tokens += names
        assert set(tokens[before:]) <= set(held(sequence)), "every new query needs the window before it"
        if settle:
            sequence.settle()

    @rule(recording=st.booleans())
    def record(self, recording: bool) -> None:
        self.current[0].recording = recording

    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        sequence, tokens = self.current
        count = int(share * sequence.croppable)
        sequence.check_crop(count)
        sequence.crop(count)
        del tokens[len(tokens) - count :]

    @rule()
    def crop_too_far(self) -> None:
        with pytest.raises(SessionStateError):
            self.current[0].check_crop(self.current[0].croppable + 1)

    @precondition(lambda self: len(self.pairs) < 3)
    @rule()
    def fork(self) -> None:
        sequence, tokens = self.current
        self.pairs.append((sequence.fork(), list(tokens)))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule()
    def swap(self) -> None:
        """Go on in the oldest fork."""
        self.pairs.append(self.pairs.pop(0))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule()
    def release(self) -> None:
        self.pairs.pop()[0].release()

    @invariant()
    def the_newest_tokens_are_held(self) -> None:
        for sequence, tokens in self.pairs:
            names = held(sequence)
            assert names == tokens[len(tokens) - len(names) :]
            assert len(names) >= min(len(tokens), self.window - 1)
            assert sequence.seen == len(tokens)
            after = len(names) - sequence.croppable
            assert after >= self.window - 1 or sequence.croppable == len(tokens), "a crop must leave a whole window"

    @invariant()
    def what_can_be_read_is_right(self) -> None:
        for sequence, tokens in self.pairs:
            count = len(tokens)
            assert reads(sequence, tokens, count - len(held(sequence)), count)
            start = count // self.chunk * self.chunk if self.chunk else 0
            for stop in (start, (start + count) // 2, count):
                reads(sequence, tokens, start, stop)

    @invariant()
    def buffers_are_counted(self) -> None:
        size = sum(sequence.keys.nbytes + sequence.values.nbytes for sequence, _ in self.pairs)
        assert self.ledger.in_use == size

    def teardown(self) -> None:
        for sequence, _ in self.pairs:
            sequence.release()
        assert self.ledger.in_use == 0


class ChunkMachine(WindowMachine):
    """The chunk that is not full yet stays behind a window shorter than it."""

    chunk = 24


class NarrowWindowMachine(WindowMachine):
    """A window of one token: a query sees itself only."""

    window = 1


TestWindowMachine = WindowMachine.TestCase
TestChunkMachine = ChunkMachine.TestCase
TestNarrowWindowMachine = NarrowWindowMachine.TestCase
