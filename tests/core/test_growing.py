"""Where pages lie that come after an eviction: in one run of each layer, in memory that grows with what is held."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.memory import Memory
from kvtier.core.ragged import RaggedSequence
from kvtier.core.sequence import LayerSequence
from kvtier.testing.session_machine import small_layout
from kvtier.testing.steps import open_memory

PROMPT = 160
BLOCK = 8


def tokens(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """K [2, n, 6], V [2, n, 4] and positions [2, n] that name their token."""
    names = torch.arange(start, stop, dtype=torch.float64)[None, :, None] + torch.tensor([0.0, 1000.0])[:, None, None]
    return names + torch.arange(6) / 8, -(names + torch.arange(4) / 8), np.arange(start, stop)[None].repeat(2, axis=0)


def cut_down(memory: Memory, keep: tuple[int, int]) -> list[LayerSequence]:
    """Sequences of two layers that were left the last ``keep`` tokens of a prompt, in memory of just that size."""
    sequences = []
    for layer in range(2):
        sequence = memory.sequence(layer)
        assert isinstance(sequence, LayerSequence)
        sequence.append(*tokens(0, PROMPT))
        sequences.append(sequence)
    for sequence, kept in zip(sequences, keep, strict=True):
        sequence.replace(*tokens(PROMPT - kept, PROMPT))
    memory.groups[0].planned_frames = 0
    memory.groups[0].store.compact()
    return sequences


def held_by(sequences: list[LayerSequence]) -> int:
    return sum(sequence.pages.view.size for sequence in sequences)


@given(keep=st.tuples(st.integers(1, 70), st.integers(1, 70)), steps=st.integers(1, 150))
def test_after_an_eviction_idle_memory_stays_in_proportion_to_what_was_generated(
    keep: tuple[int, int], steps: int
) -> None:
    with closing(open_memory(small_layout())) as memory:
        sequences, arena = cut_down(memory, keep), memory.groups[0].arena
        per_token = len(memory.groups[0].layers) * 2 / memory.groups[0].page_tokens
        for step in range(steps):
            for sequence in sequences:
                sequence.append(*tokens(PROMPT + step, PROMPT + step + 1))
            idle = arena.total_frames - held_by(sequences)
            assert idle == arena.free_frames
            assert idle <= 2 * max(BLOCK, step + BLOCK) * per_token + arena.total_frames / 8
        for sequence, kept in zip(sequences, keep, strict=True):
            runs, irregular = arena.places(memory.groups[0].store.frames(sequence.pages.view))
            assert not irregular.size
            assert len(runs) <= (2 if steps <= 8 * BLOCK else 4), "what was kept, and what came since"
            expected = tokens(PROMPT - kept, PROMPT + steps)
            segments = sequence.segments(8)
            for segment in segments:
                assert torch.equal(segment.keys[0], expected[0][:, segment.start : segment.stop])
                assert torch.equal(segment.values[0], expected[1][:, segment.start : segment.stop])


def test_layers_that_go_on_together_fill_what_was_added() -> None:
    with closing(open_memory(small_layout())) as memory:
        sequences, arena = cut_down(memory, (64, 64)), memory.groups[0].arena
        layers, kept = len(memory.groups[0].layers), held_by(sequences)
        block = held_by(sequences[:1]) * BLOCK // 64
        assert arena.total_frames == kept
        for tokens_since, blocks in ((BLOCK, 2), (2 * BLOCK, 2), (3 * BLOCK, 4), (4 * BLOCK, 4), (5 * BLOCK, 8)):
            for step in range(tokens_since - BLOCK, tokens_since):
                for sequence in sequences:
                    sequence.append(*tokens(PROMPT + step, PROMPT + step + 1))
            assert arena.total_frames == kept + layers * blocks * block


def test_a_run_that_a_fork_holds_too_stays_where_it_is() -> None:
    with closing(open_memory(small_layout())) as memory:
        sequences, store = cut_down(memory, (64, 64)), memory.groups[0].store
        for sequence in sequences:
            sequence.append(*tokens(PROMPT, PROMPT + 2 * BLOCK))
        twin, first = sequences[0].fork(), store.frames(sequences[0].pages.view).copy()
        sequences[0].append(*tokens(PROMPT + 2 * BLOCK, PROMPT + 4 * BLOCK))
        assert np.array_equal(store.frames(twin.pages.view), first)


def test_what_follows_an_eviction_that_left_heads_apart_grows_by_blocks_too() -> None:
    with closing(open_memory(small_layout())) as memory:
        sequence, arena = memory.sequence(0), memory.groups[0].arena
        assert isinstance(sequence, LayerSequence)
        sequence.append(*tokens(0, PROMPT))
        ragged = RaggedSequence.after(sequence)
        group = memory.groups[0]
        page, columns = group.page_tokens, 4 * BLOCK // group.page_tokens
        keys, values, _ = tokens(0, columns * page)
        pages = [part.unflatten(1, (columns, page)).flatten(0, 1) for part in (keys, values)]
        counts = np.full(group.heads, columns * page)
        ragged.keep(counts, pages[0], pages[1], np.arange(columns * page)[None].repeat(group.heads, axis=0))
        group.planned_frames = 0
        group.store.compact()
        kept, block = arena.total_frames, group.heads * BLOCK // page
        assert kept == group.heads * columns
        ragged.fork().append(*tokens(PROMPT, PROMPT + BLOCK))
        assert arena.total_frames <= kept + 2 * len(group.layers) * block
