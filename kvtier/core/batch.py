"""The rows of a session: appended to, attended over and evicted layer by layer; equal rows share their pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from kvtier.core.attention import AnySequence, Queries, attend_all, attend_chosen
from kvtier.core.checks import check_ascending
from kvtier.core.explain import ReadLog
from kvtier.core.kept import KeptSequence
from kvtier.core.memory import Memory
from kvtier.core.moments import moments_of
from kvtier.core.policy import Need, Scope, SelectionPolicy
from kvtier.core.prompt import PromptTracker
from kvtier.core.ragged import RaggedSequence
from kvtier.core.ring import WindowSequence
from kvtier.core.selection import PromptWindow, evict_rows, sums_of
from kvtier.core.sequence import LayerSequence
from kvtier.core.slot_eviction import attend_step
from kvtier.core.step import Row, Step
from kvtier.kernels.merge_partials import merge_partials, sink_partial
from kvtier.types import Partial

__all__ = ["Batch", "distinct_rows"]

Rows: TypeAlias = list[list[AnySequence]]


class Batch:
    """Sequences of every row and layer, and where their prompt ends.

    Attributes
    ----------
    rows : list
        ``rows[b][layer]``.
    pages_read, pages_held : int
        Pages that decode steps read per KV head, and pages there were.
    reads : ReadLog, optional
        Which pages decode steps read, if the memory says that it is wanted.
    probing : int, optional
        The first layers that take part, and no policy does; None for all layers under the policy.

    Notes
    -----
    Called under the lock of the memory.
    """

    def __init__(self, memory: Memory, rows: Rows, prompt: PromptTracker, probing: int | None = None) -> None:
        self.memory = memory
        self.rows = rows
        self.prompt = prompt
        self.probing = probing
        self.reads: ReadLog | None = ReadLog() if memory.logs_reads else None
        self.pages_read = self.pages_held = 0

    @property
    def depth(self) -> int:
        """Layers that take part."""
        return len(self.memory.layout.layers) if self.probing is None else self.probing

    @property
    def sequences(self) -> list[AnySequence]:
        """Every sequence of every row and layer."""
        return [sequence for row in self.rows for sequence in row]

    def open(self, count: int) -> None:
        """Start ``count`` empty rows."""
        self.rows = [[] for _ in range(count)]
        for row in self.rows:
            for layer in range(self.depth):
                row.append(self.memory.sequence(layer, sketched=self.probing is None))

    def check_order(self, layer: int, step: Step) -> None:
        """Raise ``InputError`` when the positions of a row do not ascend, or not from what it holds."""
        for row in step.rows:
            last = self.rows[row.number][layer].last_position if self.rows else None
            if row.tokens > 1 or (last is not None and row.first <= last):
                check_ascending(row.host[0], last)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, step: Step) -> None:
        """Append one layer's tokens to every row; a row equal to an earlier one, before and after, becomes its fork.

        This is how beams, which start as copies of one prompt, come to store it once.
        """
        if len(self.rows) == 1:
            for row in step.rows:
                _append(self.rows[0][layer], keys, values, row)
            return
        leaders: dict[object, tuple[Row, AnySequence]] = {}
        for row in step.rows:
            sequence = self.rows[row.number][layer]
            origin = sequence.version if sequence.length else None
            leader = leaders.get(origin)
            if leader is not None and _same(keys, values, row, leader[0]):
                sequence.release()
                self.rows[row.number][layer] = leader[1].fork()
                continue
            _append(sequence, keys, values, row)
            leaders[origin] = (row, sequence)

    def attend(self, layer: int, row: int, queries: Queries, sink: torch.Tensor | None, *, decoding: bool) -> Partial:
        """Attention of one row in one layer, with the logits of a sink [Hq] if there is one."""
        sequence, selection = self.rows[row][layer], self.memory.policy.selection
        if decoding and isinstance(sequence, KeptSequence) and selection is not None:
            return attend_step(sequence, queries, sink, selection)
        partial = self.over_keys(layer, row, queries, decoding=decoding)
        if sink is not None:
            partial = merge_partials([partial, sink_partial(sink, partial)])
        if not decoding:
            self.note_prompt(layer, row, queries, partial)
        return partial

    def over_keys(self, layer: int, row: int, queries: Queries, *, decoding: bool, beside: int = 0) -> Partial:
        """Attention of one row to what a layer holds, by the policy's rules; ``beside`` tokens are read besides."""
        sequence, policy = self.rows[row][layer], self.memory.policy
        if not isinstance(sequence, (LayerSequence, RaggedSequence)):
            return attend_all(sequence, queries)
        store = sequence.group.store
        if store.bounded:
            store.tick()
        if isinstance(sequence, RaggedSequence):
            return self._over_heads(sequence, queries, decoding=decoding)
        retrieval = policy.retrieval if decoding else None
        if retrieval is None or policy.read is None or layer < retrieval.dense_layers:
            if store.bounded:
                store.touch(sequence.pages.view)
            partial, pages = attend_all(sequence, queries), sequence.pages.length
        else:
            partial, pages = attend_chosen(sequence, queries, retrieval, policy.read - beside)
        if decoding:
            self.pages_held += sequence.pages.length
            self.pages_read += pages
            if self.reads is not None:
                self.reads.note(layer, row, sequence, pages)
        return partial

    def _over_heads(self, sequence: RaggedSequence, queries: Queries, *, decoding: bool) -> Partial:
        store = sequence.group.store
        if store.bounded:
            store.touch(sequence.page_ids)
        if decoding:
            self.pages_held += sequence.page_columns
            self.pages_read += sequence.page_columns
        return attend_all(sequence, queries)

    def note_prompt(self, layer: int, row: int, queries: Queries, partial: Partial) -> None:
        """While a prompt is running, remember what a policy will ask about it."""
        selection, sequence = self.memory.policy.selection, self.rows[row][layer]
        if selection is None or self.probing is not None or isinstance(sequence, WindowSequence):
            return
        if Need.WINDOW_ATTENTION in selection.needs:
            width = selection.window_queries
            self.prompt.note(layer, row, PromptWindow.of(queries, partial.lse, width), width)
        if Need.COLUMN_SUMS in selection.needs:
            self.prompt.add(layer, row, sums_of(sequence, queries, partial.lse))
        rope = self.memory.layout.layers[layer].rope
        if Need.QUERY_MOMENTS in selection.needs and rope is not None:
            self.prompt.moments[layer, row] = moments_of(
                queries.query,
                queries.positions,
                rope,
                skip=selection.skipped_queries,
                before=self.prompt.moments.get((layer, row)),
                ledger=sequence.group.ledger,
            )

    def evict(self, layer: int, like: Queries) -> None:
        """Apply the selection policy to a layer whose prompt has ended; sliding windows are never subject to it.

        A policy that plans over the model waits for the last layer, and then has all of them.
        """
        selection, keep = self.memory.policy.selection, self.memory.policy.keep
        if selection is None or keep is None or isinstance(self.rows[0][layer], WindowSequence):
            return
        if selection.scope is Scope.LAYER:
            self._evict_layer(layer, like, selection, [keep[layer]] * len(self.rows))
            return
        self.prompt.ended[layer] = like
        layers = [index for index, held in enumerate(self.rows[0]) if not isinstance(held, WindowSequence)]
        if layer == layers[-1]:
            budgets = [self._shares(row, layers, selection, keep) for row in range(len(self.rows))]
            for place, index in enumerate(layers):
                self._evict_layer(index, self.prompt.ended.pop(index), selection, [row[place] for row in budgets])

    def _shares(self, row: int, layers: list[int], selection: SelectionPolicy, keep: Sequence[int]) -> tuple[int, ...]:
        """What one row keeps in each of ``layers``, by the attention that was seen in all of them."""
        budgets = tuple(keep[layer] for layer in layers)
        sums = [self.prompt.sums.get((layer, row)) for layer in layers]
        seen = [one for one in sums if one is not None]
        return selection.share(budgets, seen) if len(seen) == len(layers) else budgets

    def _evict_layer(self, layer: int, like: Queries, selection: SelectionPolicy, keep: Sequence[int]) -> None:
        held = [row[layer] for row in self.rows]
        sequences = [sequence for sequence in held if not isinstance(sequence, WindowSequence)]
        rope = self.memory.layout.layers[layer].rope
        evicted = evict_rows(sequences, self.prompt.take(layer, len(held)), like, selection, keep, rope)
        for row, sequence in zip(self.rows, evicted, strict=True):
            row[layer] = sequence
        group = sequences[0].group
        if layer == group.layers[-1]:
            group.planned_frames = 0
            group.store.compact()

    def work_ahead(self, layer: int, *, decoding: bool) -> None:
        """After a layer: shrink windows, fetch what the next layer chose last time, copy down what leaves next."""
        for row in self.rows:
            sequence = row[layer]
            if isinstance(sequence, WindowSequence):
                sequence.settle()
        if self.memory.budgets.device is None:
            return
        for row in self.rows:
            following = row[layer + 1] if decoding and layer + 1 < len(row) else None
            if isinstance(following, LayerSequence) and following.chosen is not None:
                group, columns = following.group, following.chosen[0].cpu().numpy()
                pages = following.pages.view[group.head_rows, columns]
                group.store.prefetch(pages.ravel(), most=group.staging_columns * group.heads)
        first = self.rows[0][layer]
        if isinstance(first, (LayerSequence, RaggedSequence)):
            first.group.store.write_behind(first.group.low_water())

    def record(self, recording: bool) -> None:
        """Whether sliding windows keep what a crop may need."""
        for sequence in self.sequences:
            if isinstance(sequence, WindowSequence):
                sequence.recording = recording

    def crop(self, counts: Sequence[int]) -> None:
        """Forget the newest ``counts[b]`` tokens of each row; all or, when one cannot, none."""
        each = [(sequence, count) for count, row in zip(counts, self.rows, strict=True) for sequence in row]
        for sequence, count in each:
            sequence.check_crop(count)
        for sequence, count in each:
            sequence.crop(count)

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was: moved the first time, forked again; rows not named are freed."""
        # Rows that go make room for the forks: a beam search must not need more than its rows.
        gone = [sequences for row, sequences in enumerate(self.rows) if row not in order]
        repeated = [row for place, row in enumerate(order) if row in order[:place]]
        for sequences in gone:
            _release(sequences)
        forks = iter(_fork_rows([self.rows[row] for row in repeated]))
        self.rows = [next(forks) if row in order[:place] else self.rows[row] for place, row in enumerate(order)]
        self.prompt = self.prompt.reordered(order)
        self.reads = None if self.reads is None else self.reads.reordered(order)

    def fork(self) -> Batch:
        """A second owner of every sequence."""
        twin = Batch(self.memory, _fork_rows(self.rows), self.prompt.fork())
        twin.reads = None if self.reads is None else self.reads.fork()
        return twin

    def release(self) -> None:
        """Let go of every sequence."""
        _release(self.sequences)
        self.rows, self.prompt = [], PromptTracker()


def distinct_rows(keys: torch.Tensor, values: torch.Tensor) -> int:
    """How many rows look distinct by their last token; for planning memory, where a wrong guess only costs growth."""
    return len(
        {
            (float(keys[row, 0, -1].double().sum()), float(values[row, 0, -1].double().sum()))
            for row in range(keys.shape[0])
        }
    )


def _fork_rows(rows: Rows) -> Rows:
    """A fork of every sequence of every row; all or, when there is no room, none."""
    forks: Rows = []
    try:
        for row in rows:
            forks.append([])
            for sequence in row:
                forks[-1].append(sequence.fork())
    except BaseException:
        _release([sequence for row in forks for sequence in row])
        raise
    return forks


def _release(sequences: Sequence[AnySequence]) -> None:
    for sequence in sequences:
        sequence.release()


def _append(sequence: AnySequence, keys: torch.Tensor, values: torch.Tensor, row: Row) -> None:
    if row.tokens == 1 and isinstance(sequence, LayerSequence):
        sequence.append_token(row.of(keys), row.of(values), row.first)
    else:
        sequence.append(row.of(keys), row.of(values), row.host)


def _same(keys: torch.Tensor, values: torch.Tensor, row: Row, leader: Row) -> bool:
    """Whether two rows bring the same tokens."""
    if row.span != leader.span or not np.array_equal(row.host, leader.host):
        return False
    return torch.equal(row.of(keys), leader.of(keys)) and torch.equal(row.of(values), leader.of(values))
