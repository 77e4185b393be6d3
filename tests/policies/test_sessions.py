"""SnapKV and Quest in a session: slots kept, pages read and all attention equal the papers, written out densely."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.memory import Memory
from kvtier.core.sequence import LayerSequence
from kvtier.testing.dense_session import DensePolicies, Evicting, Reading
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import Step, StepSource, open_memory
from kvtier.types import GroupReduce

EXACT = 1e-10
REDUCTIONS: list[GroupReduce] = ["mean", "max", "sum"]


class Pair:
    """A session and its dense oracles, one a row, fed the same steps."""

    def __init__(
        self, memory: Memory, rows: int, evicting: Evicting | None = None, reading: Reading | None = None
    ) -> None:
        self.session = memory.session()
        self.oracles = [DensePolicies(memory.layout, evicting, reading) for _ in range(rows)]
        self.softcap: float | None = None
        self.sink: torch.Tensor | None = None

    def run(self, step: Step, *, decoding: bool, ends_prompt: bool = False) -> None:
        outputs = step.run(self.session, softcap=self.softcap, sink=self.sink)
        for row, oracle in enumerate(self.oracles):
            span = slice(0, step.positions.shape[1]) if step.spans is None else step.spans[row]
            expected = oracle.run(
                step, row, decoding=decoding, ends_prompt=ends_prompt, softcap=self.softcap, sink=self.sink
            )
            for got, right in zip(outputs, expected, strict=True):
                torch.testing.assert_close(got[row, :, span], right, rtol=0, atol=EXACT)
        self.check_slots()

    def check_slots(self) -> None:
        for row, oracle in enumerate(self.oracles):
            for layer, held in enumerate(oracle.layers):
                sequence = self.session._batch.rows[row][layer]
                if isinstance(sequence, LayerSequence):
                    kept = torch.from_numpy(sequence.positions.view.copy()).expand_as(held.positions)
                    assert torch.equal(kept, held.positions), f"row {row}, layer {layer}"

    def prefill(self, source: StepSource, chunks: Sequence[int]) -> None:
        """One prompt in these chunks."""
        self.session.expect(sum(chunks))
        for place, tokens in enumerate(chunks):
            self.run(source.take(tokens), decoding=False, ends_prompt=place == len(chunks) - 1)

    def decode(self, source: StepSource, steps: Sequence[int]) -> None:
        """Steps of so many tokens each."""
        for tokens in steps:
            self.run(source.take(tokens), decoding=True)

    def check_pages_read(self) -> None:
        assert self.session.report().pages_read == sum(oracle.pages_read for oracle in self.oracles)


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("chunks", [[61], [60, 1], [9] * 7], ids=str)
def test_snapkv_keeps_the_slots_of_the_paper(how: GroupReduce, chunks: list[int]) -> None:
    evicting = Evicting(window=10, kernel=5, keep=27, group_reduce=how)
    text = f"snapkv(window=10, kernel=5, keep=27, group_reduce={how!r})"
    with closing(open_memory(small_layout(6), text)) as memory:
        source, pair = StepSource(memory.layout, rows=2), Pair(memory, 2, evicting)
        pair.prefill(source, chunks)
        pair.decode(source, [1, 1, 1])
        pair.prefill(source, [17, 4])
        pair.decode(source, [1, 2])

        assert [sequence.length for sequence in pair.session._batch.rows[0]][::2] == [30, 30]


@pytest.mark.parametrize("policy", ["snapkv", "snapkv and quest"])
@pytest.mark.parametrize("tiers", ["host", "nvme"])
def test_pages_below_the_device_are_evicted_alike(policy: str, tiers: str, tmp_path: Path) -> None:
    evicting = Evicting(window=50, kernel=7, keep=90)
    reading = Reading(read=40, dense_layers=1) if "quest" in policy else None
    text = "snapkv(window=50, keep=90)" + (" | quest(read=40, dense_layers=1)" if reading else "")
    with closing(
        open_memory(
            policy_text=text,
            device=250_000 if reading else 110_000,
            host="1MiB" if tiers == "host" else "16KiB",
            nvme="4MiB" if tiers == "nvme" else None,
            path=tmp_path,
        )
    ) as memory:
        source, pair = StepSource(rows=2), Pair(memory, 2, evicting, reading)
        pair.prefill(source, [40] * 8)
        moved = memory.moved()
        assert moved["read"] > 0
        assert moved["spilled"] > 0 or tiers == "host"
        pair.decode(source, [1] * 10)
        pair.check_pages_read()


@pytest.mark.parametrize("read", [12, 19, 40, 72, 500])
@pytest.mark.parametrize("device", [None, 200_000])
def test_quest_reads_the_chosen_pages_and_the_tail_within_its_budget(read: int, device: int | None) -> None:
    reading = Reading(read=read, dense_layers=1)
    with closing(open_memory(policy_text="quest(dense_layers=1)", read=read, device=device)) as memory:
        source, pair = StepSource(rows=2), Pair(memory, 2, reading=reading)
        pair.prefill(source, [60, 13])
        pair.decode(source, [1] * 17 + [3, 2])
        pair.check_pages_read()
        most = max(oracle.read_at_most for oracle in pair.oracles)
        assert most <= read
        assert (most == 0) == (read == 500)
        assert pair.session.report().pages_read < pair.session.report().pages_held or read == 500


@pytest.mark.parametrize("dense_layers", [0, 1, 2, 3])
def test_dense_layers_read_everything_and_hold_no_sketch(dense_layers: int) -> None:
    reading = Reading(read=16, dense_layers=dense_layers)
    with closing(open_memory(policy_text=f"quest(read=16, dense_layers={dense_layers})")) as memory:
        source, pair = StepSource(), Pair(memory, 1, reading=reading)
        pair.prefill(source, [64])
        pair.decode(source, [1] * 3)

        pair.check_pages_read()
        held = pair.session.report()
        assert held.pages_held == 3 * 3 * 16
        assert held.pages_read == 3 * (16 * dense_layers + 3 * (3 - dense_layers))
        assert (held.device_bytes.get("sketches", 0) > 0) == (dense_layers < 3)


@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    decode=st.lists(st.integers(1, 3), max_size=6),
    window=st.integers(1, 14),
    kernel=st.sampled_from([1, 3, 7]),
    extra=st.integers(1, 40),
    read=st.integers(12, 60),
    dense_layers=st.integers(0, 2),
    reductions=st.tuples(st.sampled_from(REDUCTIONS), st.sampled_from(REDUCTIONS)),
    softcap=st.none() | st.floats(1, 20),
    sinks=st.none() | st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    device=st.sampled_from([None, 400_000]),
)
def test_any_parameters_of_both_together_equal_the_papers(
    chunks: list[int],
    decode: list[int],
    window: int,
    kernel: int,
    extra: int,
    read: int,
    dense_layers: int,
    reductions: tuple[GroupReduce, GroupReduce],
    softcap: float | None,
    sinks: list[float] | None,
    device: int | None,
) -> None:
    evicting = Evicting(window=window, kernel=kernel, keep=window + extra, group_reduce=reductions[0])
    reading = Reading(read=read, dense_layers=dense_layers, group_reduce=reductions[1])
    text = (
        f"snapkv(window={window}, kernel={kernel}, keep={window + extra}, group_reduce={reductions[0]!r})"
        f" | quest(read={read}, dense_layers={dense_layers}, group_reduce={reductions[1]!r}) | lru"
    )
    with closing(open_memory(policy_text=text, device=device)) as memory:
        source, pair = StepSource(rows=2), Pair(memory, 2, evicting, reading)
        pair.softcap = softcap
        pair.sink = None if sinks is None else torch.tensor(sinks, dtype=torch.float64)
        pair.prefill(source, chunks)
        pair.decode(source, decode)
        pair.check_pages_read()


def test_padded_rows_are_evicted_as_if_alone() -> None:
    evicting = Evicting(window=6, kernel=3, keep=14)
    with closing(open_memory(policy_text="snapkv(window=6, kernel=3, keep=14)")) as memory:
        source, pair = StepSource(rows=3), Pair(memory, 3, evicting)
        lengths, width = [40, 9, 21], 40
        step = source.take(width)
        positions = torch.stack([torch.arange(width) - (width - length) for length in lengths]).clamp(min=0)
        spans = tuple(slice(width - length, width) for length in lengths)
        pair.run(replace(step, positions=positions, spans=spans), decoding=False, ends_prompt=True)
        for past in range(3):
            pair.run(replace(source.take(1), positions=torch.tensor(lengths)[:, None] + past), decoding=True)

        assert [row[0].length for row in pair.session._batch.rows] == [17, 12, 17]


def test_each_append_is_a_prompt_of_its_own_when_none_is_announced() -> None:
    evicting = Evicting(window=4, kernel=3, keep=12)
    with closing(open_memory(policy_text="snapkv(window=4, kernel=3, keep=12)")) as memory:
        source, pair = StepSource(rows=1), Pair(memory, 1, evicting)
        for tokens in (30, 2, 9):
            pair.run(source.take(tokens), decoding=False, ends_prompt=True)
            pair.run(source.take(1), decoding=True)

        assert pair.session.report().kept == 13


def test_rows_of_one_prompt_still_share_their_pages_after_eviction() -> None:
    with closing(open_memory(policy_text="snapkv(window=4, keep=16)")) as memory:
        session = memory.session()
        source = StepSource(rows=4)
        source.take(50, equal=True).run(session)

        assert memory.groups[0].store.table.live == 3 * 2 * 4
        source.take(1).run(session)
        assert session.report().kept == 17


def test_evicted_tokens_cannot_be_cropped_and_later_ones_can() -> None:
    evicting = Evicting(window=4, kernel=7, keep=16)
    with closing(open_memory(policy_text="snapkv(window=4, keep=16)")) as memory:
        source, pair = StepSource(), Pair(memory, 1, evicting)
        pair.prefill(source, [50])
        pair.decode(source, [1] * 11)
        assert pair.session.croppable == 11
        pair.session.crop(9)
        for held in pair.oracles[0].layers:
            held.keep([list(range(18))] * 2)
        pair.check_slots()
        pair.decode(source, [1] * 3)
