"""How tokens come into a session: checked once a step, held raw until they were attended, appended to every row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvtier.core.batch import Batch, distinct_rows
from kvtier.core.columns import ColumnHistory
from kvtier.core.guarded import Guarded
from kvtier.core.prompt import PromptTracker
from kvtier.core.raw import RawTokens
from kvtier.core.step import Step
from kvtier.errors import SessionStateError

if TYPE_CHECKING:
    from kvtier.core.memory import Memory

__all__ = ["Appending"]

_names = itertools.count()


class Appending(Guarded):
    """The rows of a session and how far each layer has come; called under the lock of the memory."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._name = next(_names)
        self._batch = Batch(memory, [], PromptTracker())
        self._columns = [0] * len(memory.layout.layers)
        self._history = ColumnHistory()
        self._raw = RawTokens(memory.ledger_of)
        self._recording = False
        self._step: Step | None = None

    @property
    def length(self) -> int:
        """Columns that every layer has seen, padding included."""
        return min(self._columns)

    @property
    def rows(self) -> int:
        """Sequences held; 0 before the first append."""
        return len(self._batch.rows)

    def _extend(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        spans: Sequence[slice] | None,
    ) -> None:
        """Append for good."""
        held, (rows, _, tokens, _) = self.rows, keys.shape
        leading = self._columns[layer] == max(self._columns)
        if leading:
            # Whoever counts positions up in place gives the same tensor again.
            self._step = None
        step = self._step_of(positions, spans, rows, tokens)
        self._batch.check_order(layer, step)
        if tokens > 1:
            self._batch.prompt.check(self._columns[layer], tokens)
        if leading:
            self._check_finished()
        try:
            if not held:
                self._open(rows)
            self._raw.hold(layer, keys, values)
            if leading:
                self._begin_step(keys, values, spans)
            self._batch.append(layer, keys, values, step)
        except BaseException as error:
            self._fail("an append", error)
            raise
        self._columns[layer] += tokens
        if tokens > 1:
            self._batch.prompt.appended(self._columns[layer], tokens)

    def _step_of(self, positions: torch.Tensor, spans: Sequence[slice] | None, rows: int, tokens: int) -> Step:
        """Positions and spans, checked and on the host; read once for all layers of a step."""
        step = self._step
        if step is None or step.positions is not positions or step.spans is not spans or step.shape != (rows, tokens):
            step = self._step = Step(positions, spans, rows, tokens)
        return step

    def _check_finished(self) -> None:
        """Refuse to begin a step while a layer lacks the one before."""
        columns, length = max(self._columns), self.length
        if columns != length:
            behind = self._columns.index(length)
            raise SessionStateError(
                f"layer {behind} has seen {length} of {columns} columns: the last step did not finish; append() "
                "to it first, or close this session"
            )

    def _open(self, rows: int) -> None:
        """Start the rows, in the state that was asked for before there were any."""
        self._batch.open(rows)
        self._batch.record(self._recording)

    def _begin_step(self, keys: torch.Tensor, values: torch.Tensor, spans: Sequence[slice] | None) -> None:
        """Once per step: note the columns, and plan the memory of a prompt."""
        tokens = keys.shape[2]
        first = self._history.empty
        self._history.note(tokens, None if spans is None else tuple((span.start, span.stop) for span in spans))
        if first or tokens > self.memory.layout.block_tokens:
            coming = max(tokens, (self._batch.prompt.end or 0) - self.length)
            rows, probing = distinct_rows(keys, values), self._batch.probing
            self.memory.plan(self._name, rows, held=self.length, coming=coming, chunk=tokens, probing=probing)
